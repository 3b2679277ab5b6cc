"""Small sums among GPUs of one host in one kernel: each rank reads what all have, from memory that all of them map.

For the messages of a decode step a ring is mostly waiting. Here a rank copies its part to where the others can see it,
all meet, and each adds up everything: (R - 1) times the bytes over the links, but one round of them. Through torch's
symmetric memory (`torch.distributed._symmetric_memory`, alpha as of torch 2.13), and where the links can add up by
themselves (NVLink's multicast) they do. Not yet measured, nor run, on a GPU.

A sum goes this way or another by its size and dtype, which are the same on all ranks: so they never part.

Shapes: R ranks.
"""

from __future__ import annotations

import importlib
import logging
import socket
from collections.abc import Callable
from itertools import permutations
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from shoal.engine.devices import can_reach

_log = logging.getLogger(__name__)
SumInto = Callable[[Tensor, Tensor], None]
"""Of a view of the shared buffer and a rank's part, both 1-dimensional: the sum of all parts to where the part is."""
Close = Callable[[], None]
MOST_RANKS = 8
_LIMITS = {2: 512 * 1024, 3: 512 * 1024, 4: 512 * 1024}
_LIMIT_OF_MORE = 256 * 1024
"""Bytes above which fewer bytes count for more than fewer rounds: where vLLM's and TensorRT-LLM's own one-shot kernels
end, on NVLink."""
_MULTICAST_FROM = 3
"""Ranks. With two there is one other part to read, and nothing to be saved."""
_ALIGNMENT = 16
"""Bytes that the kernels load at once."""
_DTYPES = (torch.bfloat16, torch.float32)


class Group(NamedTuple):
    """What a group's memory is shared by."""

    backend: Any
    """c10d's."""
    store: Any
    """Where its ranks find each other."""
    name: str
    rank: int
    size: int
    device: torch.device


Share = Callable[[Group, int], tuple[Tensor, SumInto, Close]]
"""Of so many bytes: this rank's buffer, what sums through it, and how it is given back. All ranks call it."""


class OneShotSums:
    """Belongs to a Comm, whose ranks each have one, with a buffer of the same size."""

    def __init__(self, buffer: Tensor, sum_into: SumInto, close: Close = lambda: None) -> None:
        """`buffer` is of bytes; the largest message is as long."""
        self._buffer = buffer
        self._sum_into = sum_into
        self.close = close

    @property
    def limit_bytes(self) -> int:
        return self._buffer.nbytes

    def takes(self, x: Tensor) -> bool:
        """By what is the same on all ranks."""
        aligned = x.nbytes % _ALIGNMENT == 0 and x.storage_offset() * x.element_size() % _ALIGNMENT == 0
        return x.dtype in _DTYPES and 0 < x.nbytes <= self.limit_bytes and aligned

    def all_reduce_(self, x: Tensor) -> Tensor:
        """Kernels end only once all ranks have read: the next message may overwrite this one."""
        flat = x.view(-1)
        self._sum_into(self._buffer[: x.nbytes].view(x.dtype), flat)
        return x


def default_limit(size: int) -> int:
    return _LIMITS.get(size, _LIMIT_OF_MORE)


def open_sums(group: Group, limit_bytes: int | None = None, share: Share | None = None) -> OneShotSums | None:
    """As `try_sums`; that there is none one rank writes to the log, with the reason."""
    found = try_sums(group, limit_bytes, share)
    if isinstance(found, OneShotSums):
        return found
    if group.rank == 0:
        _log.warning("small sums go through NCCL as all others do: %s", found)
    return None


