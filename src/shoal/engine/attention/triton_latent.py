"""Attention to the latents of multi-head latent attention, in Triton: one row a token is key and value at once.

All query heads read the same cached rows, whose first C numbers are the latent, the values among them, and whose last E
the rotated key. So a tile of rows is read once, as keys and as values, for up to 64 heads: what bounds it at many heads
is arithmetic, not memory. The rows of a program are heads of one token, whatever else its sequence has in the step:
one kernel for decodes and for chunks of prompts.

Shapes: S sequences, T tokens, N query heads, L = C + E, B blocks of a table, K blocks of the cache, P tokens a block,
R rows of a program, G positions of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.engine.attention.base import AttentionBatch
from shoal.engine.attention.latent_cache import LEAST_SCALE, TOPS, LatentCache
from shoal.engine.attention.triton_decode import merge_parts, num_parts
from shoal.engine.attention.triton_parts import LOG2_E, Tiles, finished, load_rows, update


def latent_tiles(num_heads: int, latent_dim: int, itemsize: int, *, converted: bool) -> Tiles:
    """For the heads of a rank, the size of the latent, and the bytes of an element that is multiplied. `converted`: the
    cache has another dtype.

    64 heads are what Hopper's matrix instructions take; their output of 64 x 512 in float32 fills half the registers
    of 8 warps, and what is converted on the way goes through registers too: then 32, without which a thread spills a
    kilobyte. A tile of rows takes about 32 KiB of shared memory, of which there are two, beside the queries' 72.
    """
    rows = min(32 if converted else 64, max(16, triton.next_power_of_2(num_heads)))
    positions = min(64, max(16, 16384 // (triton.next_power_of_2(latent_dim) * itemsize) * 2))
    return Tiles(rows, positions, num_warps=8 if rows >= 32 else 4, num_stages=2)


@triton.jit
def _latent_tiles(
    q_RC, q_RE, most_R, total_R, out_RC, latents, rotated, scales, table, begin, end, stop, scale,
    PAGE: tl.constexpr, C: tl.constexpr, C_PADDED: tl.constexpr,
    E: tl.constexpr, E_PADDED: tl.constexpr,
    SCALED: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what positions [begin, end) give; unmasked, all of every tile lies before `stop`."""
    dims_C = tl.arange(0, C_PADDED)
    dims_E = tl.arange(0, E_PADDED)
    for start in range(begin, end, TILE):
        at_G = start + tl.arange(0, TILE)
        readable_G = at_G < stop
        if MASKED:
            block_G = tl.load(table + at_G // PAGE, mask=readable_G, other=0).to(tl.int64)
        else:
            block_G = tl.load(table + at_G // PAGE).to(tl.int64)
        row_G = block_G * PAGE + at_G % PAGE
        latent_GC = load_rows(latents, row_G * C, readable_G, dims_C, MASKED, C, C_PADDED).to(q_RC.dtype)
        key_GE = load_rows(rotated, row_G * E, readable_G, dims_E, MASKED, E, E_PADDED).to(q_RC.dtype)
        scores_RG = tl.dot(q_RC, tl.trans(latent_GC), input_precision="tf32x3")
        if SCALED:
            scale_G = tl.load(scales + row_G, mask=readable_G, other=0.0)
            scores_RG *= scale_G[None, :]
        scores_RG = tl.dot(q_RE, tl.trans(key_GE), scores_RG, input_precision="tf32x3") * (scale * LOG2_E)
        if MASKED:
            scores_RG = tl.where(readable_G[None, :], scores_RG, float("-inf"))
        weights_RG, most_R, total_R, out_RC = update(scores_RG, most_R, total_R, out_RC)
        if SCALED:
            weights_RG *= scale_G[None, :]
        out_RC = tl.dot(weights_RG.to(q_RC.dtype), latent_GC, out_RC, input_precision="tf32x3")
    return most_R, total_R, out_RC


@triton.jit
def _sequence_of_token(starts, token, num_sequences):
    """The last sequence that starts at or before it: of several with the same start that is the one with tokens."""
    low = 0
    high = num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) <= token:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(do_not_specialize=["num_sequences", "num_parts", "table_stride"])
def _latent_kernel(
    q,
    out,
    lse,
    latents,
    rotated,
    scales,
    starts,
    seen,
    tables,
    q_stride,
    table_stride,
    num_sequences,
    num_parts,
    scale,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    NEED_LSE: tl.constexpr,
):
    """Grid: (T, heads in groups of ROWS, parts). `out` is (T, parts, N, C), `lse` (T, parts, N)."""
    token = tl.program_id(0)
    part = tl.program_id(2)
    head_R = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live_R = head_R < HEADS
    table = tables + _sequence_of_token(starts, token, num_sequences).to(tl.int64) * table_stride
    dims_C = tl.arange(0, C_PADDED)
    dims_E = tl.arange(0, E_PADDED)
    q_R = token.to(tl.int64) * q_stride + head_R * (C + E)
    q_RC = tl.load(q + q_R[:, None] + dims_C[None, :], mask=live_R[:, None] & (dims_C < C)[None, :], other=0.0)
    q_RE = tl.load(q + q_R[:, None] + C + dims_E[None, :], mask=live_R[:, None] & (dims_E < E)[None, :], other=0.0)

    stop = tl.load(seen + token)
    part_len = tl.cdiv(tl.cdiv(stop, num_parts), TILE) * TILE
    begin = part * part_len
    end = tl.minimum(begin + part_len, stop)
    tail = tl.maximum(begin, end // TILE * TILE)
    most_R = tl.full([ROWS], float("-inf"), tl.float32)
    total_R = tl.zeros([ROWS], tl.float32)
    out_RC = tl.zeros([ROWS, C_PADDED], tl.float32)
    # fmt: off
    most_R, total_R, out_RC = _latent_tiles(
        q_RC, q_RE, most_R, total_R, out_RC, latents, rotated, scales, table, begin, tail, stop, scale,
        PAGE, C, C_PADDED, E, E_PADDED, SCALED, TILE, False,
    )
    most_R, total_R, out_RC = _latent_tiles(
        q_RC, q_RE, most_R, total_R, out_RC, latents, rotated, scales, table, tail, end, stop, scale,
        PAGE, C, C_PADDED, E, E_PADDED, SCALED, TILE, True,
    )
    # fmt: on
    out_RC, lse_R = finished(most_R, total_R, out_RC)
    row = token.to(tl.int64) * num_parts + part
    out_R = (row * HEADS + head_R) * C
    live_RC = live_R[:, None] & (dims_C < C)[None, :]
    tl.store(out + out_R[:, None] + dims_C[None, :], out_RC.to(out.dtype.element_ty), mask=live_RC)
    if NEED_LSE:
        tl.store(lse + row * HEADS + head_R, lse_R, mask=live_R)


@triton.jit
def _latent_write_kernel(
    rows, latents, rotated, scales, slots, row_stride,
    C: tl.constexpr, C_PADDED: tl.constexpr,
    E: tl.constexpr, E_PADDED: tl.constexpr,
    TOP: tl.constexpr, INTEGERS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Grid: (T). TOP 0: as it is, else the greatest number that is stored. A negative slot is not kept."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    dims_C = tl.arange(0, C_PADDED)
    dims_E = tl.arange(0, E_PADDED)
    rows += token * row_stride
    latent_C = tl.load(rows + dims_C, mask=dims_C < C, other=0.0).to(tl.float32)
    if TOP > 0:
        scale = tl.maximum(tl.max(tl.abs(latent_C), axis=0) / TOP, LEAST)
        tl.store(scales + slot, scale)
        latent_C = latent_C / scale
        if INTEGERS:
            latent_C = tl.floor(latent_C + 0.5)
        else:
            latent_C = tl.clamp(latent_C, -TOP, TOP)
    tl.store(latents + slot * C + dims_C, latent_C.to(latents.dtype.element_ty), mask=dims_C < C)
    rotated_E = tl.load(rows + C + dims_E, mask=dims_E < E, other=0.0)
    tl.store(rotated + slot * E + dims_E, rotated_E.to(rotated.dtype.element_ty), mask=dims_E < E)


class TritonLatentAttention:
    """What `LatentAttention` asks of a backend. The cache is its own."""

    name = "triton"
    capturable = True
    serves_latents = True

    def __init__(self, latent_dim: int, processors: int, parts: int | None = None) -> None:
        """`latent_dim` is C. `parts` None: contexts are split as `processors`, those of the device, are used best."""
        self._latent_dim = latent_dim
        self._processors = processors
        self._parts = parts

    def write(
        self, cache: LatentCache, layer: int, rows_T1L: Tensor, values_T1C: Tensor, batch: AttentionBatch
    ) -> None:
        """Cached rows, whose values are part of them."""
        latents, rotated, scales = cache.pages[layer]
        tokens, _, row_dim = rows_T1L.shape
        if row_dim != cache.row_dim or rows_T1L.stride(2) != 1 or batch.slot_mapping_T.shape != (tokens,):
            raise ValueError(f"the cache holds rows of {cache.row_dim}, got {tuple(rows_T1L.shape)}")
        _latent_write_kernel[(tokens,)](
            rows_T1L,
            latents,
            rotated,
            batch.slot_mapping_T if scales is None else scales,
            batch.slot_mapping_T,
            rows_T1L.stride(0),
            **_sizes(latents, rotated),
            TOP=TOPS.get(latents.dtype, 0.0),
            INTEGERS=latents.dtype == torch.int8,
            LEAST=LEAST_SCALE,
            num_warps=4,
        )

    def forward(
        self,
        cache: LatentCache,
        layer: int,
        q_TNL: Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        need_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Output (T, N, C) and, if asked, log-sum-exp (T, N) in float32."""
        tokens, heads, row_dim = q_TNL.shape
        latents, rotated, scales = cache.pages[layer]
        latent_dim = self._latent_dim
        if (latents.shape[2], cache.row_dim) != (latent_dim, row_dim) or q_TNL.stride()[1:] != (row_dim, 1):
            raise ValueError(
                f"the cache holds rows of {cache.row_dim}, latents of {latents.shape[2]} among them; got queries "
                f"{tuple(q_TNL.shape)} with strides {q_TNL.stride()}"
            )
        # Numbers of few bits are widened before they are multiplied.
        itemsize = max(latents.element_size(), q_TNL.element_size())
        tiles = latent_tiles(heads, latent_dim, itemsize, converted=latents.dtype != q_TNL.dtype)
        head_tiles = -(-heads // tiles.rows)
        programs = tokens * head_tiles
        parts = self._parts or num_parts(programs, batch.max_context_len, tiles.positions, self._processors)
        device = q_TNL.device
        out_TNC = torch.empty((tokens, heads, latent_dim), dtype=q_TNL.dtype, device=device)
        lse_TN = torch.empty((tokens, heads), dtype=torch.float32, device=device) if need_lse else None
        into, into_lse = out_TNC, lse_TN
        if parts > 1:
            into = torch.empty((tokens, parts, heads, latent_dim), dtype=torch.float32, device=device)
            into_lse = torch.empty((tokens, parts, heads), dtype=torch.float32, device=device)
        _latent_kernel[(tokens, head_tiles, parts)](
            q_TNL,
            into,
            batch.seen_T if into_lse is None else into_lse,
            latents,
            rotated,
            batch.seen_T if scales is None else scales,
            batch.query_starts_S1,
            batch.seen_T,
            batch.block_tables_SB,
            q_TNL.stride(0),
            batch.block_tables_SB.stride(0),
            len(batch.query_starts_S1) - 1,
            parts,
            scale,
            HEADS=heads,
            PAGE=cache.block_size,
            **_sizes(latents, rotated),
            SCALED=scales is not None,
            ROWS=tiles.rows,
            TILE=tiles.positions,
            NEED_LSE=into_lse is not None,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        if parts > 1 and into_lse is not None:
            merge_parts(into, into_lse, out_TNC, lse_TN, None)
        return out_TNC, lse_TN


def _sizes(latents_KPC: Tensor, rotated_KPE: Tensor) -> dict[str, int]:
    c, e = latents_KPC.shape[2], rotated_KPE.shape[2]
    padded = (max(16, triton.next_power_of_2(size)) for size in (c, e))
    return dict(zip(("C", "E", "C_PADDED", "E_PADDED"), (c, e, *padded), strict=True))
