"""Context parallelism: the KV of every sequence spread over ranks, attention merged by log-sum-exp.

A block of the scheduler is a block of KV on every rank: of `size` x `block_size` tokens rank r keeps the r-th
`block_size`. So the scheduler need not know, block tables are the same on all ranks, and a rank's own tokens of a
sequence lie side by side in its blocks. Each rank attends to what it keeps; the softmax over everything follows from
the parts and their log-sum-exp (as between the splits of flash decoding, arXiv 2307.08691).

Shapes: T tokens of the step, N query heads, D head size, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.engine.attention.base import AttentionBatch
from shoal.engine.comm.base import Comm

IntArray = NDArray[np.int64]


def kept_tokens(num_tokens: IntArray, block_size: int, rank: int, size: int) -> IntArray:
    """How many of a sequence's first `num_tokens` the rank keeps."""
    whole, rest = np.divmod(num_tokens, block_size * size)
    return np.asarray(whole * block_size + np.clip(rest - rank * block_size, 0, block_size), dtype=np.int64)


def local_batch(
    blocks_T: Callable[[IntArray], NDArray[np.int32]],
    tables: Callable[[int], NDArray[np.int32]],
    positions_T: IntArray,
    block_size: int,
    context: Comm,
    to_device: Callable[[NDArray[np.int32] | IntArray], Tensor],
) -> AttentionBatch:
    """What this rank attends to and keeps of a step whose tokens stand at `positions_T`.

    `blocks_T` gives the block of each token from its index in its sequence's table, `tables` the table of each token's
    sequence up to so many blocks. Every token is a sequence of its own here: how much of a prompt's chunk it sees of
    what this rank keeps follows no simple rule.
    """
    rank, size = context.rank, context.size
    span = block_size * size
    seen_T = kept_tokens(positions_T + 1, block_size, rank, size)
    at_T = positions_T % span
    keeps_T = at_T // block_size == rank
    slots_T = blocks_T(positions_T // span) * block_size + at_T % block_size
    longest = max(1, int(seen_T.max()))
    return AttentionBatch(
        query_starts_S1=to_device(np.arange(len(positions_T) + 1, dtype=np.int32)),
        # Who sees nothing here looks at one token of its first block, and its result is thrown away.
        context_lens_S=to_device(np.maximum(seen_T, 1).astype(np.int32)),
        block_tables_SB=to_device(tables(-(-longest // block_size))),
        slot_mapping_T=to_device(slots_T[keeps_T].astype(np.int32)),
        max_query_len=1,
        max_context_len=longest,
        kept_T=to_device(np.flatnonzero(keeps_T)),
        blind_T=to_device(np.flatnonzero(seen_T == 0)),
    )


def merge(out_TND: Tensor, lse_TN: Tensor, batch: AttentionBatch, context: Comm) -> Tensor:
    """Attention over what all ranks keep, from this rank's part and its log-sum-exp. In the ranks' order on each."""
    if batch.blind_T is not None and len(batch.blind_T):
        out_TND[batch.blind_T] = 0.0  # whatever was there, even NaN
        lse_TN[batch.blind_T] = float("-inf")
    lse_RTN = context.all_gather(lse_TN.contiguous())
    out_RTND = context.all_gather(out_TND.float().contiguous())
    weights_RTN = torch.softmax(lse_RTN, dim=0)
    merged_TND = out_RTND[0] * weights_RTN[0, :, :, None]
    for part_TND, weights_TN in zip(out_RTND[1:], weights_RTN[1:], strict=True):
        merged_TND += part_TND * weights_TN[:, :, None]
    return merged_TND.to(out_TND.dtype)
