"""A clock that stands still while anything happens: an asyncio program in whose seconds no machine is slow."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar
from unittest import mock

# What was written to a loopback socket may take the kernel a moment to deliver. Real seconds.
_DELIVERY = 0.002
# The program waits for what will not come: no timer is set and nothing arrives. Real seconds.
_DEADLOCK = 60.0

T = TypeVar("T")


class _Selector(selectors.DefaultSelector):
    """Says that nothing is ready only when nothing is under way; then it is later, without anyone having waited."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.working = 0
        """Calls on other threads, which take as long as they take."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return super().select(0)
        if timeout is None or self.working:
            ready = super().select(_DEADLOCK)
            assert ready, f"nothing has happened for {_DEADLOCK} s"
            return ready
        has_sockets = len(self.get_map()) > 1  # besides the loop's own
        ready = super().select(_DELIVERY if has_sockets else 0)
        if not ready:
            self.now += timeout
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        future = super().run_in_executor(executor, func, *args)
        self._clock.working += 1
        future.add_done_callback(self._worked)
        return future

    def _worked(self, _: object) -> None:
        self._clock.working -= 1


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, where time passes only when all of the program waits for it, time.monotonic() by that name too.

    Not for programs that talk with other processes: those have the real clock.
    """
    with asyncio.Runner(loop_factory=_Loop) as runner:
        loop = runner.get_loop()
        with mock.patch.object(time, "monotonic", loop.time):
            return runner.run(main)
