"""What an engine's runner is: JSON lines on stdin and stdout, one answer a request, in order.

    -> {"command": "load", "options": {...}}      <- {"result": {"first_token_at": t, ...}}
    -> {"command": "run", "items": [...]}         <- {"result": {"seconds": ..., "token_times": [...], ...}}
    -> {"command": "verify", ...}                 only the reference
    -> {"command": "quit"}

or `{"error": "..."}`. Times of a run are seconds since its requests were submitted, all at once; `first_token_at` is of
the machine's monotonic clock, which all processes share. Runners live in the interpreters of the engines that they
drive, so this module needs only the standard library.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

PR_SET_PDEATHSIG = 1
"""prctl(2)"""


class Engine(Protocol):
    def load(self, options: dict[str, Any]) -> dict[str, Any]:
        """Get ready and produce one token. Returns `first_token_at` and whatever the report should know."""

    def run(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Serve all items at once. Returns a `Recorder.result`."""

    def close(self) -> None: ...


class Recorder:
    """Tokens of each request and when they came."""

    def __init__(self, items: list[dict[str, Any]]) -> None:
        self._items = items
        self.tokens: list[list[int]] = [[] for _ in items]
        self._times: list[list[float]] = [[] for _ in items]
        self._began = time.monotonic()

    def add(self, index: int, token_ids: list[int], at: float | None = None) -> None:
        """Tokens of request `index` arrived, now or at a monotonic time."""
        seconds = (time.monotonic() if at is None else at) - self._began
        self.tokens[index] += token_ids
        self._times[index] += [seconds] * len(token_ids)

    def result(self, **extra: Any) -> dict[str, Any]:
        """`tokens` and `token_times` of each request, `seconds` until the last, peak memory.

        Raises RuntimeError if a request did not get exactly the tokens that it asked for.
        """
        for index, (item, tokens) in enumerate(zip(self._items, self.tokens, strict=True)):
            if len(tokens) != item["max_tokens"]:
                raise RuntimeError(f"request {index} got {len(tokens)} tokens instead of {item['max_tokens']}")
        return {
            "tokens": self.tokens,
            "token_times": self._times,
            "seconds": max(times[-1] for times in self._times),
            "peak_rss_bytes": peak_rss_bytes(os.getpid()),
        } | extra


def peak_rss_bytes(pid: int) -> int:
    """High-water mark of a process's resident memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no VmHWM")


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, even while it is stopped: no orphan burns a core."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(engine: Engine) -> None:
    """Answer commands until `quit` or the end of stdin."""
    die_with_parent()
    # Libraries print to stdout as they please: it becomes stderr for them; the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    commands: dict[str, Callable[[dict[str, Any]], Any]] = {
        "load": lambda message: engine.load(message["options"]),
        "run": lambda message: engine.run(message["items"]),
    }
    if (verify := getattr(engine, "verify", None)) is not None:
        commands["verify"] = lambda message: verify(message["sequences"])
    for line in sys.stdin:
        message = json.loads(line)
        if message["command"] == "quit":
            break
        try:
            answer = {"result": commands[message["command"]](message)}
        except Exception as error:  # the table says so, and the others go on
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    engine.close()
