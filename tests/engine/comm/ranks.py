"""Ranks as real processes, each running a function of a test with a Comm; results come back by queue."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.engine.comm.base import Comm
from shoal.engine.comm.shared_memory import SharedMemoryComm

Body = Callable[[Comm], Any]
SECONDS = 60


def _run(body: Body, path: str, rank: int, size: int, timeout: float, results: Any) -> None:
    import torch

    torch.set_num_threads(1)
    comm = SharedMemoryComm(path, rank, size, timeout=timeout)
    try:
        results.put((rank, body(comm)))
    except Exception as error:
        results.put((rank, error))
    comm.close()


class Ranks:
    """`body` on every rank of a new group, in processes of its own."""

    def __init__(
        self, body: Body, path: Path, size: int, *, timeout: float = 20.0, buffer_bytes: int = 1 << 16
    ) -> None:
        SharedMemoryComm.create(str(path), size, buffer_bytes)
        context = multiprocessing.get_context("spawn")
        self.results: Any = context.Queue()
        self.processes = [
            context.Process(target=_run, args=(body, str(path), rank, size, timeout, self.results))
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def collect(self, count: int | None = None) -> dict[int, Any]:
        """Of so many ranks; None is all."""
        wanted = len(self.processes) if count is None else count
        found: dict[int, Any] = {}
        while len(found) < wanted:
            try:
                rank, result = self.results.get(timeout=SECONDS)
            except queue.Empty:
                raise AssertionError(f"only ranks {sorted(found)} answered") from None
            found[rank] = result
        return found

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def run_ranks(body: Body, path: Path, size: int, **options: Any) -> list[Any]:
    """What every rank returned, in order; an exception of one is raised."""
    ranks = Ranks(body, path, size, **options)
    try:
        results = ranks.collect()
    finally:
        ranks.end()
    for result in results.values():
        if isinstance(result, Exception):
            raise result
    return [results[rank] for rank in range(size)]
