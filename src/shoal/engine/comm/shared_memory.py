"""Collectives among CPU ranks of one host, over shared memory: see native/comm.h.

On one host a message through gloo costs a system call and a wake-up on each side, some milliseconds where cores are
few; here it is a copy.

Shapes: R ranks of the group.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from shoal.engine.comm.base import CommError
from shoal.engine.native import load_library, unavailable_reason, variants

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int32: 2, torch.int64: 3}
_ABORTED = -1
MOST_RANKS = 64


class SharedMemoryComm:
    """A group over the file at `path`, which one of its ranks has made with `create`.

    `timeout` is how long a rank waits for another, in seconds; receiving waits as long as it takes. Raises RuntimeError
    without native kernels, CommError for a file that is not a group's of this size.
    """

    name = "shared memory"

    def __init__(self, path: str, rank: int, size: int, *, timeout: float = 5.0) -> None:
        self._library = _library()
        self._path = path
        self.rank = rank
        self.size = size
        self._comm: int | None = self._library.shoal_comm_attach(os.fsencode(path), rank, size, timeout)
        if self._comm is None:
            raise CommError(f"{path} is not the shared memory of a group of {size} ranks")
        self._timeout = timeout

    @staticmethod
    def create(path: str, size: int, buffer_bytes: int) -> None:
        """The group's file, for this user alone; it must not exist. `buffer_bytes` is what a rank can post at once."""
        if not 1 <= size <= MOST_RANKS:
            raise ValueError(f"a group has 1 to {MOST_RANKS} ranks, got {size}")
        error = _library().shoal_comm_create(os.fsencode(path), size, max(4096, buffer_bytes // 2 // 64 * 64))
        if error:
            raise CommError(f"{path}: {os.strerror(error)}")

    def all_reduce_(self, x: Tensor) -> Tensor:
        if self.size > 1:
            self._check(self._library.shoal_comm_all_reduce(self._open(), _address(x), x.numel(), _dtype(x)))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        out = torch.empty((self.size, *x.shape), dtype=x.dtype)
        self._check(self._library.shoal_comm_all_gather(self._open(), _address(x), x.nbytes, out.data_ptr()))
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        if x.shape[0] != self.size:
            raise ValueError(f"reduce_scatter takes a tensor for each of {self.size} ranks, got shape {tuple(x.shape)}")
        out = torch.empty(x.shape[1:], dtype=x.dtype)
        self._check(
            self._library.shoal_comm_reduce_scatter(self._open(), _address(x), out.numel(), _dtype(x), out.data_ptr())
        )
        return out

    def all_to_all(self, x: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        if len(send_counts) != self.size or len(receive_counts) != self.size or sum(send_counts) != x.shape[0]:
            raise ValueError(
                f"counts {send_counts} and {receive_counts} do not fit {len(x)} rows and {self.size} ranks"
            )
        out = torch.empty((sum(receive_counts), *x.shape[1:]), dtype=x.dtype)
        row = x[0].nbytes if x.shape[0] else out[0].nbytes if out.shape[0] else 0
        sends, receives = _starts(send_counts), _starts(receive_counts)
        source, target = _address(x), out.data_ptr()
        own = self.rank
        out[receives[own] : receives[own + 1]] = x[sends[own] : sends[own + 1]]
        for distance in range(1, self.size):
            to, origin = (own + distance) % self.size, (own - distance) % self.size
            self._check(
                self._library.shoal_comm_exchange(
                    self._open(),
                    source + sends[to] * row,
                    send_counts[to] * row,
                    to,
                    target + receives[origin] * row,
                    receive_counts[origin] * row,
                    origin,
                )
            )
        return out

    def broadcast_(self, x: Tensor, source: int) -> Tensor:
        if self.size > 1:
            self._check(self._library.shoal_comm_broadcast(self._open(), _address(x), x.nbytes, source))
        return x

    def send(self, x: Tensor, to: int) -> None:
        self._require_other(to)
        self._check(self._library.shoal_comm_send(self._open(), _address(x), x.nbytes, to))

    def receive_(self, x: Tensor, source: int) -> Tensor:
        self._require_other(source)
        self._check(self._library.shoal_comm_receive(self._open(), _address(x), x.nbytes, source))
        return x

    def abort(self) -> None:
        """Every rank that waits, or will, gets a CommError."""
        self._library.shoal_comm_abort(self._open())

    def close(self) -> None:
        comm, self._comm = self._comm, None
        if comm is not None:
            self._library.shoal_comm_close(comm)

    def _open(self) -> int:
        if self._comm is None:
            raise CommError("this group was closed")
        return self._comm

    def _require_other(self, rank: int) -> None:
        if not 0 <= rank < self.size or rank == self.rank:
            raise ValueError(f"rank {rank} is not another one of {self.size}")

    def _check(self, status: int) -> None:
        if status == _ABORTED:
            raise CommError("the group was given up: a rank did not come in time, or was lost")
        if status:
            raise CommError(f"rank {status - 1} of {self.size} did not come within {self._timeout:g} s")


def _library() -> Any:
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(reason)
    return load_library(variants()[0])


def _address(x: Tensor) -> int:
    if not x.is_contiguous() or x.device.type != "cpu":
        raise ValueError(f"collectives take contiguous CPU tensors, got strides {x.stride()} on {x.device}")
    return x.data_ptr()


def _dtype(x: Tensor) -> int:
    if x.dtype not in _DTYPES:
        raise ValueError(f"sums are of float32, bfloat16, int32 or int64, not {x.dtype}")
    return _DTYPES[x.dtype]


def _starts(counts: list[int]) -> list[int]:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts
