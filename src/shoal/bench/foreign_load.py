"""How busy the machine was with something else while something was measured on it."""

from __future__ import annotations

import os
import time
from pathlib import Path


class ForeignLoad:
    """How many cores were busy, since this object was made, with what is not part of the measurement.

    A barrier of two threads on two cores waits whenever anything else runs, so a busy neighbour costs more than its
    share: a run with a foreign load is not a result. Includes time that the hypervisor stole.
    """

    def __init__(self, measured: int | None = None) -> None:
        """`measured`: a process that counts as the measurement with all its descendants, as do this process and the
        children that it has waited for.
        """
        self._measured = measured
        self._began = time.monotonic()
        self._foreign_seconds = self._read()

    def cores(self) -> float:
        return max(0.0, self._read() - self._foreign_seconds) / (time.monotonic() - self._began)

    def _read(self) -> float:
        own = 0.0 if self._measured == os.getpid() else sum(os.times()[:4])
        return busy_seconds() - own - tree_seconds(self._measured)


def is_known() -> bool:
    """Whether this system tells what its cores do."""
    return Path("/proc/stat").exists()


def wait_until_quiet(most_cores: float, patience: float, interval: float = 2.0) -> bool:
    """Sleep until others kept no more than `most_cores` busy over one `interval`. False if they never did.

    Gives up after `patience` seconds; 0 does not look at all.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        foreign = ForeignLoad()
        time.sleep(interval)
        if foreign.cores() <= most_cores:
            return True
    return False


def busy_seconds() -> float:
    """CPU seconds of all cores since boot, idle and waiting for disks left out."""
    user, nice, system, _, _, irq, soft_irq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")


def tree_seconds(root: int | None) -> float:
    """CPU seconds of a process and its descendants, and of the children that they have waited for."""
    if root is None:
        return 0.0
    ticks: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # proc(5): behind the command's name, which may hold anything, come state, parent, group, ...
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        ticks[int(entry.name)] = sum(map(int, fields[11:15]))
        children.setdefault(int(fields[1]), []).append(int(entry.name))
    total, left = 0, [root]
    while left:
        process = left.pop()
        total += ticks.get(process, 0)
        left += children.get(process, [])
    return total / os.sysconf("SC_CLK_TCK")
