"""Times steps of an engine that runs: fills KV caches, then runs chosen steps over them again and again.

Only an executor is needed, which the caller opens: the ranks, their kernels and the way to them are those that serve.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from shoal.bench.calibration.points import StepPoint
from shoal.bench.foreign_load import ForeignLoad, is_known
from shoal.core.types import Row, Sampling, SlotAssignment, StepPlan, StepResult, WorkerFailure

QUIET_CORES = 0.15
"""Others may keep so much busy beside a timing that counts."""
_VISIT_SECONDS = 0.12
"""Of one visit to a point, about: steps are repeated until then."""
_LEAST_STEPS = 3
_SAMPLING = Sampling(temperature=0.0)


class TimingError(Exception):
    """The engine could not run a step. The message is for the user."""


class Executor(Protocol):
    """Of `shoal.engine.executor.Executor` what is needed here."""

    def submit(self, plan: StepPlan) -> None: ...

    def poll(self, timeout: float | None = None) -> StepResult | WorkerFailure | None: ...


class TimedStep(msgspec.Struct, frozen=True, kw_only=True):
    """Wall-clock time from a plan's submission to its result."""

    tp: int
    point: StepPoint
    seconds: float
    """Median of the visits' medians."""
    low: float
    high: float
    """The fastest and the slowest visit's."""
    visits: int
    disturbed: int
    """Visits beside which more than QUIET_CORES were busy with something else."""
    foreign_cores: float
    """Median over the visits that count."""


class Visit(msgspec.Struct, frozen=True):
    seconds: float
    foreign_cores: float


class StepTiming:
    """The slots and blocks of one engine: the first are of prompts, those behind them of sequences that decode."""

    def __init__(
        self,
        executor: Executor,
        points: Sequence[StepPoint],
        *,
        block_tokens: int,
        vocab_size: int,
        max_batch_tokens: int,
    ) -> None:
        """The engine is started, and of this process and its children; nobody else uses it meanwhile."""
        self._executor = executor
        self._vocab_size = vocab_size
        self._max_batch_tokens = max_batch_tokens
        self._block_tokens = block_tokens
        self._next_plan = 1
        slots = max(len(point.needs()) for point in points)
        self._room = [max((p.needs()[s] for p in points if len(p.needs()) > s), default=0) for s in range(slots)]

    def fill(self, report: Callable[[float], None]) -> None:
        """Compute the KV of every slot: memory that was never written to would read faster than any."""
        total, done, block = sum(self._room), 0, 0
        draw = random.Random(0)
        rows: list[Row] = []
        assigned: list[SlotAssignment] = []
        budget = self._max_batch_tokens
        for slot, room in enumerate(self._room):
            # The token drawn behind the last position is known beforehand, for any start may be asked for.
            count = -(-(room + 1) // self._block_tokens)
            tokens = [draw.randrange(self._vocab_size) for _ in range(room + 1)]
            blocks = list(range(block, block + count))
            block += count
            name = f"calibration-{slot}"
            assigned.append(SlotAssignment(slot, name, 0, tokens, len(tokens), blocks, _SAMPLING, 0, []))
            start = 0
            while start < room:
                take = min(budget, room - start)
                rows.append(Row(slot, start, take, False, []))
                start, budget, done = start + take, budget - take, done + take
                if budget == 0:
                    self._run(rows, assigned)
                    rows, assigned, budget = [], [], self._max_batch_tokens
                    report(done / total)
        if rows or assigned:
            self._run(rows, assigned)
        report(1.0)

    def visit(self, point: StepPoint) -> Visit:
        """The median of a few steps of this shape, behind one that brings the caches to where they are in a run."""
        rows = point.rows()
        self._run(rows)
        foreign = ForeignLoad(os.getpid()) if is_known() else None
        began = time.perf_counter()
        seconds: list[float] = []
        while len(seconds) < _LEAST_STEPS or (time.perf_counter() - began < _VISIT_SECONDS and len(seconds) < 50):
            before = time.perf_counter()
            self._run(rows)
            seconds.append(time.perf_counter() - before)
        return Visit(statistics.median(seconds), 0.0 if foreign is None else foreign.cores())

    def step(self, point: StepPoint) -> float:
        """One step of this shape; seconds from its plan to its result."""
        rows = point.rows()
        before = time.perf_counter()
        self._run(rows)
        return time.perf_counter() - before

    def _run(self, rows: list[Row], assigned: list[SlotAssignment] | None = None) -> None:
        plan = StepPlan(self._next_plan, [], assigned or [], rows)
        self._next_plan += 1
        self._executor.submit(plan)
        result = self._executor.poll()
        if isinstance(result, WorkerFailure):
            raise TimingError(f"the engine could not run a step: {result.message}")


def time_steps(
    timing: StepTiming,
    points: Sequence[StepPoint],
    tp: int,
    *,
    rounds: int,
    seconds: float,
    report: Callable[[float], None],
) -> list[TimedStep]:
    """Every point once a round, in another order each time, so that what drifts drifts for all of them.

    Points that were disturbed too often are visited again, as often at most as there were rounds. After `seconds`
    nothing is visited any more that was visited once: on a busy machine everything takes several times as long.
    """
    visits: dict[StepPoint, list[Visit]] = {point: [] for point in points}
    draw, deadline, total = random.Random(1), time.monotonic() + seconds, rounds * len(points)
    for number in range(2 * rounds):
        order = list(points)
        draw.shuffle(order)
        for point in order:
            enough = sum(is_quiet(visit) for visit in visits[point]) >= (rounds + 1) // 2
            if number and (time.monotonic() > deadline or (number >= rounds and enough)):
                continue
            visits[point].append(timing.visit(point))
            report(min(1.0, sum(map(len, visits.values())) / total))
    return [summary(tp, point, visits[point]) for point in points]


def is_quiet(visit: Visit) -> bool:
    return visit.foreign_cores <= QUIET_CORES


def summary(tp: int, point: StepPoint, visits: list[Visit]) -> TimedStep:
    """Of the quiet visits; where there are fewer than two, of the quieter half."""
    quiet = [visit for visit in visits if is_quiet(visit)]
    by_load = sorted(visits, key=lambda visit: visit.foreign_cores)
    counted = quiet if len(quiet) >= 2 else by_load[: len(visits) // 2 + 1]
    seconds = [visit.seconds for visit in counted]
    return TimedStep(
        tp=tp,
        point=point,
        seconds=statistics.median(seconds),
        low=min(seconds),
        high=max(seconds),
        visits=len(visits),
        disturbed=len(visits) - len(quiet),
        foreign_cores=statistics.median(visit.foreign_cores for visit in counted),
    )
