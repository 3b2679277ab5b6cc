"""What others do on the machine is counted; what is measured is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from shoal.bench.foreign_load import ForeignLoad, busy_seconds, is_known, tree_seconds, wait_until_quiet

pytestmark = pytest.mark.skipif(not is_known(), reason="needs /proc/stat")
BURN = "import time; end = time.process_time() + 0.4\nwhile time.process_time() < end: pass"


TICKS = 0.1
"""Seconds that the kernel's clocks of processes and of cores may differ by."""


def others_seconds() -> float:
    """Of all cores since boot, less what this process and the children it has waited for used."""
    return busy_seconds() - sum(os.times()[:4])


def burn() -> None:
    subprocess.run([sys.executable, "-c", BURN], check=True)


def test_a_child_that_was_waited_for_belongs_to_the_measurement() -> None:
    """What is counted lies between what was busy within the count and what was busy around it, less what is its own:
    so others may do what they like meanwhile."""
    for measured in (None, os.getpid()):
        around, earliest = others_seconds(), time.monotonic()
        foreign = ForeignLoad(measured)
        within, latest = others_seconds(), time.monotonic()
        before = sum(os.times()[:4])
        burn()
        assert sum(os.times()[:4]) - before >= 0.4, "the child burned nothing"
        within, shortest = others_seconds() - within, time.monotonic() - latest
        cores = foreign.cores()
        around, longest = others_seconds() - around, time.monotonic() - earliest
        assert (within - TICKS) / longest <= cores <= (around + TICKS) / shortest


def test_a_tree_holds_a_process_that_still_runs_and_its_children() -> None:
    child = subprocess.Popen([sys.executable, "-c", f"{BURN}\ninput()"], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while tree_seconds(child.pid) < 0.4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert tree_seconds(os.getpid()) >= tree_seconds(child.pid)
    finally:
        child.kill()
        child.wait()
    assert tree_seconds(None) == 0.0


def test_patience_of_nothing_does_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    assert not wait_until_quiet(100.0, 0.0) and slept == []
    assert wait_until_quiet(1e6, 60.0, interval=0.01) and slept == [0.01]
