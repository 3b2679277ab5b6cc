"""Paged attention of several queries a sequence, in Triton: chunks of prompts behind what is cached of them.

A program computes some neighbouring queries of one sequence for all query heads that share a key/value head: those
rows read the same keys, so a tile of keys is read once for all of them. Which sequence a program belongs to it finds
by itself, from the query starts on the device: the grid depends only on sizes that the host knows, and nothing waits.

Shapes: S sequences, T tokens, N query heads, M key/value heads, D head size, B blocks of a table, K blocks of the
cache, P tokens a block, R rows of a program, L positions of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from shoal.engine.attention.triton_parts import Paged, Rows, Tiles, attend, finished


def prefill_tiles(head_dim: int, itemsize: int, rows_wanted: int) -> Tiles:
    """For a head size, the bytes of an element of queries or cache, the larger, and the rows of the longest chunk.

    128 rows give two warp groups of Hopper their 64 each. Tiles of 64 keys of 128 are the largest with which quantised
    ones do not spill registers, and stages of 32 KiB fit in shared memory three times.
    """
    padded = triton.next_power_of_2(head_dim)
    # float32 takes three products and twice the memory: for tests and small models, so it need only fit.
    most = 128 if itemsize <= 2 else 64 if padded <= 128 else 32
    rows = min(most, max(16, triton.next_power_of_2(rows_wanted)))
    positions = min(64, max(16, 16384 // (padded * max(2, itemsize))))
    return Tiles(
        rows, positions, num_warps=8 if rows == 128 else 4, num_stages=2 if padded > 128 or itemsize > 2 else 3
    )


@triton.jit
def sequence_of_tile(starts, tile, num_sequences, QUERIES: tl.constexpr):
    """The sequence whose tiles hold this one, where sequence i has those from starts[i] // QUERIES + i on.

    Those are enough for it: floor(a + b) >= floor(a) + floor(b), and one more for the rest.
    """
    low = 0
    high = num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) // QUERIES + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(do_not_specialize=["num_sequences", "table_stride"])
def _prefill_kernel(
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
    num_sequences,
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
):
    """Grid: (T // QUERIES + S, M). Sequences of one query are left to the decode kernel."""
    QUERIES: tl.constexpr = ROWS // GROUP
    # The last queries of a long chunk see most: those that take longest go first, and none of them runs alone at last.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = sequence_of_tile(starts, tile, num_sequences, QUERIES)
    first_token = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - first_token
    first_query = (tile - first_token // QUERIES - sequence) * QUERIES
    if first_query >= count or count == 1:
        return
    rows_R = tl.arange(0, ROWS)
    query_R = first_query + rows_R // GROUP
    head_R = kv_head * GROUP + rows_R % GROUP - SKIPPED
    live_R = (rows_R < QUERIES * GROUP) & (query_R < count) & (head_R >= 0) & (head_R < HEADS)
    token_R = (first_token + query_R).to(tl.int64)
    dims_D = tl.arange(0, D_PADDED)
    live_RD = live_R[:, None] & (dims_D < D)[None, :]
    q_RD = tl.load(q + (token_R * q_stride + head_R * D)[:, None] + dims_D[None, :], mask=live_RD, other=0.0)

    earliest = first_token + first_query
    latest = first_token + tl.minimum(first_query + QUERIES, count) - 1
    seen_R = tl.load(seen + token_R, mask=live_R, other=0)
    full_stop = tl.load(seen + earliest)
    stop = tl.load(seen + latest)
    unseen_R = tl.zeros([ROWS], tl.int32)
    first = 0
    full_first = 0
    if WINDOW:
        unseen_R = tl.load(unseen + token_R, mask=live_R, other=0)
        first = tl.load(unseen + earliest)
        full_first = tl.load(unseen + latest)
    # fmt: off
    most_R, total_R, out_RD = attend(
        q_RD, keys, values, key_scales, value_scales, tables + sequence.to(tl.int64) * table_stride, kv_head,
        first // TILE * TILE, stop, first, full_first, full_stop, seen_R, unseen_R, scale, soft_cap,
        ROWS, KV_HEADS, PAGE, D, D_PADDED, TILE, WINDOW, CAPPED, SCALES,
    )
    # fmt: on
    out_RD, lse_R = finished(most_R, total_R, out_RD)
    tl.store(
        out + (token_R * HEADS + head_R)[:, None] * D + dims_D[None, :], out_RD.to(out.dtype.element_ty), mask=live_RD
    )
    if NEED_LSE:
        tl.store(lse + token_R * HEADS + head_R, lse_R, mask=live_R)


def attend_prefill(
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
    tiles: Tiles,
) -> None:
    """Fill the rows of `out_TND`, and of `lse_TN` if it is given, of all sequences of several queries."""
    num_tokens, heads, head_dim = q_TND.shape
    _, kv_heads, page, _ = paged.keys_KMPD.shape
    sequences = len(rows.starts_S1) - 1
    # Never fewer rows than heads that share: a program has at least one query.
    num_rows = max(tiles.rows, triton.next_power_of_2(group))
    grid = (num_tokens // (num_rows // group) + sequences, kv_heads)
    anything = rows.seen_T  # in the place of pointers that are not followed
    _prefill_kernel[grid](
        q_TND,
        out_TND,
        anything if lse_TN is None else lse_TN,
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
        sequences,
        scale,
        soft_cap or 0.0,
        HEADS=heads,
        KV_HEADS=kv_heads,
        GROUP=group,
        SKIPPED=skipped,
        PAGE=page,
        D=head_dim,
        D_PADDED=max(16, triton.next_power_of_2(head_dim)),
        ROWS=num_rows,
        TILE=tiles.positions,
        WINDOW=rows.unseen_T is not None,
        CAPPED=soft_cap is not None,
        SCALES=paged.scales,
        NEED_LSE=lse_TN is not None,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
