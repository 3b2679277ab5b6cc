"""Context parallelism: the KV of every sequence spread over ranks, and the work of every step too.

A block of the scheduler is a block of KV on every rank: of `size` x `block_size` tokens rank r keeps the r-th
`block_size`. So the scheduler need not know, block tables are the same on all ranks, and a rank's own tokens of a
sequence lie side by side in its blocks.

Outside of attention each rank has an equal share of the step's tokens, whoever keeps them. For attention the ranks
exchange queries, keys and values of all shares; each attends, for all tokens, to what it keeps; every token's parts
go to the rank whose share it is in, which merges them by their log-sum-exp (as between the splits of flash decoding,
arXiv 2307.08691). Queries move rather than the KV of the whole context (arXiv 2411.01783 calls it pass-Q), so what is
sent grows with the step's tokens alone.

Shapes: T tokens of the step, P of a share, N query heads, D head size, X features, R ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from shoal.engine.comm.base import Comm

IntArray = NDArray[np.int64]


class KeptTokens:
    """Which tokens of every sequence one rank keeps; of a group of one, all."""

    def __init__(self, block_size: int, context: Comm) -> None:
        self.block_size = block_size
        self.rank = context.rank
        self.size = context.size

    def count(self, num_tokens: IntArray) -> IntArray:
        """How many of a sequence's first `num_tokens`."""
        whole, rest = np.divmod(num_tokens, self.block_size * self.size)
        own = np.clip(rest - self.rank * self.block_size, 0, self.block_size)
        return np.asarray(whole * self.block_size + own, dtype=np.int64)

    def has(self, positions: IntArray) -> NDArray[np.bool_]:
        return np.asarray(positions // self.block_size % self.size == self.rank)


class TokenShares:
    """The shares of one step's tokens: rank r has the r-th, in order; what the last ones lack is padded."""

    def __init__(self, num_tokens: int, context: Comm) -> None:
        self._num_tokens = num_tokens
        self._context = context
        self.size = -(-num_tokens // context.size)
        """P"""

    def own(self, x_T: Tensor) -> Tensor:
        """This rank's share of what is known of all tokens, along the first dimension; the padding is zeros."""
        if self._context.size == 1:
            return x_T
        start = self._context.rank * self.size
        share = x_T[start : start + self.size]
        return pad(share, [0, 0] * (share.dim() - 1) + [0, self.size - len(share)])

    def all(self, x_PX: Tensor) -> Tensor:
        """(T, X): every rank's share."""
        if self._context.size == 1:
            return x_PX
        return self._context.all_gather(x_PX.contiguous()).flatten(0, 1)[: self._num_tokens]

    def merge(self, out_TND: Tensor, lse_TN: Tensor | None) -> Tensor:
        """(P, N, D): attention of this rank's share to everything, from each rank's attention of all tokens to a part.

        Parts are added in the ranks' order.
        """
        size = self._context.size
        if size == 1 or lse_TN is None:
            return out_TND
        part = torch.cat([out_TND.float(), lse_TN[:, :, None]], dim=2)
        part = pad(part, [0, 0, 0, 0, 0, size * self.size - len(part)])
        counts = [self.size] * size
        parts = self._context.all_to_all(part, counts, counts).view(size, self.size, *part.shape[1:])
        weights_RPN1 = torch.softmax(parts[..., -1:], dim=0)
        merged_PND = parts[0, ..., :-1] * weights_RPN1[0]
        for rank in range(1, size):
            merged_PND += parts[rank, ..., :-1] * weights_RPN1[rank]
        return merged_PND.to(out_TND.dtype)
