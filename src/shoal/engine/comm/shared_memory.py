"""Collectives among CPU ranks of one host, over shared memory: see native/comm.h.

On one host a message through gloo costs a system call and a wake-up on each side, some milliseconds where cores are
few; here it is a copy.

Shapes: R ranks of the group.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shoal.engine.comm.base import (
    CommError,
    require_blocks,
    require_contiguous,
    require_counts,
    require_other,
    require_rank,
)
from shoal.engine.native import load_library, unavailable_reason, variants

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int32: 2, torch.int64: 3}
_AGAIN, _LATE, _GONE, _DIFFERS = 1, 2, 3, 4
"""The kind of a status, its bits from the 16th, as in comm_file.h; the two bytes below are ranks."""
_ERROR_CHARACTERS = 200
MOST_RANKS = 64


class SharedMemoryComm:
    """A group over the file at `path`, which whoever starts the ranks, or one of them, has made with `create`.

    The file may be removed once every rank has attached. `timeout` is how long a rank waits for another in a
    collective, in seconds; the time that it was itself stopped does not count. A rank whose process ends is noticed at
    once, also by those that receive from it.

    Raises RuntimeError without native kernels, CommError for a file that is not a group's of this size and version, or
    where another process is this rank.
    """

    name = "shared memory"
    capturable = False

    def __init__(self, path: str, rank: int, size: int, *, timeout: float = 5.0) -> None:
        require_rank(rank, size)
        self._library = _library()
        self.rank = rank
        self.size = size
        self._timeout = timeout
        error = ctypes.create_string_buffer(_ERROR_CHARACTERS)
        attach = self._library.shoal_comm_attach
        self._comm: int | None = attach(os.fsencode(path), rank, size, timeout, error, len(error))
        if self._comm is None:
            raise CommError(f"{path}: {error.value.decode()}")

    @staticmethod
    def create(path: str, size: int, buffer_bytes: int) -> None:
        """The group's file, for this user alone; it must not exist. `buffer_bytes` is what a rank can post at once.

        A rank takes one and a half times that of memory, its queues to other ranks included. Raises CommError where
        the file cannot be made.
        """
        if not 1 <= size <= MOST_RANKS:
            raise ValueError(f"a group has 1 to {MOST_RANKS} ranks, got {size}")
        error = _library().shoal_comm_create(os.fsencode(path), size, buffer_bytes)
        if error:
            raise CommError(f"{path}: {os.strerror(error)}")

    def all_reduce_(self, x: Tensor) -> Tensor:
        address, dtype = _address(x), _dtype(x)
        if self.size > 1:
            self._check(self._library.shoal_comm_all_reduce(self._open(), address, x.numel(), dtype))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        address = _address(x)
        out = torch.empty((self.size, *x.shape), dtype=x.dtype)
        self._check(self._library.shoal_comm_all_gather(self._open(), address, x.nbytes, out.data_ptr()))
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        require_blocks(x, self.size)
        address, dtype = _address(x), _dtype(x)
        out = torch.empty(x.shape[1:], dtype=x.dtype)
        count, target = out.numel(), out.data_ptr()
        self._check(self._library.shoal_comm_reduce_scatter(self._open(), address, count, dtype, target))
        return out

    def all_to_all(self, x: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        require_counts(x, send_counts, receive_counts, self.rank, self.size)
        address = _address(x)
        out = torch.empty((sum(receive_counts), *x.shape[1:]), dtype=x.dtype)
        row_bytes = math.prod(x.shape[1:]) * x.element_size()
        sent, received = self._bytes(send_counts, row_bytes), self._bytes(receive_counts, row_bytes)
        self._check(self._library.shoal_comm_all_to_all(self._open(), address, sent, out.data_ptr(), received))
        return out

    def broadcast_(self, x: Tensor, source: int) -> Tensor:
        require_rank(source, self.size)
        address = _address(x)
        if self.size > 1:
            self._check(self._library.shoal_comm_broadcast(self._open(), address, x.nbytes, source))
        return x

    def send(self, x: Tensor, to: int) -> None:
        require_other(to, self.rank, self.size)
        self._patiently(self._library.shoal_comm_send, x, to)

    def receive_(self, x: Tensor, source: int) -> Tensor:
        require_other(source, self.rank, self.size)
        self._patiently(self._library.shoal_comm_receive, x, source)
        return x

    def abort(self) -> None:
        """Every rank that waits, or will, gets a CommError. From any thread, while the group is open."""
        if self._comm is not None:
            self._library.shoal_comm_abort(self._comm)

    def close(self) -> None:
        comm, self._comm = self._comm, None
        if comm is not None:
            self._library.shoal_comm_close(comm)

    def _open(self) -> int:
        if self._comm is None:
            raise CommError("this group was closed")
        return self._comm

    def _bytes(self, counts: list[int], row_bytes: int) -> Any:
        return (ctypes.c_int64 * self.size)(*(count * row_bytes for count in counts))

    def _patiently(self, call: Callable[..., int], x: Tensor, other: int) -> None:
        """Native code waits a fraction of a second at a time, so that Python attends to signals."""
        address = _address(x)
        try:
            while (status := call(self._open(), address, x.nbytes, other)) >> 16 == _AGAIN:
                pass
        except BaseException:
            self.abort()  # what was moved of this message must not be taken for a part of the next
            raise
        self._check(status)

    def _check(self, status: int) -> None:
        if status == 0:
            return
        kind, rank, other = status >> 16, status >> 8 & 255, status & 255
        if kind == _LATE:
            raise CommError(f"rank {rank} of {self.size} did not come within {self._timeout:g} s")
        if kind == _GONE:
            raise CommError(f"rank {rank} of {self.size} is gone")
        if kind == _DIFFERS:
            raise CommError(
                f"ranks {rank} and {other} of {self.size} called different operations, or with tensors of other sizes"
            )
        raise CommError(f"the group of {self.size} ranks was aborted")


def abort(path: str) -> None:
    """From outside of the group at `path`: every rank of it that waits, or will, gets a CommError.

    Raises RuntimeError without native kernels, CommError for a file that is no group's.
    """
    error = ctypes.create_string_buffer(_ERROR_CHARACTERS)
    if _library().shoal_comm_abort_path(os.fsencode(path), error, len(error)):
        raise CommError(f"{path}: {error.value.decode()}")


def _library() -> Any:
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(reason)
    return load_library(variants()[0])


def _address(x: Tensor) -> int:
    require_contiguous(x)
    if x.device.type != "cpu":
        raise ValueError(f"shared memory moves CPU tensors, got one on {x.device}")
    return x.data_ptr()


def _dtype(x: Tensor) -> int:
    if x.dtype not in _DTYPES:
        raise ValueError(f"sums are of float32, bfloat16, int32 or int64, not {x.dtype}")
    return _DTYPES[x.dtype]
