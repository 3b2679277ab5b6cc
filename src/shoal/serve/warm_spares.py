"""Ranks that have loaded the model and wait for those in use to fail, so that nobody waits for a start.

A spare is an executor like the one that runs, of the same size, with weights of its own in memory. Whoever takes one
leaves a place that is filled again in the background.
"""

from __future__ import annotations

import sys
import threading
import time

from shoal.core.config import EngineConfig
from shoal.core.start_report import StartProgress
from shoal.engine.child import plain
from shoal.engine.executor import Executor, open_executor

_ATTEND_SECONDS = 0.25
"""Between looks at whether the spares live."""
_RETRY_SECONDS = 30.0
"""After a spare that could not be started, for want of memory perhaps."""
_CLOSE_SECONDS = 2.0
"""For a start that is under way to notice that it is not wanted any more."""


class _Closing(Exception):
    """Ends a start."""


def require_possible_spares(config: EngineConfig) -> None:
    """Raise ValueError where an engine of this kind can have none."""
    if config.warm_spares and config.layout.ranks == 1:
        raise ValueError(
            f"warm_spares is {config.warm_spares}, and warm spares need ranks in processes of their own: an engine of "
            "one rank computes in its own process, and is lost with it; ask for a layout of more ranks, or no spares"
        )
    if config.warm_spares and config.launch.launcher != "local":
        raise ValueError(
            f"warm_spares is {config.warm_spares}, and only the local launcher can start more ranks beside "
            f"those in use, not {config.launch.launcher}; ask for no spares"
        )


class WarmSpares:
    def __init__(self, config: EngineConfig, num_blocks: int) -> None:
        """Begin to start `config.warm_spares` of them, each with at least `num_blocks` KV blocks."""
        self._config = config
        self._num_blocks = num_blocks
        self._ready: list[Executor] = []
        self._is_starting = False
        self._retry_at = 0.0
        self._closing = False
        self._changed = threading.Condition()
        """Guards all of the above, and the executors that are ready."""
        self._thread: threading.Thread | None = None
        if config.warm_spares:
            self._thread = threading.Thread(target=self._keep, name="warm-spares", daemon=True)
            self._thread.start()

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    def take(self) -> Executor | None:
        """One that lives, waiting for one that is being started; None if there is neither."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._ready or not self._is_starting)
                if not self._ready:
                    return None
                executor = self._ready.pop(0)
                self._changed.notify_all()
                if executor.failure() is None:
                    return executor
                executor.stop()

    def close(self) -> None:
        """End them. Executors that were taken must have been stopped: their processes end with the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)

    # --- on a thread of its own -------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Start all spares from this one thread, which ends last: the kernel ends a child with the thread it is of."""
        while self._wait_until_lacking():
            executor = self._started()
            with self._changed:
                self._is_starting = False
                if executor is not None:
                    self._ready.append(executor)
                else:
                    self._retry_at = time.monotonic() + _RETRY_SECONDS
                self._changed.notify_all()
        for executor in self._ready:
            executor.stop()

    def _wait_until_lacking(self) -> bool:
        """Attend to the spares that are ready until one must be started. False to end."""
        with self._changed:
            while not self._closing:
                for executor in list(self._ready):
                    if (failure := executor.failure()) is not None:
                        _say(f"a warm spare is lost: {failure}")
                        self._ready.remove(executor)
                        executor.stop()
                if len(self._ready) < self._config.warm_spares and time.monotonic() >= self._retry_at:
                    self._is_starting = True
                    return True
                self._changed.wait(_ATTEND_SECONDS)
        return False

    def _started(self) -> Executor | None:
        executor = None
        try:
            executor = open_executor(self._config)
            num_blocks = executor.start(self._report).num_blocks
            if num_blocks >= self._num_blocks:
                return executor
            reason = f"it has {num_blocks} KV blocks, the engine {self._num_blocks}"
        except _Closing:
            return None
        except Exception as error:
            reason = plain(error)
        if executor is not None:
            executor.stop()
        _say(f"no warm spare could be started, trying again in {_RETRY_SECONDS:.0f} s: {reason}")
        return None

    def _report(self, progress: StartProgress) -> None:
        if self._closing:
            raise _Closing


def _say(what: str) -> None:
    print(f"shoal engine: {what}", file=sys.stderr, flush=True)
