"""Ranks as children of this process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

import msgspec

from shoal.core.config import LaunchConfig
from shoal.engine.launch.base import RankStart


class LocalLauncher:
    """`ranks` None starts all of them."""

    def __init__(self, config: LaunchConfig, ranks: Iterable[int] | None = None) -> None:
        self._config = config
        self.driver_port = 0
        self._ranks = None if ranks is None else list(ranks)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def launch(self, address: str, secret: bytes, world_size: int) -> None:
        for rank in range(world_size) if self._ranks is None else self._ranks:
            start = RankStart(
                address=address,
                secret=secret.hex(),
                rank=rank,
                world_size=world_size,
                join_seconds=self._config.join_seconds,
                beat_seconds=self._config.silence_seconds / 4,
            )
            self._processes[rank] = start_rank_process(start)

    def ended(self) -> str | None:
        for rank, process in self._processes.items():
            if (status := process.poll()) is not None:
                return f"rank {rank} (process {process.pid}) {describe_exit(status)}"
        return None

    def wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        for process in self._processes.values():
            end_process(process)
        self._processes.clear()


def start_rank_process(start: RankStart) -> subprocess.Popen[bytes]:
    """Its standard input stays open: the process ends when that does, however its parent goes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal.engine.rank_process"],
        stdin=subprocess.PIPE,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        start_new_session=True,  # Ctrl-C is the driver's to handle
    )
    if process.stdin is None:
        raise RuntimeError("a rank process has no standard input")
    with contextlib.suppress(BrokenPipeError):  # it ended already; whoever waits for it will see
        process.stdin.write(msgspec.json.encode(start) + b"\n")
        process.stdin.flush()
    return process


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Kill, wait, close."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


def describe_exit(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"
