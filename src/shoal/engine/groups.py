"""A rank's groups along the axes of the layout: from names in a message to Comm objects."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

from shoal.core.config import EngineConfig
from shoal.core.layout import Axis
from shoal.engine.channel import Channel, ChannelClosed
from shoal.engine.comm.base import Comm, CommError
from shoal.engine.rank_messages import Group, StoreGet, StoreReply, StoreSet, encode, to_rank

SHARED_BUFFER_BYTES = 4 * 1024**2
"""Of a rank in a group: longer messages go in pieces."""


def open_groups(
    groups: list[Group], rank: int, channel: Channel, config: EngineConfig, local_rank: int
) -> dict[Axis, Comm]:
    """Waits for the other ranks of each group. Raises CommError, ValueError for a device that is not there."""
    store: Any = None
    comms: dict[Axis, Comm] = {}
    for group in groups:
        if _backend(group, config) == "shared_memory":
            comms[group.axis] = _open_shared(group, rank, config.launch.collective_seconds)
        else:
            store = store or _control_store(channel)
            comms[group.axis] = _open_process_group(group, rank, store, channel.local_address, config, local_rank)
    return comms


def _backend(group: Group, config: EngineConfig) -> str:
    """What the driver chose, which has no torch to ask what `auto` is: on devices it is NCCL."""
    if config.launch.comm != "auto" or group.backend == "nccl" or config.device == "cpu":
        return group.backend
    from shoal.engine.devices import device_of_rank

    return "nccl" if device_of_rank(config.device, 0).type == "cuda" else group.backend


def _open_shared(group: Group, rank: int, seconds: float) -> Comm:
    from shoal.engine.comm.shared_memory import SharedMemoryComm

    index = group.ranks.index(rank)
    if index == 0:
        # Under another name until it is whole: who finds the file may use it.
        SharedMemoryComm.create(group.path + ".new", len(group.ranks), SHARED_BUFFER_BYTES)
        os.rename(group.path + ".new", group.path)
    deadline = time.monotonic() + seconds
    while not os.path.exists(group.path):
        if time.monotonic() > deadline:
            raise CommError(f"rank {group.ranks[0]} has not made the {group.axis} group's shared memory")
        time.sleep(0.002)
    return SharedMemoryComm(group.path, index, len(group.ranks), timeout=seconds)


def _open_process_group(group: Group, rank: int, store: Any, host: str, config: EngineConfig, local_rank: int) -> Comm:
    from shoal.engine.comm.process_group import open_group
    from shoal.engine.devices import device_of_rank, make_current

    backend, device = _backend(group, config), None
    if backend == "nccl":
        device = device_of_rank(config.device, local_rank)
        make_current(device)
    return open_group(
        backend,
        group.ranks.index(rank),
        len(group.ranks),
        store,
        name=group.path,
        host=host,
        timeout=config.launch.collective_seconds,
        device=device,
        # Stages hand on, and ranks of a context gather: only ranks that split layers add up small messages.
        one_shot_bytes=config.launch.one_shot_bytes if group.axis == "tensor" else 0,
    )


def _control_store(channel: Channel) -> Any:
    """Where the ranks of process groups leave their addresses for each other: with the driver, over the channel.

    torch's own store listens on every interface and asks nobody for a secret. Only for use while no other thread
    receives from the channel: when groups are made.
    """
    import torch.distributed

    store_class: Any = torch.distributed.Store  # type: ignore[attr-defined]

    class ControlStore(store_class):  # type: ignore[misc]
        def set(self, key: str, value: str | bytes) -> None:
            channel.send(encode(StoreSet(key, value.encode() if isinstance(value, str) else bytes(value))))

        def get(self, key: str) -> bytes:
            channel.send(encode(StoreGet(key)))
            reply = to_rank.decode(channel.receive() or b"")
            if not isinstance(reply, StoreReply):
                raise ChannelClosed("the driver ended the start")
            return reply.value

        def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
            for key in keys:
                self.get(key)

    return ControlStore()
