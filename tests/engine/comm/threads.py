"""Ranks as threads of this process: for layers over a group, where starting processes would cost more than the test."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from shoal.engine.comm.base import Comm
from shoal.engine.comm.shared_memory import SharedMemoryComm

Result = TypeVar("Result")


def together(directory: Path, size: int, body: Callable[[Comm], Result]) -> list[Result]:
    """What each rank's `body` returned, with a new group's Comm each; an exception of one is raised."""
    path = str(directory / f"group-{uuid4().hex}")
    SharedMemoryComm.create(path, size, 1 << 20)

    def run(rank: int) -> Result:
        comm = SharedMemoryComm(path, rank, size, timeout=60.0)
        try:
            return body(comm)
        finally:
            comm.close()  # others that wait for this rank fail at once

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))
