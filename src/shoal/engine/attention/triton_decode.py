"""Paged attention of one query a sequence, in Triton, its context split over several programs.

A decode reads all keys and values once and computes next to nothing, so what counts is that enough programs read at
the same time. A program has the query heads that share a key/value head, as the rows of one product, and a part of the
context; a second kernel merges the parts by their log-sum-exp. Parts are cut in the kernel, by what each sequence has:
the grid does not depend on lengths, so a captured graph serves any.

Shapes: S sequences, N query heads, M key/value heads, D head size, R rows of a program, L positions of a tile, C parts
of a context.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.engine.attention.triton_parts import LN_2, Paged, Rows, Tiles, attend, finished

MAX_PARTS = 128
"""Of one context. More would be merged for longer than they are read."""
_PROGRAMS_PER_PROCESSOR = 3
"""That are resident together: 168 registers a thread allow it. Each has 32 KiB of loads in flight."""
_GOOD_ENOUGH = 0.9
"""Of the best that any number of parts does for how evenly the processors are used: fewer parts are merged faster."""


def decode_tiles(head_dim: int, itemsize: int, group: int) -> Tiles:
    """For a head size, the bytes of a cached element, and the query heads that share a key/value head."""
    padded = triton.next_power_of_2(head_dim)
    # Bytes to have enough of them on their way; fewer where what is converted would not fit in the registers.
    positions = min(128, max(16, 16384 // (padded * max(itemsize, 2 if padded > 128 else 1))))
    return Tiles(max(16, triton.next_power_of_2(group)), positions, num_warps=4, num_stages=3)


def num_parts(programs: int, longest: int, tile: int, processors: int) -> int:
    """Into how many parts contexts of up to `longest` are cut, for so many programs before that.

    The fewest that use the processors nearly as evenly as the best number does; 1 if they are in use anyway.
    """
    slots = processors * _PROGRAMS_PER_PROCESSOR
    most = min(MAX_PARTS, -(-longest // tile))
    if most <= 1 or programs >= 4 * slots:
        return 1

    def use(parts: int) -> float:
        rounds = programs * parts / slots
        return rounds / -(-programs * parts // slots)

    uses = [use(parts) for parts in range(1, most + 1)]
    return next(i for i, value in enumerate(uses, 1) if value >= _GOOD_ENOUGH * max(uses))


@triton.jit(do_not_specialize=["num_parts", "table_stride"])
def _decode_kernel(
    q,
    out,
    lse,
    keys,
    values,
    key_scales,
    value_scales,
    starts,
    seen,
    unseen,
    tables,
    q_stride,
    table_stride,
    num_parts,
    scale,
    soft_cap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SKIPPED: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALES: tl.constexpr,
    NEED_LSE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Grid: (S, M, parts). SPLIT: `out` is (S, parts, N, D) and `lse` (S, parts, N), else those of the tokens."""
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    token = tl.load(starts + sequence).to(tl.int64)
    if tl.load(starts + sequence + 1) - token != 1:
        return
    head_R = kv_head * GROUP + tl.arange(0, ROWS) - SKIPPED
    live_R = (tl.arange(0, ROWS) < GROUP) & (head_R >= 0) & (head_R < HEADS)
    dims_D = tl.arange(0, D_PADDED)
    live_RD = live_R[:, None] & (dims_D < D)[None, :]
    q_RD = tl.load(q + token * q_stride + (head_R * D)[:, None] + dims_D[None, :], mask=live_RD, other=0.0)

    stop = tl.load(seen + token)
    first = 0
    if WINDOW:
        first = tl.load(unseen + token)
    from_tile = first // TILE * TILE
    part_len = tl.cdiv(tl.cdiv(tl.maximum(stop - from_tile, 0), num_parts), TILE) * TILE
    begin = from_tile + part * part_len
    end = tl.minimum(begin + part_len, stop)
    seen_R = tl.zeros([ROWS], tl.int32) + stop
    unseen_R = tl.zeros([ROWS], tl.int32) + first
    # fmt: off
    most_R, total_R, out_RD = attend(
        q_RD, keys, values, key_scales, value_scales, tables + sequence * table_stride, kv_head,
        begin, end, first, first, end, seen_R, unseen_R, scale, soft_cap,
        ROWS, KV_HEADS, PAGE, D, D_PADDED, TILE, WINDOW, CAPPED, SCALES,
    )
    # fmt: on
    out_RD, lse_R = finished(most_R, total_R, out_RD)
    row = token
    if SPLIT:
        row = sequence * num_parts + part
    out_R = (row * HEADS + head_R) * D
    tl.store(out + out_R[:, None] + dims_D[None, :], out_RD.to(out.dtype.element_ty), mask=live_RD)
    if NEED_LSE:
        tl.store(lse + row * HEADS + head_R, lse_R, mask=live_R)


