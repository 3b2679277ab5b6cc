"""Collectives among the ranks of one group: what the layers are handed, and the group of one.

Shapes: R ranks of the group.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class CommError(RuntimeError):
    """A rank did not come in time, is gone, or the group was aborted. The message names it (its rank in the group):
    the one that was lost, or one that gave up just before, whose own message then says why.

    The group is broken from then on: every later call fails at once, with the same message.
    """


class Comm(Protocol):
    """Every rank of the group calls the same methods in the same order with tensors of the same shape and dtype.

    Tensors are contiguous (else ValueError), of float32, bfloat16, int32 or int64; so are results. bfloat16 is added in
    float32 and rounded once. A Comm belongs to one thread.
    """

    name: str
    rank: int
    """Of the group."""
    size: int
    capturable: bool
    """Collectives only enqueue work on the device's current stream, so that a CUDA graph can hold them: on all ranks or
    on none (`engine/graphs.py`). `send` and `receive_` are not captured."""

    def all_reduce_(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place. Ranks are added in order 0, 1, ...: every rank gets the same bits."""

    def all_gather(self, x: Tensor) -> Tensor:
        """(R, *x.shape)."""

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Of x (R, *rest) the sum over ranks, in order, of their x[self.rank]; shape (*rest)."""

    def all_to_all(self, x: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        """Rows of x, `send_counts[r]` of them for rank r in order; returns those received, in order of their ranks.

        `receive_counts[r]` is what rank r sends to this one.
        """

    def broadcast_(self, x: Tensor, source: int) -> Tensor:
        """x of rank `source`, in place."""

    def send(self, x: Tensor, to: int) -> None:
        """Returns when x may be reused, without waiting for the receiver unless its queue is full.

        Sending and receiving wait as long as the other rank lives: it may be computing a pipeline's whole stage.
        """

    def receive_(self, x: Tensor, source: int) -> Tensor:
        """The next tensor that `source` sent to this rank, in place."""

    def close(self) -> None:
        """The group is not used afterwards. What was sent still arrives."""


def require_contiguous(x: Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(f"collectives take contiguous tensors, got strides {x.stride()}")


def require_blocks(x: Tensor, size: int) -> None:
    """What reduce_scatter takes."""
    if x.dim() == 0 or x.shape[0] != size:
        raise ValueError(f"reduce_scatter takes a tensor for each of {size} ranks, got shape {tuple(x.shape)}")


def require_counts(x: Tensor, send_counts: list[int], receive_counts: list[int], rank: int, size: int) -> None:
    """What all_to_all takes."""
    rows = x.shape[0] if x.dim() else 0
    fits = len(send_counts) == size and len(receive_counts) == size and sum(send_counts) == rows
    if not fits or min(send_counts + receive_counts) < 0 or send_counts[rank] != receive_counts[rank]:
        raise ValueError(f"counts {send_counts} and {receive_counts} do not fit {rows} rows and rank {rank} of {size}")


def require_rank(rank: int, size: int) -> None:
    if not 0 <= rank < size:
        raise ValueError(f"there is no rank {rank} among {size}")


def require_other(rank: int, own: int, size: int) -> None:
    if not 0 <= rank < size or rank == own:
        raise ValueError(f"rank {rank} is not another one of {size}")


class NullComm:
    """A group of one: every operation is done already."""

    name = "null"
    rank = 0
    size = 1
    capturable = True

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
