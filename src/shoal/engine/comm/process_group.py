"""Collectives through torch's process groups: gloo among CPU ranks of several hosts, NCCL among GPUs.

Groups are made without torch's default group, so that several engines live in one process. No GPU has run the NCCL
side.

Over gloo every rank sends straight to every other: gloo's own collectives pass data on around a ring and through a
thread of their own, and say neither in which order they add nor which rank failed.

Shapes: R ranks of the group, X the shape of one tensor.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from shoal.engine.comm.base import (
    CommError,
    require_blocks,
    require_contiguous,
    require_counts,
    require_other,
    require_rank,
)
from shoal.engine.comm.one_shot import Group, OneShotSums, open_sums

c10d: Any = torch.distributed
"""Its type stubs leave out what is not torch.distributed's public face."""
PATIENT = timedelta(days=1)
"""For what may take as long as a pipeline stage computes: receiving."""
_MOST_UNSENT = 8
"""Messages whose buffers are kept while they are on their way."""
_MESSAGES, _COLLECTIVES = 0, 1
"""Tags: a message that nobody has received yet is not taken for a part of a collective."""
_SHARED_BYTES = 32 * 1024
"""Among three ranks and more, longer tensors are added up in shares: two messages to each rank, but fewer bytes."""

Parts = list[tuple[int, Tensor]]
"""Tensors by the rank that they go to or come from."""


def open_group(
    backend: str,
    rank: int,
    size: int,
    store: Any,
    *,
    name: str,
    host: str,
    timeout: float,
    device: torch.device | None = None,
    one_shot_bytes: int | None = 0,
) -> ProcessGroupComm:
    """A Comm over a group of its own: see `make_group`. Sums are in the order of ranks over gloo, NCCL adds in its own.

    With NCCL, sums of up to `one_shot_bytes` on `device` go through memory that all ranks map, where there is such a
    thing (None: as many bytes as suit the number of ranks). Raises CommError.
    """
    group = make_group(backend, rank, size, store, name=name, host=host, timeout=timeout)
    small: OneShotSums | None = None
    if backend == "nccl" and device is not None and one_shot_bytes != 0:
        small = open_sums(Group(group, store, name, rank, size, device), one_shot_bytes)
    return ProcessGroupComm(group, backend, timeout=timeout, deterministic=backend == "gloo", small=small)


def make_group(backend: str, rank: int, size: int, store: Any, *, name: str, host: str, timeout: float) -> Any:
    """A c10d backend, known to nobody but the caller: torch's default group and its registries are left alone.

    It meets the group's other ranks through `store` (a torch.distributed Store), where `name` is its own. `host` is the
    address to listen on. `timeout` is how long a rank waits for another, in seconds, now and in collectives. Raises
    CommError, ValueError for an unknown backend.
    """
    if backend not in ("gloo", "nccl"):
        raise ValueError(f"backend {backend!r} is unknown: gloo, nccl")
    prefixed = c10d.PrefixStore(name, store)
    _meet(prefixed, rank, size, timeout)
    with _as_comm_error(f"rank {rank} of {size} could not join the group"):
        if backend == "gloo":
            options = c10d.ProcessGroupGloo._Options()
            options._devices = [c10d.ProcessGroupGloo.create_device(hostname=host)]
            options._timeout = timedelta(seconds=timeout)
            return c10d.ProcessGroupGloo(prefixed, rank, size, options)
        nccl = c10d.ProcessGroupNCCL.Options()
        nccl._timeout = timedelta(seconds=timeout)
        return c10d.ProcessGroupNCCL(prefixed, rank, size, nccl)


def _meet(store: Any, rank: int, size: int, seconds: float) -> None:
    """The backends do not say who is missing."""
    store.set(f"here/{rank}", "1")
    deadline = time.monotonic() + seconds
    for other in range(size):
        left = timedelta(seconds=max(0.01, deadline - time.monotonic()))
        try:
            store.wait([f"here/{other}"], left)
        except RuntimeError:
            raise CommError(f"rank {other} of {size} did not come within {seconds:g} s") from None


