"""One worker in this process whose steps can be traced with torch's profiler: what `shoal profile` runs.

The steps are those that serve, through the same Worker; only the ranges of `profile_ranges` and the profiler itself are
added while a trace is taken. The trace is Chrome's JSON, which Perfetto and chrome://tracing open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from shoal.core.config import EngineConfig
from shoal.core.types import StepPlan, StepResult, WorkerFailure
from shoal.engine.executor import Progress, WorkerInfo
from shoal.engine.profile_ranges import STEP
from shoal.engine.worker import Worker


class ProfiledExecutor:
    """As the executor of one worker with a depth of 1: a step runs on the caller's thread, within `poll`."""

    def __init__(self, config: EngineConfig) -> None:
        if config.layout.ranks > 1:
            raise ValueError(f"a profile is of one rank, and the layout has {config.layout.ranks}")
        self._worker = Worker(config)
        self._plans: list[StepPlan] = []
        self._tracing = False

    def start(self, progress: Progress | None = None) -> WorkerInfo:
        return self._worker.start(progress)

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    def poll(self, timeout: float | None = None) -> StepResult | WorkerFailure | None:
        if not self._plans:
            return None
        if not self._tracing:
            return self._worker.step(self._plans.pop(0))
        with record_function(STEP):
            return self._worker.step(self._plans.pop(0))

    @contextmanager
    def traced(self, path: Path) -> Iterator[None]:
        """Steps within are recorded; the trace lies at `path` behind it."""
        activities = [ProfilerActivity.CPU]
        device = self._worker.device
        if device is not None and device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with self._worker.in_ranges(), profile(activities=activities) as recorded:
            self._tracing = True
            try:
                yield
                self.synchronise()
            finally:
                self._tracing = False
        recorded.export_chrome_trace(str(path))

    def synchronise(self) -> None:
        """Until the device has done all that it was given."""
        device = self._worker.device
        if device is not None and device.type != "cpu":
            torch.get_device_module(device).synchronize(device)

    def device_timer(self) -> Callable[[], float] | None:
        """Begins to time on the device's own clock; calling the result ends it and gives seconds. None on a CPU."""
        device = self._worker.device
        if device is None or device.type == "cpu":
            return None
        module = torch.get_device_module(device)
        began, ended = module.Event(enable_timing=True), module.Event(enable_timing=True)
        began.record()

        def seconds() -> float:
            ended.record()
            ended.synchronize()
            return float(began.elapsed_time(ended)) / 1e3

        return seconds

    def stop(self) -> None:
        self._plans.clear()
        self._worker.close()


def peak_memory(device: str) -> int:
    """Most bytes that torch has had allocated on an accelerator; 0 on a CPU."""
    kind = torch.device(device)
    return 0 if kind.type == "cpu" else int(torch.get_device_module(kind).max_memory_allocated(kind))