@triton.jit(do_not_specialize=["num_parts"])
def _merge_kernel(
    parts,
    part_lse,
    out,
    lse,
    starts,
    num_parts,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    TOGETHER: tl.constexpr,
    NEED_LSE: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
):
    """Grid: (S, N), or (T, N) where not BY_SEQUENCE. TOGETHER parts are read at a time."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    token = row
    if BY_SEQUENCE:
        token = tl.load(starts + row).to(tl.int64)
        if tl.load(starts + row + 1) - token != 1:
            return
    dims_D = tl.arange(0, D_PADDED)
    most = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    out_D = tl.zeros([D_PADDED], tl.float32)
    for start in range(0, num_parts, TOGETHER):
        part_C = start + tl.arange(0, TOGETHER)
        at_C = (row * num_parts + part_C) * HEADS + head
        lse_C = tl.load(part_lse + at_C, mask=part_C < num_parts, other=float("-inf"))
        new_most = tl.maximum(most, tl.max(lse_C, axis=0))
        shift = tl.where(new_most == float("-inf"), 0.0, new_most)
        weight_C = tl.exp2((lse_C - shift) / LN_2)
        part_CD = tl.load(
            parts + (at_C * D)[:, None] + dims_D[None, :],
            mask=(lse_C > float("-inf"))[:, None] & (dims_D < D)[None, :],
            other=0.0,
        )
        shrink = tl.exp2((most - shift) / LN_2)
        total = total * shrink + tl.sum(weight_C, axis=0)
        out_D = out_D * shrink + tl.sum(part_CD * weight_C[:, None], axis=0)
        most = new_most
    # All at least a part of 1, or nothing was seen and the output is 0.
    out_D = out_D / tl.where(total > 0.0, total, 1.0)
    target = token * HEADS + head
    tl.store(out + target * D + dims_D, out_D.to(out.dtype.element_ty), mask=dims_D < D)
    if NEED_LSE:
        merged = tl.where(total > 0.0, most + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
        tl.store(lse + target + tl.arange(0, 1), merged)


def merge_parts(
    parts: Tensor, part_lse: Tensor, out_TND: Tensor, lse_TN: Tensor | None, starts_S1: Tensor | None
) -> None:
    """Rows of `out_TND` from parts (rows, C, N, D) and their log-sum-exp (rows, C, N), both float32.

    With `starts_S1` rows are sequences, of which only those of one query are merged; without they are tokens.
    """
    num_rows, splits, heads, head_dim = parts.shape
    padded = max(16, triton.next_power_of_2(head_dim))
    _merge_kernel[(num_rows, heads)](
        parts,
        part_lse,
        out_TND,
        part_lse if lse_TN is None else lse_TN,
        part_lse if starts_S1 is None else starts_S1,
        splits,
        HEADS=heads,
        D=head_dim,
        D_PADDED=padded,
        TOGETHER=max(2, min(16, 2048 // padded)),
        NEED_LSE=lse_TN is not None,
        BY_SEQUENCE=starts_S1 is not None,
        num_warps=4 if padded > 128 else 2,
    )


def attend_decode(
    q_TND: Tensor,
    out_TND: Tensor,
    lse_TN: Tensor | None,
    paged: Paged,
    rows: Rows,
    *,
    group: int,
    skipped: int,
    scale: float,
    soft_cap: float | None,
    parts: int,
    tiles: Tiles,
) -> None:
    """Fill the rows of `out_TND`, and of `lse_TN` if it is given, of all sequences of one query."""
    _, heads, head_dim = q_TND.shape
    _, kv_heads, page, _ = paged.keys_KMPD.shape
    sequences = len(rows.starts_S1) - 1
    anything = rows.seen_T  # in the place of pointers that are not followed
    into, into_lse = out_TND, lse_TN
    if parts > 1:
        into = torch.empty((sequences, parts, heads, head_dim), dtype=torch.float32, device=q_TND.device)
        into_lse = torch.empty((sequences, parts, heads), dtype=torch.float32, device=q_TND.device)
    _decode_kernel[(sequences, kv_heads, parts)](
        q_TND,
        into,
        anything if into_lse is None else into_lse,
        paged.keys_KMPD,
        paged.values_KMPD,
        anything if paged.key_scales is None else paged.key_scales,
        anything if paged.value_scales is None else paged.value_scales,
        rows.starts_S1,
        rows.seen_T,
        anything if rows.unseen_T is None else rows.unseen_T,
        rows.tables_SB,
        q_TND.stride(0),
        rows.tables_SB.stride(0),
        parts,
        scale,
        soft_cap or 0.0,
        HEADS=heads,
        KV_HEADS=kv_heads,
        GROUP=group,
        SKIPPED=skipped,
        PAGE=page,
        D=head_dim,
        D_PADDED=max(16, triton.next_power_of_2(head_dim)),
        ROWS=max(tiles.rows, triton.next_power_of_2(group)),
        TILE=tiles.positions,
        WINDOW=rows.unseen_T is not None,
        CAPPED=soft_cap is not None,
        SCALES=paged.scales,
        NEED_LSE=into_lse is not None,
        SPLIT=parts > 1,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if parts > 1 and into_lse is not None:
        merge_parts(into, into_lse, out_TND, lse_TN, rows.starts_S1)