class ProcessGroupComm:
    """A c10d backend (ProcessGroupGloo, ProcessGroupNCCL) as a Comm.

    `deterministic` all-reduces move every rank's values and add them in the order of ranks. Without it the backend
    reduces on the way, in an order of its own and bfloat16 in its own precision; so does `small`, which has the sums
    that it takes.
    """

    def __init__(
        self, group: Any, name: str, *, timeout: float, deterministic: bool = True, small: OneShotSums | None = None
    ) -> None:
        self.name = name
        # Of its collectives: `wait` makes the stream wait, not the host. gloo computes on the host.
        self.capturable = name == "nccl"
        self.rank: int = group.rank()
        self.size: int = group.size()
        self._group = group
        self._timeout = timeout
        self._deterministic = deterministic
        self._small = small
        self._unsent: deque[tuple[str, Any, Tensor]] = deque()
        self._broken: str | None = None

    def all_reduce_(self, x: Tensor) -> Tensor:
        self._accept(x)
        if self.size == 1:
            return x
        if self._small is not None and self._small.takes(x):
            with self._errors("all-reduce"):
                return self._small.all_reduce_(x)
        if not self._deterministic:
            with self._errors("all-reduce"):
                _finish(self._group.allreduce([x], _in_order(c10d.AllreduceOptions())))
            return x
        if self.size == 2 or x.nbytes <= _SHARED_BYTES:
            return x.copy_(_ordered_sum(self.all_gather(x)))
        return self._reduce_by_shares(x)

    def all_gather(self, x: Tensor) -> Tensor:
        self._accept(x)
        out = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        self._exchange([x] * self.size, list(out.unbind(0)), "all-gather")
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        require_blocks(x, self.size)
        ones = [1] * self.size
        return _ordered_sum(self.all_to_all(x, ones, ones))

    def all_to_all(self, x: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        require_counts(x, send_counts, receive_counts, self.rank, self.size)
        self._accept(x)
        out = torch.empty((sum(receive_counts), *x.shape[1:]), dtype=x.dtype, device=x.device)
        self._exchange(list(torch.split(x, send_counts)), list(torch.split(out, receive_counts)), "all-to-all")
        return out

    def broadcast_(self, x: Tensor, source: int) -> Tensor:
        require_rank(source, self.size)
        self._accept(x)
        if self.size == 1:
            return x
        if self.name == "nccl":
            options = _in_order(c10d.BroadcastOptions())
            options.rootRank = source
            with self._errors("broadcast"):
                _finish(self._group.broadcast([x], options))
        elif self.rank == source:
            self._transfer([(r, x) for r in range(self.size) if r != source], [], "broadcast")
        else:
            self._transfer([], [(source, x)], "broadcast")
        return x

    def send(self, x: Tensor, to: int) -> None:
        require_other(to, self.rank, self.size)
        self._accept(x)
        if x.numel() == 0:
            return
        kept = x.clone()  # the backend reads it until it is sent
        what = f"sending to rank {to} of {self.size}"
        with self._errors(what):
            self._unsent.append((what, self._group.send([kept], to, _MESSAGES), kept))
        if len(self._unsent) > _MOST_UNSENT:
            self._finish_oldest(PATIENT)

    def receive_(self, x: Tensor, source: int) -> Tensor:
        require_other(source, self.rank, self.size)
        self._accept(x)
        if x.numel():
            with self._errors(f"receiving from rank {source} of {self.size}"):
                work = self._group.recv([x], source, _MESSAGES)
                # With a timeout NCCL has the host wait for what the device computes before; without, the stream does.
                _ = work.wait() if self.name == "nccl" else work.wait(PATIENT)
        return x

    def close(self) -> None:
        """Waits for what was sent to leave, each message at most the timeout; a receiver that is gone is no error."""
        try:
            while self._unsent and self._broken is None:
                self._finish_oldest(timedelta(seconds=self._timeout))
        except CommError:
            pass
        self._unsent.clear()
        if self._small is not None:
            self._small.close()
        self._group = self._small = None
        self._broken = "this group was closed"

    def _accept(self, x: Tensor) -> None:
        require_contiguous(x)
        self._require_whole()

    def _require_whole(self) -> None:
        if self._broken is not None:
            raise CommError(self._broken)

    # --- how it is carried ------------------------------------------------------------------------------------------

    def _reduce_by_shares(self, x: Tensor) -> Tensor:
        """Each rank adds up one share of x and sends the sum to all."""
        flat = x.view(-1)
        bounds = [flat.numel() * r // self.size for r in range(self.size + 1)]
        shares = [flat[bounds[r] : bounds[r + 1]] for r in range(self.size)]
        own = shares[self.rank]
        parts = torch.empty((self.size, own.numel()), dtype=x.dtype, device=x.device)
        self._exchange(shares, list(parts.unbind(0)), "all-reduce")
        own.copy_(_ordered_sum(parts))
        self._exchange([own] * self.size, shares, "all-reduce")
        return x

    def _exchange(self, outgoing: list[Tensor], incoming: list[Tensor], what: str) -> None:
        """outgoing[r] goes to rank r, incoming[r] comes from it."""
        if self.name == "nccl":
            with self._errors(what):
                _finish(self._group.alltoall(incoming, outgoing, _in_order(c10d.AllToAllOptions())))
            return
        own = self.rank
        if incoming[own].data_ptr() != outgoing[own].data_ptr():
            incoming[own].copy_(outgoing[own])
        # Each begins with its neighbour, so that not all send to rank 0 first.
        others = [(own + distance) % self.size for distance in range(1, self.size)]
        self._transfer([(r, outgoing[r]) for r in others], [(r, incoming[r]) for r in reversed(others)], what)

    def _transfer(self, outgoing: Parts, incoming: Parts, what: str) -> None:
        """All at once over gloo.

        The rank that does not come is the one to blame. Others have sent to this one before they wait for it or fail
        because of it: so all is begun and waited for whatever fails, and a lost connection says more than a timeout,
        which may be for a rank that has given up for the same reason.
        """
        failures: list[CommError] = []
        pending: list[tuple[str, Any]] = []
        plans = [("receiving from", self._group.recv, incoming), ("sending to", self._group.send, outgoing)]
        for direction, begin, parts in plans:
            for rank, part in parts:
                doing = f"{what}, {direction} rank {rank} of {self.size}"
                with _collect(failures, doing):
                    if part.numel():
                        pending.append((doing, begin([part], rank, _COLLECTIVES)))
        deadline = time.monotonic() + self._timeout
        for doing, work in pending:
            with _collect(failures, doing):
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
        if failures:
            worst = min(failures, key=_is_timeout)  # the first, of equals
            self._broken = str(worst)
            raise worst

    def _finish_oldest(self, patience: timedelta) -> None:
        what, work, _ = self._unsent.popleft()
        with self._errors(what):
            work.wait(patience)

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """The first error breaks the group."""
        self._require_whole()
        try:
            with _as_comm_error(what):
                yield
        except CommError as error:
            self._broken = str(error)
            raise


def _in_order(options: Any) -> Any:
    """On the current stream, as any kernel: no other stream, and no events between the two."""
    options.asyncOp = False
    return options


def _finish(work: Any) -> None:
    """What is done in order has no work to wait for, in some versions of torch."""
    if work is not None:
        work.wait()


def _ordered_sum(parts_RX: Tensor) -> Tensor:
    """Over the first axis, in order; bfloat16 is added in float32 and rounded once."""
    wide_RX = parts_RX.float() if parts_RX.dtype == torch.bfloat16 else parts_RX
    total_X = wide_RX[0].clone()
    for part_X in wide_RX[1:]:
        total_X += part_X
    return total_X.to(parts_RX.dtype)


@contextmanager
def _collect(failures: list[CommError], what: str) -> Iterator[None]:
    try:
        with _as_comm_error(what):
            yield
    except CommError as error:
        failures.append(error)


def _is_timeout(error: CommError) -> bool:
    """By gloo's words, which has no type for it; after one timeout it gives up all that was still waited for."""
    return "Timed out" in str(error) or "Application timeout" in str(error)


@contextmanager
def _as_comm_error(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise CommError(f"{what}: {said[0]}") from None
