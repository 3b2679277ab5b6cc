"""Processes of this host as /proc shows them: running, stopped or gone, what they hold, whose children they are."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_PAGE = os.sysconf("SC_PAGE_SIZE")


class Process(NamedTuple):
    """One process for ever: pids are used again, so the start belongs to the name."""

    pid: int
    started: int
    """Clock ticks from boot (proc(5), field 22)."""

    @property
    def state(self) -> str:
        """R, S, D running or waiting, T stopped; "" once it is gone. A zombie is gone."""
        fields = _fields(self.pid)
        return "" if fields is None or int(fields[19]) != self.started or fields[0] == "Z" else fields[0]

    @property
    def lives(self) -> bool:
        return self.state != ""


def find(pid: int) -> Process | None:
    fields = _fields(pid)
    return None if fields is None or fields[0] == "Z" else Process(pid, int(fields[19]))


def descendants(pid: int) -> list[Process]:
    """Children, their children and so on, parents first."""
    children: dict[int, list[Process]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _fields(int(entry))) is not None and fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(Process(int(entry), int(fields[19])))
    found: list[Process] = []
    to_visit = [pid]
    while to_visit:
        for child in children.get(to_visit.pop(0), []):
            found.append(child)
            to_visit.append(child.pid)
    return found


def open_files(pid: int) -> int:
    """0 once the process is gone."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def resident_bytes(pid: int) -> int:
    fields = _fields(pid)
    return 0 if fields is None else int(fields[21]) * _PAGE


async def comes_true(condition: Callable[[], bool], seconds: float, *, every: float = 0.01) -> bool:
    """Whether `condition` holds at some moment of the next `seconds`; returns at the first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(every)
    return True


def _fields(pid: int) -> list[str] | None:
    """Of /proc/pid/stat, from the state (field 3) on; the name before it may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
