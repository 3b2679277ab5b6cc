"""What the Triton attention kernels share: the walk of some rows of queries over the pages of one sequence.

Everything here is inlined into the kernels that call it. Scores are in units of log2 while they are summed, because
the hardware has exp2 and no exp. Products accumulate in float32; the weights are rounded to the queries' dtype before
they are multiplied with values, as every flash attention does.

Shapes: S sequences, T tokens, N query heads, M key/value heads, B blocks of a table, K blocks of the cache, P tokens a
block, R rows (a query of one head each), L positions of a tile, D head size, in kernels padded to a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Tiles:
    """How a kernel is cut: rows of queries and positions of a tile, both powers of two of at least 16."""

    rows: int
    positions: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Paged:
    """One layer's part of a cache: keys and values (K, M, P, D), and scales: none, (M) or (K, M, P) in float32."""

    keys_KMPD: Tensor
    values_KMPD: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None

    @property
    def scales(self) -> int:
        """What kernels call SCALES."""
        return 0 if self.key_scales is None else 1 if self.key_scales.dim() == 1 else 2


@dataclass(frozen=True)
class Rows:
    """What the queries of a step see: integers are int32."""

    starts_S1: Tensor
    seen_T: Tensor
    unseen_T: Tensor | None
    tables_SB: Tensor


