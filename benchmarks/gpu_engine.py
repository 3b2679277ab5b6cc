"""The real engine under the GPU benchmark: scheduler, executor and worker, without sockets, over random weights.

Steps are timed on the device's own clock, from the end of one to the end of the next: what the host keeps the device
waiting for is part of it.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from shoal.core.config import EngineConfig, SchedulerConfig
from shoal.core.engine_core import EngineCore
from shoal.core.types import Request, Sampling, StepPlan, StepResult, WorkerFailure
from shoal.engine.executor import WorkerInfo
from shoal.engine.in_process import InProcExecutor
from shoal.engine.worker import Worker

VARIANTS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "fp8 weights": {"dtype": "bfloat16", "quantize": "fp8"},
    "fp8 cache": {"dtype": "bfloat16", "kv_dtype": "float8"},
}
"""Settings by what they mean."""


class NotAvailable(Exception):
    """The engine cannot do this on this device. The message is for the table."""


def config_of(variant: str, **settings: Any) -> EngineConfig:
    return msgspec.convert(settings | VARIANTS[variant], EngineConfig)


@dataclass
class Mark:
    """One step."""

    rows: int
    tokens: int
    context: int
    """Tokens that its rows see, all together."""
    ended: Any
    """A device event, or seconds."""
    wall: float


@dataclass
class Run:
    marks: list[Mark]
    first: list[float]
    """Seconds from submission to each request's first token."""
    last: list[float]
    tokens: list[int]
    """Of output, by request."""
    seconds: float
    step_seconds: Callable[[Mark, Mark], float]

    def periods(self, rows: int, tokens: int) -> list[tuple[float, int]]:
        """Seconds between the ends of two steps of this size, one behind the other, and the latter's context."""
        wanted = [mark.rows == rows and mark.tokens == tokens for mark in self.marks]
        pairs = zip(self.marks, self.marks[1:], wanted, wanted[1:], strict=False)
        return [
            (self.step_seconds(before, after), after.context) for before, after, one, other in pairs if one and other
        ]

    @property
    def output_rate(self) -> float:
        return sum(self.tokens) / self.seconds

    def tpot(self) -> float:
        """Median over requests."""
        each = [
            (last - first) / (count - 1)
            for first, last, count in zip(self.first, self.last, self.tokens, strict=True)
            if count > 1
        ]
        return statistics.median(each) if each else 0.0


class TimedWorker(Worker):
    """Notes when each step is done, in the order of the device's own work."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.marks: list[Mark] = []

    def step(self, plan: StepPlan) -> StepResult | WorkerFailure:
        result = super().step(plan)
        if plan.rows:
            context = sum(row.start + row.num_tokens for row in plan.rows)
            self.marks.append(Mark(len(plan.rows), plan.num_tokens, context, self._now(), time.perf_counter()))
        return result

    def _now(self) -> Any:
        if self.device is None or self.device.type == "cpu":
            return time.perf_counter()
        event = torch.get_device_module(self.device).Event(enable_timing=True)
        event.record()
        return event


@dataclass
class Engine:
    config: EngineConfig
    worker: TimedWorker = field(init=False)
    info: WorkerInfo = field(init=False)

    def __enter__(self) -> Engine:
        self.worker = TimedWorker(self.config)
        self._executor = InProcExecutor(self.config, self.worker)
        try:
            self.info = self._executor.start()
        except BaseException as error:
            self._executor.stop()
            if isinstance(error, ValueError):
                raise NotAvailable(str(error)) from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.stop()

    @property
    def on_cpu(self) -> bool:
        return self.info.device == "cpu"

    def run(
        self, prompts: Sequence[list[int]], max_tokens: Sequence[int], on_step: Callable[[int], None] | None = None
    ) -> Run:
        """All requests at once, greedy. `on_step` is told how many steps are done. Raises RuntimeError."""
        core, began = self._core(), time.perf_counter()
        for number, (prompt, count) in enumerate(zip(prompts, max_tokens, strict=True)):
            request = Request(id=str(number), prompt=prompt, max_tokens=count, sampling=Sampling(temperature=0.0))
            rejected = core.add(request, time.monotonic())
            if rejected is not None:
                raise RuntimeError(f"request {number} was rejected: {rejected.reason}")
        self.worker.marks = []
        first, last, tokens = ([0.0] * len(prompts) for _ in range(3))
        pending: list[int] = []
        steps = 0
        while core.has_work():
            while (plan := core.plan(time.monotonic())) is not None:
                self._executor.submit(plan)
                pending.append(plan.plan_id)
            result = self._executor.poll()
            if result is None or isinstance(result, WorkerFailure):
                raise RuntimeError("no step was planned" if result is None else f"the step failed: {result.message}")
            outputs = core.commit(pending.pop(0), result, time.monotonic())
            now, steps = time.perf_counter() - began, steps + 1
            for output in outputs:
                number = int(output.request_id)
                if output.token_ids:
                    first[number] = first[number] or now
                    last[number] = now
                    tokens[number] += len(output.token_ids)
            if on_step is not None:
                on_step(steps)
        self.synchronise()
        marks = self.worker.marks
        return Run(marks, first, last, [int(count) for count in tokens], time.perf_counter() - began, self._between)

    def synchronise(self) -> None:
        if not self.on_cpu:
            torch.get_device_module(torch.device(self.info.device)).synchronize()

    def prompts(self, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
        """Random token ids."""
        draw, vocab = random.Random(seed), self.info.spec.vocab_size
        return [draw.choices(range(vocab), k=length) for length in lengths]

    def _between(self, before: Mark, after: Mark) -> float:
        if isinstance(before.ended, float):
            return float(after.ended - before.ended)
        return float(before.ended.elapsed_time(after.ended)) / 1e3

    def _core(self) -> EngineCore:
        config = self.config
        return EngineCore(
            SchedulerConfig(
                num_blocks=self.info.num_blocks,
                max_len=self.info.max_len,
                vocab_size=self.info.spec.vocab_size,
                block_size=config.block_tokens,
                max_sequences=config.max_sequences,
                max_batch_tokens=config.max_batch_tokens,
                depth=config.depth,
                prefix_caching=False,
            )
        )
