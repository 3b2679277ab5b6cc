"""Collectives among the ranks of one group: what the layers are handed, and the group of one.

Shapes: R ranks of the group.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class CommError(RuntimeError):
    """A rank did not come in time, is gone, or the group was aborted. The message names ranks (of the group)."""


class Comm(Protocol):
    """Every rank of the group calls the same methods in the same order with tensors of the same shape and dtype.

    Tensors are contiguous (else ValueError). float32, bfloat16, int32 and int64.
    """

    name: str
    rank: int
    """Of the group."""
    size: int

    def all_reduce_(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place. Ranks are added in order 0, 1, ...: every rank gets the same bits."""

    def all_gather(self, x: Tensor) -> Tensor:
        """(R, *x.shape)."""

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Of x (R, *rest) the sum over ranks, in order, of their x[self.rank]; shape (*rest)."""

    def all_to_all(self, x: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        """Rows of x, `send_counts[r]` of them for rank r in order; returns those received, in order of their ranks."""

    def broadcast_(self, x: Tensor, source: int) -> Tensor:
        """x of rank `source`, in place."""

    def send(self, x: Tensor, to: int) -> None:
        """Returns when x may be reused, without waiting for the receiver unless its queue is full."""

    def receive_(self, x: Tensor, source: int) -> Tensor:
        """The next tensor that `source` sent to this rank, in place."""

    def close(self) -> None:
        """The group is not used afterwards."""


class NullComm:
    """A group of one: every operation is done already."""

    name = "null"
    rank = 0
    size = 1

    def all_reduce_(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x[None]

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return x[0]

    def all_to_all(self, x: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        return x

    def broadcast_(self, x: Tensor, source: int) -> Tensor:
        return x

    def send(self, x: Tensor, to: int) -> None:
        raise ValueError("a group of one has nobody to send to")

    def receive_(self, x: Tensor, source: int) -> Tensor:
        raise ValueError("a group of one has nobody to receive from")

    def close(self) -> None:
        """Nothing to give back."""
