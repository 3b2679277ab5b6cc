"""Executors: how step plans reach the workers and their results come back, in order.

The driver of the engine (a process, a benchmark, a test) keeps up to `depth` plans submitted:

    info = executor.start(progress)
    executor.submit(plan)                    returns at once
    result = executor.poll(timeout)          StepResult, WorkerFailure, or None if there is none yet
    executor.stop()

Failures are values: a step that cannot be run gives a `WorkerFailure` where its result would have come, and so does
every later one. The driver then stops this executor and starts another.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from typing import Protocol

from shoal.core.config import EngineConfig
from shoal.core.types import StepPlan, StepResult, WorkerFailure
from shoal.engine.worker import Progress, Worker, WorkerInfo


class Executor(Protocol):
    def start(self, progress: Progress | None = None) -> WorkerInfo:
        """Load the model. Raises an error for people to read: what does not fit, which file is at fault, and so on."""

    def submit(self, plan: StepPlan) -> None:
        """Queue a step behind those submitted before. Does not block."""

    def poll(self, timeout: float | None = None) -> StepResult | WorkerFailure | None:
        """The result of the oldest plan without one; None after `timeout` seconds, or at once if nothing is queued.

        `timeout` None waits as long as it takes.
        """

    def stop(self) -> None:
        """Free everything. May be called at any time, and more than once."""


class InProcExecutor:
    """One worker in this process.

    With a depth of 1 nothing can overlap, so `poll` runs the step on the caller's thread: handing it to another costs
    tens of microseconds each way. With more a thread runs the steps while the driver commits and plans; torch and the
    native kernels give up the interpreter lock while they compute.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._worker = Worker(config)
        self._threaded = config.depth > 1
        self._plans: deque[StepPlan] = deque()
        """Submitted and without a result, oldest first. Only the driver's thread touches it."""
        self._inbox: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[StepResult | WorkerFailure] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, progress: Progress | None = None) -> WorkerInfo:
        info = self._worker.start(progress)
        if self._threaded:
            self._thread = threading.Thread(target=self._run_steps, name="shoal-worker", daemon=True)
            self._thread.start()
        return info

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)
        if self._threaded:
            self._inbox.put(plan)

    def poll(self, timeout: float | None = None) -> StepResult | WorkerFailure | None:
        if not self._plans:
            return None
        if not self._threaded:
            return self._worker.step(self._plans.popleft())
        try:
            result = self._results.get(timeout=timeout)
        except queue.Empty:
            return None
        self._plans.popleft()
        return result

    def stop(self) -> None:
        if self._thread is not None:
            self._inbox.put(None)
            self._thread.join()
            self._thread = None
        self._plans.clear()
        self._worker.close()

    def _run_steps(self) -> None:
        while (plan := self._inbox.get()) is not None:
            self._results.put(self._worker.step(plan))
