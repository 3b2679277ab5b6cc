"""Which of a step's tokens a rank has between attentions: all of them, or its share.

Ranks that hold parts of the same layers each contribute to all tokens, in attention and in MLPs, and the sum over the
ranks is the result. Replicated, every rank gets all of that sum and computes residual stream and norms for all tokens.
Split, it gets the sum of its own tokens, and all tokens are gathered before the next attention (sequence parallelism,
Korthikanti et al., arXiv 2205.05198): a reduce-scatter and an all-gather move what one all-reduce does, and what lies
between them is done once. Ranks are added in the same order, so both give the same bits.

Shapes: T tokens of the step, O own tokens of this rank, P tokens of a share with its padding, R ranks, H hidden.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor

from shoal.core.config import ExpertDispatchKind
from shoal.engine.comm.base import Comm


class TokenSplit(Protocol):
    def begin(self, num_tokens: int) -> int:
        """A step of so many tokens begins; how many of them are this rank's own."""

    def sum(self, part_TH: Tensor) -> Tensor:
        """Of what every rank contributes to all tokens, the sum for this rank's own: (O, H). May write to `part_TH`."""

    def gather(self, x_OH: Tensor) -> Tensor:
        """All tokens, (T, H), of which each rank has its own."""


class Replicated:
    """Every token is every rank's own."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm

    def begin(self, num_tokens: int) -> int:
        return num_tokens

    def sum(self, part_TH: Tensor) -> Tensor:
        return self._comm.all_reduce_(part_TH)

    def gather(self, x_OH: Tensor) -> Tensor:
        return x_OH


class Split:
    """Equal shares in the ranks' order. Padding is only sent: no rank computes anything for it."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._num_tokens = self._share = self._num_own = 0

    def begin(self, num_tokens: int) -> int:
        self._num_tokens = num_tokens
        self._share = -(-num_tokens // self._comm.size)
        self._num_own = max(0, min(self._share, num_tokens - self._comm.rank * self._share))
        return self._num_own

    def sum(self, part_TH: Tensor) -> Tensor:
        part_RPH = _padded(part_TH, self._share * self._comm.size).view(self._comm.size, self._share, -1)
        return self._comm.reduce_scatter(part_RPH)[: self._num_own]

    def gather(self, x_OH: Tensor) -> Tensor:
        return self._comm.all_gather(_padded(x_OH, self._share)).flatten(0, 1)[: self._num_tokens]


def _padded(x_TH: Tensor, num_tokens: int) -> Tensor:
    missing = num_tokens - len(x_TH)
    return F.pad(x_TH, (0, 0, 0, missing)) if missing else x_TH


def token_split(dispatch: ExpertDispatchKind, comm: Comm) -> TokenSplit:
    """`comm` joins the ranks that hold parts of the same layers."""
    return Replicated(comm) if dispatch == "replicate" else Split(comm)
