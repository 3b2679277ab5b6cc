"""One worker in this process."""

from __future__ import annotations

import queue
import threading
from collections import deque

from shoal.core.config import EngineConfig
from shoal.core.expert_load import HeldRows
from shoal.core.types import StepPlan, StepResult, WorkerFailure
from shoal.engine.executor import Progress, WorkerInfo
from shoal.engine.worker import Worker


class InProcExecutor:
    """One worker in this process.

    With a depth of 1 nothing can overlap, so `poll` runs the step on the caller's thread: handing it to another costs
    tens of microseconds each way. With more a thread runs the steps while the driver commits and plans; torch and the
    native kernels give up the interpreter lock while they compute.
    """

    def __init__(self, config: EngineConfig, worker: Worker | None = None) -> None:
        """`worker` None: one of this configuration."""
        self._worker = worker or Worker(config)
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

    def expert_rows(self) -> list[HeldRows]:
        return self._worker.expert_rows()

    def failure(self) -> str | None:
        return None  # a worker in this process fails only in a step

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