def try_sums(group: Group, limit_bytes: int | None = None, share: Share | None = None) -> OneShotSums | str:
    """Or why there is none, on all ranks alike. Every rank of the group calls it; `share` None is torch's way."""
    store: Any = torch.distributed.PrefixStore(f"{group.name}/one-shot", group.store)  # type: ignore[attr-defined]
    group = group._replace(store=store, name=f"{group.name}/one-shot")
    reason = _first_reason(group, "can", _unavailable_reason(group))
    if reason is not None:
        return reason
    shared, problem = None, ""
    try:
        limit = default_limit(group.size) if limit_bytes is None else limit_bytes // _ALIGNMENT * _ALIGNMENT
        shared = (share or _symmetric)(group, limit)
    except Exception as error:  # of a driver, a container without rights, a torch with another interface
        problem = (str(error).splitlines() or [""])[0] or type(error).__name__
    reason = _first_reason(group, "has", problem)
    if shared is None or reason is not None:
        if shared is not None:
            shared[2]()
        return reason or problem
    return OneShotSums(*shared)


def _unavailable_reason(group: Group) -> str:
    """Of what one rank can see by itself; empty if nothing is in the way."""
    if group.device.type != "cuda":
        return f"memory is shared among cuda devices, not {group.device}"
    if group.size > MOST_RANKS:
        return f"a sum in one shot is for up to {MOST_RANKS} ranks, not {group.size}"
    return ""


def _first_reason(group: Group, about: str, own_reason: str) -> str | None:
    """What the first rank with a reason against it says; None if no rank has any, nor the places of all of them.

    A vote is a rank's reason, or none, its host, and its device.
    """
    vote = f"{own_reason}\n{socket.gethostname()}\n{group.device.index or 0}"
    group.store.set(f"{about}/{group.rank}", vote)
    votes = [group.store.get(f"{about}/{other}").decode().split("\n") for other in range(group.size)]
    for other, (reason, _, _) in enumerate(votes):
        if reason:
            return f"rank {other} of {group.size}: {reason}"
    hosts = sorted({host for _, host, _ in votes})
    if len(hosts) > 1:
        return f"the ranks are on {len(hosts)} hosts: {', '.join(hosts)}"
    devices = [int(index) for _, _, index in votes]
    if len(set(devices)) == group.size:  # else processes see only their own, and the attempt will tell
        for one, other in permutations(devices, 2):
            if not can_reach(one, other):
                return f"cuda:{one} cannot read the memory of cuda:{other}"
    return None


# --- torch's symmetric memory ---------------------------------------------------------------------------------------


def register(group: Group) -> Close:
    """In torch's registry of groups by name, where its symmetric memory looks for them; the reverse of that.

    torch has no default group for it.
    """
    c10d: Any = importlib.import_module("torch._C._distributed_c10d")
    kind = c10d.ProcessGroup.BackendType.NCCL
    found = c10d.ProcessGroup(group.store, group.rank, group.size)
    found._register_backend(torch.device("cuda"), kind, group.backend)
    found._set_default_backend(kind)
    found._set_group_name(group.name)
    c10d._register_process_group(group.name, found)
    held = [found]  # the registry itself does not

    def close() -> None:
        c10d._unregister_process_group(group.name)
        held.clear()

    return close


def _symmetric(group: Group, limit_bytes: int) -> tuple[Tensor, SumInto, Close]:
    memory: Any = importlib.import_module("torch.distributed._symmetric_memory")
    ops: Any = torch.ops.symm_mem
    copy_and_read, multicast = ops.one_shot_all_reduce_copy_out.default, ops.multimem_one_shot_all_reduce_out.default
    close = register(group)
    try:
        buffer = memory.empty(limit_bytes, dtype=torch.uint8, device=group.device)
        handle = memory.rendezvous(buffer, group.name)
    except BaseException:
        close()
        raise

    def read_all(shared: Tensor, own: Tensor) -> None:
        copy_and_read(shared, own, "sum", group.name, own)

    def by_multicast(shared: Tensor, own: Tensor) -> None:
        shared.copy_(own)
        multicast(shared, "sum", group.name, own)

    has_multicast = group.size >= _MULTICAST_FROM and handle.multicast_ptr
    return buffer, by_multicast if has_multicast else read_all, close
