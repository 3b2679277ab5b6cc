"""Ranks that something else starts and numbers: torchrun, srun, LeaderWorkerSet, or hands on several machines.

Every machine runs the same `shoal serve` command with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. Rank 0 is the
server: its engine drives, and starts its own rank's process. Every other rank is an agent: it keeps one rank process
running, which joins the driver at MASTER_ADDR; when that process is told to go, because the engine is built anew, the
agent starts the next.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType
from typing import NoReturn

import msgspec

from shoal.core.config import LaunchConfig
from shoal.engine.launch.base import NEVER_JOINED, STOPPED, RankStart
from shoal.engine.launch.local import LocalLauncher, describe_exit, end_process, start_rank_process
from shoal.engine.rendezvous import LaunchError

_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Environment(msgspec.Struct, frozen=True):
    rank: int
    world_size: int
    master_address: str
    master_port: int


def read_environment() -> Environment:
    """Raises LaunchError for a variable that is missing or makes no sense."""
    missing = [name for name in _NAMES if name not in os.environ]
    if missing:
        raise LaunchError(
            f"the launcher is env, and {', '.join(missing)} is not set: start shoal with torchrun, srun or "
            "LeaderWorkerSet, which set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or take the launcher local"
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ[name].isdigit():
            raise LaunchError(f"{name} must be a number, not {os.environ[name]!r}")
        numbers[name] = int(os.environ[name])
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise LaunchError(f"RANK is {numbers['RANK']}, and WORLD_SIZE {numbers['WORLD_SIZE']}: ranks count from 0")
    return Environment(numbers["RANK"], numbers["WORLD_SIZE"], os.environ["MASTER_ADDR"], numbers["MASTER_PORT"])


def driver_port(environment: Environment, config: LaunchConfig) -> int:
    """torchrun's own agent listens on MASTER_PORT; the driver takes the next, unless it was told another."""
    return config.port or environment.master_port + 1


class EnvironmentLauncher:
    """Rank 0's: starts its own rank; the others come by themselves."""

    def __init__(self, config: LaunchConfig) -> None:
        environment = read_environment()
        if environment.rank != 0:
            raise LaunchError(f"RANK is {environment.rank}: only rank 0 drives an engine")
        self._world_size = environment.world_size
        self.driver_port = driver_port(environment, config)
        self._own = LocalLauncher(config, ranks=[0])

    def launch(self, address: str, secret: bytes, world_size: int) -> None:
        if self._world_size != world_size:
            raise LaunchError(
                f"WORLD_SIZE is {self._world_size}, and the layout has {world_size} ranks: start as many, or change it"
            )
        self._own.launch(address, secret, world_size)

    def ended(self) -> str | None:
        return self._own.ended()

    def wait(self, seconds: float) -> None:
        self._own.wait(seconds)

    def kill(self) -> None:
        self._own.kill()


class Agent:
    """Keeps the process of one rank running for a driver on another machine."""

    def __init__(self, config: LaunchConfig, secret: bytes) -> None:
        environment = read_environment()
        self._start = RankStart(
            address=f"{environment.master_address}:{driver_port(environment, config)}",
            secret=secret.hex(),
            rank=environment.rank,
            world_size=environment.world_size,
            join_seconds=config.join_seconds,
            beat_seconds=config.silence_seconds / 4,
        )
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Until the engine is stopped, the driver stays away, or this process is told to end."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _exit)
        try:
            return self._keep_running()
        finally:
            if self._process is not None:
                end_process(self._process)

    def _keep_running(self) -> int:
        while True:
            self._process = start_rank_process(self._start)
            status = self._process.wait()
            if status == STOPPED:
                return 0
            if status == NEVER_JOINED:
                return 1
            print(
                f"shoal: rank {self._start.rank} {describe_exit(status)}; starting it anew",
                file=sys.stderr,
                flush=True,
            )


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    # Nothing else here: what this interrupts may hold the lock of the process that is to be ended.
    sys.exit(0)
