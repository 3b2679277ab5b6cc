"""What a process does to be the child of one that may be killed: it never outlives it. And how old it is."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn


def bind_to_parent() -> None:
    """Exit when standard input ends or, on Linux, the moment the parent dies. Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    threading.Thread(target=_exit_at_end_of_input, name="parent-watch", daemon=True).start()


def _exit_at_end_of_input() -> NoReturn:
    # The descriptor, not sys.stdin: its buffer's lock would be held at interpreter exit.
    while os.read(0, 4096):
        pass
    os._exit(1)


def first_line() -> bytes:
    """Of standard input, what the parent has to say; empty if it died first."""
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return bytes(line)


def plain(error: Exception) -> str:
    """Errors that are made for users say what is wrong themselves; of others the type belongs to the message."""
    module = type(error).__module__
    expected = module.startswith("shoal.") or isinstance(error, ValueError | OSError)
    return str(error) if expected and str(error) else f"{type(error).__name__}: {error}"


def process_age() -> float:
    """Seconds since this process was started, to a hundredth: its interpreter and its imports are in it.

    From /proc/self/stat (proc(5), field 22: clock ticks from boot to start); where there is none, the CPU time so far.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError):
        return time.process_time()