def empty_like_queries(q_TND: Tensor, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Where a kernel writes its output (T, N, D) and, if wanted, its log-sum-exp (T, N) in float32."""
    out_TND = torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    lse_TN = torch.empty(q_TND.shape[:2], dtype=torch.float32, device=q_TND.device) if need_lse else None
    return out_TND, lse_TN


@triton.jit
def soft_capped(scores_RL, cap):
    """tanh(scores / cap) * cap. There is no tanh outside of the device's own library, which has no interpreter."""
    return cap * (1.0 - 2.0 / (tl.exp2(scores_RL * (2.0 / cap) * LOG2_E) + 1.0))


@triton.jit
def load_rows(rows, at_L, readable_L, dims_D, MASKED: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr):
    """(L, D) of a page's rows; zeros where nothing may be read. Masks only where they are needed: they cost."""
    pointers_LD = rows + at_L[:, None] + dims_D[None, :]
    if MASKED and D != D_PADDED:
        tile_LD = tl.load(pointers_LD, mask=readable_L[:, None] & (dims_D < D)[None, :], other=0.0)
    elif MASKED:
        tile_LD = tl.load(pointers_LD, mask=readable_L[:, None], other=0.0)
    elif D != D_PADDED:
        tile_LD = tl.load(pointers_LD, mask=(dims_D < D)[None, :], other=0.0)
    else:
        tile_LD = tl.load(pointers_LD)
    return tile_LD


@triton.jit
def update(scores_RL, most_R, total_R, out_RD):
    """One step of the running softmax: (weights of the tile, most, total, output so far), all to the new maximum."""
    new_most_R = tl.maximum(most_R, tl.max(scores_RL, axis=1))
    # A row that has seen nothing yet: minus infinity from itself would be NaN, and its weights are to be 0.
    shift_R = tl.where(new_most_R == float("-inf"), 0.0, new_most_R)
    weights_RL = tl.exp2(scores_RL - shift_R[:, None])
    shrink_R = tl.exp2(most_R - shift_R)
    return weights_RL, new_most_R, total_R * shrink_R + tl.sum(weights_RL, axis=1), out_RD * shrink_R[:, None]


@triton.jit
def attend_tiles(
    q_RD,
    most_R,
    total_R,
    out_RD,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    begin,
    end,
    first,
    stop,
    seen_R,
    unseen_R,
    scale,
    soft_cap,
    BLOCK_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
):
    """Add what positions [begin, end) give, a tile at a time. Unmasked, every row must see all of every tile.

    `keys`, `values` and scales point at their head's part of block 0; only [first, stop) may be read. `scale` is that
    of the softmax, times that of the head's keys.
    """
    dims_D = tl.arange(0, D_PADDED)
    for start in range(begin, end, TILE):
        at_L = start + tl.arange(0, TILE)
        readable_L = (at_L >= first) & (at_L < stop)
        if MASKED:
            block_L = tl.load(table + at_L // PAGE, mask=readable_L, other=0).to(tl.int64)
        else:
            block_L = tl.load(table + at_L // PAGE).to(tl.int64)
        row_L = block_L * BLOCK_STRIDE + (at_L % PAGE) * D
        k_LD = load_rows(keys, row_L, readable_L, dims_D, MASKED, D, D_PADDED)
        # Of float32 alone: as exact as it is by three products of TF32, for which there is hardware.
        scores_RL = tl.dot(q_RD, tl.trans(k_LD.to(q_RD.dtype)), input_precision="tf32x3")
        if TOKEN_SCALES:
            scale_L = block_L * SCALE_STRIDE + at_L % PAGE
            scores_RL *= tl.load(key_scales + scale_L, mask=readable_L, other=0.0)[None, :]
        if CAPPED:
            scores_RL = soft_capped(scores_RL * scale, soft_cap) * LOG2_E
        else:
            scores_RL *= scale * LOG2_E
        if MASKED:
            visible_RL = at_L[None, :] < seen_R[:, None]
            if WINDOW:
                visible_RL &= at_L[None, :] >= unseen_R[:, None]
            scores_RL = tl.where(visible_RL, scores_RL, float("-inf"))
        weights_RL, most_R, total_R, out_RD = update(scores_RL, most_R, total_R, out_RD)
        v_LD = load_rows(values, row_L, readable_L, dims_D, MASKED, D, D_PADDED)
        if TOKEN_SCALES:
            weights_RL *= tl.load(value_scales + scale_L, mask=readable_L, other=0.0)[None, :]
        out_RD = tl.dot(weights_RL.to(q_RD.dtype), v_LD.to(q_RD.dtype), out_RD, input_precision="tf32x3")
    return most_R, total_R, out_RD


@triton.jit
def attend(
    q_RD,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    kv_head,
    begin,
    stop,
    first,
    full_first,
    full_stop,
    seen_R,
    unseen_R,
    scale,
    soft_cap,
    ROWS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALES: tl.constexpr,
):
    """Attention of the rows over positions [begin, stop): (most, total, output not yet divided by it).

    Row r sees [unseen, seen); all of them see [full_first, full_stop), which is walked without masks. `begin` is a
    multiple of TILE and may lie before `first`, from where on there is something to read. SCALES: 0 the cache holds
    numbers as they are, 1 to be multiplied by a scale of their head, 2 of their token and head.
    """
    BLOCK_STRIDE: tl.constexpr = KV_HEADS * PAGE * D
    SCALE_STRIDE: tl.constexpr = KV_HEADS * PAGE
    TOKEN_SCALES: tl.constexpr = SCALES == 2
    keys += kv_head * (PAGE * D)
    values += kv_head * (PAGE * D)
    if SCALES == 1:
        scale *= tl.load(key_scales + kv_head)
    elif SCALES == 2:
        key_scales += kv_head * PAGE
        value_scales += kv_head * PAGE
    most_R = tl.full([ROWS], float("-inf"), tl.float32)
    total_R = tl.zeros([ROWS], tl.float32)
    out_RD = tl.zeros([ROWS, D_PADDED], tl.float32)
    # fmt: off
    middle = begin
    if WINDOW:
        middle = tl.maximum(begin, tl.cdiv(full_first, TILE) * TILE)
        most_R, total_R, out_RD = attend_tiles(
            q_RD, most_R, total_R, out_RD, keys, values, key_scales, value_scales, table,
            begin, tl.minimum(middle, stop), first, stop, seen_R, unseen_R, scale, soft_cap,
            BLOCK_STRIDE, SCALE_STRIDE, PAGE, D, D_PADDED, TILE, True, WINDOW, CAPPED, TOKEN_SCALES,
        )
    tail = tl.maximum(middle, full_stop // TILE * TILE)
    most_R, total_R, out_RD = attend_tiles(
        q_RD, most_R, total_R, out_RD, keys, values, key_scales, value_scales, table,
        middle, tail, first, stop, seen_R, unseen_R, scale, soft_cap,
        BLOCK_STRIDE, SCALE_STRIDE, PAGE, D, D_PADDED, TILE, False, WINDOW, CAPPED, TOKEN_SCALES,
    )
    most_R, total_R, out_RD = attend_tiles(
        q_RD, most_R, total_R, out_RD, keys, values, key_scales, value_scales, table,
        tail, stop, first, stop, seen_R, unseen_R, scale, soft_cap,
        BLOCK_STRIDE, SCALE_STRIDE, PAGE, D, D_PADDED, TILE, True, WINDOW, CAPPED, TOKEN_SCALES,
    )
    # fmt: on
    if SCALES == 1:
        out_RD *= tl.load(value_scales + kv_head)
    return most_R, total_R, out_RD


@triton.jit
def finished(most_R, total_R, out_RD):
    """(output, natural log-sum-exp); 0 and minus infinity of a row that saw nothing."""
    lse_R = tl.where(total_R > 0.0, most_R * LN_2 + tl.log(tl.where(total_R > 0.0, total_R, 1.0)), float("-inf"))
    return out_RD / tl.where(total_R > 0.0, total_R, 1.0)[:, None], lse_R
