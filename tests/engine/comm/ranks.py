"""Ranks as real processes, each with a Comm of one group, that run a test's functions and send back the results."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from shoal.engine.comm.base import Comm
from shoal.engine.comm.shared_memory import SharedMemoryComm

Open = Callable[[int], Comm]
"""A rank's Comm. Goes to the process of the rank, and so do bodies."""
Body = Callable[..., Any]
"""Takes the rank's Comm, and what it was started with."""
SECONDS = 60
"""After which a test fails because ranks say nothing."""
PATIENT = 1000.0
"""Timeout of a group in which nobody is to give up, however long the machine stands still."""
IMPATIENT = 5.0
"""Timeout of a group that is to give up: what ranks are stopped for by chance is shorter."""


def shared_memory(path: Path, size: int, *, timeout: float = PATIENT, buffer_bytes: int = 1 << 16) -> Open:
    """A new group; its file is at `path`."""
    SharedMemoryComm.create(str(path), size, buffer_bytes)
    return functools.partial(open_shared_memory, str(path), size, timeout)


def open_shared_memory(path: str, size: int, timeout: float, rank: int) -> Comm:
    return SharedMemoryComm(path, rank, size, timeout=timeout)


def gloo(path: Path, size: int, *, timeout: float = PATIENT, name: str = "test") -> Open:
    """A new group, whose ranks find each other through a file at `path`."""
    return functools.partial(open_gloo, str(path), size, timeout, name)


def open_gloo(path: str, size: int, timeout: float, name: str, rank: int) -> Comm:
    import torch.distributed

    from shoal.engine.comm.process_group import open_group

    store = torch.distributed.FileStore(path)
    return open_group("gloo", rank, size, store, name=name, host="127.0.0.1", timeout=timeout)


def nccl(path: Path, size: int, *, timeout: float = 20.0, one_shot_bytes: int | None = 0) -> Open:
    """A new group of GPUs, as many as there are ranks."""
    return functools.partial(open_nccl, str(path), size, timeout, one_shot_bytes)


def open_nccl(path: str, size: int, timeout: float, one_shot_bytes: int | None, rank: int) -> Comm:
    import torch.distributed

    from shoal.engine.comm.process_group import open_group

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = torch.distributed.FileStore(path)
    places = {"name": "test", "host": "127.0.0.1", "timeout": timeout}
    return open_group("nccl", rank, size, store, **places, device=device, one_shot_bytes=one_shot_bytes)


def _serve(open_comm: Open, rank: int, connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        comm = open_comm(rank)
    except Exception as error:
        connection.send(error)
        return
    connection.send(None)
    while True:
        try:
            body, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(body(comm, *arguments))
        except Exception as error:
            connection.send(error)


class Ranks:
    """One process a rank; `only` some of them are started. They are forked from one that has imported torch: that takes
    longer than most tests."""

    def __init__(self, open_comm: Open, size: int, only: Iterable[int] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "tests.engine.comm.operations", __name__])
        self.size = size
        self._connections: dict[int, Connection] = {}
        self._processes: dict[int, Any] = {}
        for rank in range(size) if only is None else only:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(open_comm, rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._connections[rank], self._processes[rank] = ours, process
        self.opened = self._collect(self._connections)
        """None, or why a rank could not open its Comm."""

    def start(self, body: Body, *arguments: Any, ranks: Iterable[int] | None = None) -> None:
        for rank in self._connections if ranks is None else ranks:
            self._connections[rank].send((body, arguments))

    def collect(self, ranks: Iterable[int] | None = None) -> dict[int, Any]:
        """What bodies returned or raised."""
        return self._collect(self._connections if ranks is None else ranks)

    def run(self, body: Body, *arguments: Any) -> list[Any]:
        """What every rank returned, in order; an exception of one is raised."""
        self.start(body, *arguments)
        results = self.collect()
        for result in results.values():
            if isinstance(result, Exception):
                raise result
        return [results[rank] for rank in range(self.size)]

    def is_quiet(self, seconds: float) -> bool:
        """Whether no rank has anything to say for so long."""
        return not wait(list(self._connections.values()), seconds)

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks:
            os.kill(self._processes[rank].pid, number)

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _collect(self, ranks: Iterable[int]) -> dict[int, Any]:
        deadline, results = time.monotonic() + SECONDS, {}
        for rank in ranks:
            if not self._connections[rank].poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise AssertionError(f"rank {rank} has not answered")
            results[rank] = self._connections[rank].recv()
        return results


def wait_for_files(paths: Iterable[Path]) -> None:
    deadline = time.monotonic() + SECONDS
    for path in paths:
        while not path.exists():
            assert time.monotonic() < deadline, f"{path} has not come"
            time.sleep(0.005)
