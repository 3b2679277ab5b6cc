"""Collectives through torch's process groups: gloo among CPU ranks of several hosts, NCCL among GPUs.

Groups are made without torch's default group, so that several engines live in one process. No GPU has run the NCCL
side.

Shapes: R ranks of the group.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.engine.comm.base import CommError

PATIENT = timedelta(days=1)
"""For what may take as long as a pipeline stage computes: receiving."""
_MOST_UNSENT = 8
"""Messages whose buffers are kept while they are on their way."""


def open_group(
    backend: str, rank: int, size: int, store: Any, *, name: str, host: str, timeout: float
) -> ProcessGroupComm:
    """Meets the group's other ranks through `store` (a torch.distributed Store), where `name` is its own.

    `host` is the address to listen on, `timeout` how long a rank waits for another (seconds). Raises CommError.
    """
    c10d: Any = dist  # its type stubs leave out what is not torch.distributed's public face
    prefixed = c10d.PrefixStore(name, store)
    with _as_comm_error("the group did not come together"):
        if backend == "gloo":
            options = c10d.ProcessGroupGloo._Options()
            options._devices = [c10d.ProcessGroupGloo.create_device(hostname=host)]
            options._timeout = timedelta(seconds=timeout)
            group: Any = c10d.ProcessGroupGloo(prefixed, rank, size, options)
        elif backend == "nccl":
            nccl = c10d.ProcessGroupNCCL.Options()
            nccl._timeout = timedelta(seconds=timeout)
            group = c10d.ProcessGroupNCCL(prefixed, rank, size, nccl)
        else:
            raise ValueError(f"backend {backend!r} is unknown: gloo, nccl")
    return ProcessGroupComm(group, backend)


class ProcessGroupComm:
    """A c10d backend (ProcessGroupGloo, ProcessGroupNCCL) as a Comm."""

    def __init__(self, group: Any, name: str) -> None:
        self.name = name
        self._group = group
        self.rank: int = group.rank()
        self.size: int = group.size()
        self._unsent: deque[tuple[Any, Tensor]] = deque()

    def all_reduce_(self, x: Tensor) -> Tensor:
        """gloo adds up in an order of its own: ranks gather and add in theirs. NCCL reduces on the way."""
        if self.name == "gloo":
            return x.copy_(self._ordered_sum(self.all_gather(x)))
        with _as_comm_error("all-reduce"):
            self._group.allreduce([x]).wait()
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        _require_contiguous(x)
        out = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        with _as_comm_error("all-gather"):
            self._group.allgather([list(out.unbind(0))], [x]).wait()
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows != self.size:
            raise ValueError(f"reduce_scatter takes a tensor for each of {self.size} ranks, got shape {tuple(x.shape)}")
        ones = [1] * self.size
        return self._ordered_sum(self.all_to_all(x, ones, ones))

    def all_to_all(self, x: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        _require_contiguous(x)
        if len(send_counts) != self.size or len(receive_counts) != self.size or sum(send_counts) != x.shape[0]:
            raise ValueError(
                f"counts {send_counts} and {receive_counts} do not fit {len(x)} rows and {self.size} ranks"
            )
        out = torch.empty((sum(receive_counts), *x.shape[1:]), dtype=x.dtype, device=x.device)
        with _as_comm_error("all-to-all"):
            self._group.alltoall_base(out, x, receive_counts, send_counts).wait()
        return out

    def broadcast_(self, x: Tensor, source: int) -> Tensor:
        _require_contiguous(x)
        with _as_comm_error("broadcast"):
            options = dist.BroadcastOptions()
            options.rootRank = source
            self._group.broadcast([x], options).wait()
        return x

    def send(self, x: Tensor, to: int) -> None:
        _require_contiguous(x)
        kept = x.clone()  # the backend reads it until it is sent
        with _as_comm_error(f"sending to rank {to}"):
            self._unsent.append((self._group.send([kept], to, 0), kept))
            while len(self._unsent) > _MOST_UNSENT:
                self._unsent.popleft()[0].wait(PATIENT)

    def receive_(self, x: Tensor, source: int) -> Tensor:
        _require_contiguous(x)
        with _as_comm_error(f"receiving from rank {source}"):
            self._group.recv([x], source, 0).wait(PATIENT)
        return x

    def close(self) -> None:
        self._unsent.clear()
        self._group = None

    def _ordered_sum(self, parts: Tensor) -> Tensor:
        """bfloat16 is added in float32 and rounded once."""
        wide = parts.float() if parts.dtype == torch.bfloat16 else parts
        total = wide[0].clone()
        for part in wide[1:]:
            total += part
        return total.to(parts.dtype)


@contextmanager
def _as_comm_error(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise CommError(f"{what}: {str(error).splitlines()[0]}") from None


def _require_contiguous(x: Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(f"collectives take contiguous tensors, got strides {x.stride()}")
