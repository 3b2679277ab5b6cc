"""What a launcher is, and what a rank's process is told."""

from __future__ import annotations

from typing import Protocol

import msgspec

STOPPED = 0
"""Exit status of a rank process: told to stop."""
LOST = 3
"""The driver is gone or wants another process in this one's place."""
NEVER_JOINED = 4
"""The driver could not be reached, or did not want this rank."""


class RankStart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first line of a rank process's standard input, as JSON. Not on its command line: that is for all to see."""

    address: str
    secret: str
    """Hexadecimal."""
    rank: int
    world_size: int
    join_seconds: float
    beat_seconds: float
    """Between signs of life."""
    own_device: bool = False
    """The process sees one accelerator, its own, whatever others its host has."""


class Launcher(Protocol):
    """A launcher of one engine's ranks, used once."""

    def launch(self, address: str, secret: bytes, world_size: int) -> None:
        """Start the ranks that are this launcher's to start; others come by themselves."""

    driver_port: int
    """Where the driver listens if the launcher has to decide that; 0 leaves it to the configuration."""

    def ended(self) -> str | None:
        """A rank whose process has ended, and how; None while all that were started run."""

    def wait(self, seconds: float) -> None:
        """For the processes to end by themselves, at most so long."""

    def kill(self) -> None:
        """End every process that was started. Nothing of them is left when it returns."""
