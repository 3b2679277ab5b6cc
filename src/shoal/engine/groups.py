"""A rank's groups along the axes of the layout: from names in a message to Comm objects."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

from shoal.core.config import LaunchConfig
from shoal.core.layout import Axis
from shoal.engine.channel import Channel, ChannelClosed
from shoal.engine.comm.base import Comm, CommError
from shoal.engine.rank_messages import Group, StoreGet, StoreReply, StoreSet, encode, to_rank

SHARED_BUFFER_BYTES = 4 * 1024**2
"""Of a rank in a group: longer messages go in pieces."""


def open_groups(groups: list[Group], rank: int, channel: Channel, launch: LaunchConfig) -> dict[Axis, Comm]:
    """Waits for the other ranks of each group. Raises CommError."""
    store: Any = None
    comms: dict[Axis, Comm] = {}
    for group in groups:
        if group.backend == "shared_memory":
            comms[group.axis] = _open_shared(group, rank, launch.collective_seconds)
        else:
            store = store or _control_store(channel)
            comms[group.axis] = _open_process_group(group, rank, store, channel.local_address, launch)
    return comms


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


def _open_process_group(group: Group, rank: int, store: Any, host: str, launch: LaunchConfig) -> Comm:
    from shoal.engine.comm.process_group import open_group

    return open_group(
        group.backend,
        group.ranks.index(rank),
        len(group.ranks),
        store,
        name=group.path,
        host=host,
        timeout=launch.collective_seconds,
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
