"""The scheduler in the simulator is the one that serves: a live run, put into the simulator, is planned step for step.

A real engine with a tiny checkpoint runs requests that come while others run, and that preempt one another. What the
simulator is told is when they came and how long each step took; it must make the same plans.
"""

from __future__ import annotations

import random
import time
from collections import deque
from pathlib import Path

import msgspec

from shoal.core.block_pool import BlockPool
from shoal.core.config import EngineConfig, SchedulerConfig
from shoal.core.cost.types import StepShape
from shoal.core.dispatch import Dispatch
from shoal.core.engine_core import EngineCore
from shoal.core.replay import AddRecord, CommitRecord, PlanRecord, Record, RecordingCore, decode_all, replay
from shoal.core.router import Router, RoutingConfig
from shoal.core.scheduler import Scheduler
from shoal.core.types import Request, StepPlan
from shoal.engine.in_process import InProcExecutor
from shoal.sim.fleet_simulation import FleetSimulation
from shoal.sim.flight import GREEDY
from shoal.sim.requests import Arrival
from tests.checkpoints import VOCAB, make_checkpoint

SHARED = 20
"""Tokens at the beginning of every prompt."""


def requests(seed: int, count: int = 14) -> list[tuple[int, Request]]:
    """With after how many steps they come: while others run, and one once all have ended."""
    rng = random.Random(seed)
    made, at = [], 0
    prefix = [rng.randrange(VOCAB) for _ in range(SHARED)]
    for number in range(count):
        at += 400 if number == count - 1 else rng.randint(0, 3)
        prompt = prefix + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))]
        made.append((at, Request(id=f"{number}.1", prompt=prompt, max_tokens=rng.randint(20, 60), sampling=GREEDY)))
    return made


def live(checkpoint: Path, coming: list[tuple[int, Request]]) -> list[Record]:
    """What a real engine did, as recorded."""
    config = EngineConfig(model=str(checkpoint), device="cpu", threads=1, max_len=128, kv_cache_bytes=1 << 20)
    executor = InProcExecutor(config)
    info = executor.start()
    scheduler = SchedulerConfig(
        num_blocks=10,  # so few that they preempt one another
        max_len=128,
        vocab_size=info.spec.vocab_size,
        max_sequences=4,
        max_batch_tokens=24,
    )
    lines: list[bytes] = []
    core = RecordingCore(scheduler, lines.append)
    waiting, plans, began = deque(coming), deque[StepPlan](), time.monotonic()

    def plan() -> None:
        while (made := core.plan(time.monotonic() - began)) is not None:
            executor.submit(made)
            plans.append(made)

    while waiting or core.has_work():
        while waiting and (waiting[0][0] <= core.load().steps or not core.has_work()):
            core.add(waiting.popleft()[1], time.monotonic() - began)
            if not plans:
                plan()
        if plans:
            result = executor.poll()
            assert result is not None
            core.commit(plans.popleft().plan_id, result, time.monotonic() - began)
            plan()
    executor.stop()
    assert core.load().preemptions > 0
    return list(decode_all(lines))


class SimulatedRecording(RecordingCore):
    """In the place of a replica's core: records what it is asked, too."""

    @property
    def scheduler(self) -> Scheduler:
        return self.core.scheduler

    @property
    def pool(self) -> BlockPool:
        return self.core.scheduler.pool


def simulated(records: list[Record]) -> list[Record]:
    """The same requests at the same times, with steps as long as they were, through the simulator."""
    adds = [record for record in records if isinstance(record, AddRecord)]
    arrivals = [
        Arrival(
            id=record.request.id.removesuffix(".1"),
            at=record.now,
            runs=tuple((token, 1) for token in record.request.prompt),
            num_output=record.request.max_tokens,
            limit=record.request.max_tokens,
        )
        for record in adds
    ]
    seconds, lines = iter(durations(records)), list[bytes]()

    def law(shape: StepShape) -> float:
        return next(seconds)

    config = next(record.config for record in records if not isinstance(record, AddRecord))  # type: ignore[union-attr]
    simulation = FleetSimulation(Router(RoutingConfig()), arrivals, 1, config, law)
    simulation.replicas["r000"].core = SimulatedRecording(config, lines.append)  # type: ignore[assignment]
    outcomes = simulation.run()
    assert all(outcome.status == "done" for outcome in outcomes)
    return list(decode_all(lines))


def durations(records: list[Record]) -> list[float]:
    """Of each step: from the commit before it, or from the request that came when there was none, to its own."""
    found, begun = [], 0.0
    idle = True
    for record in records:
        if isinstance(record, AddRecord) and idle:
            begun = record.now
        elif isinstance(record, PlanRecord) and record.plan is not None:
            idle = False
        elif isinstance(record, CommitRecord):
            found.append(record.now - begun)
            begun, idle = record.now, True
    return found


def planned(records: list[Record]) -> list[StepPlan]:
    """Plans, with tokens that were generated counted instead of named: a simulation knows how many, not which."""
    plans = [record.plan for record in records if isinstance(record, PlanRecord) and record.plan is not None]
    return [
        msgspec.structs.replace(
            plan,
            assigned=[
                msgspec.structs.replace(one, tokens=[*one.tokens[: one.num_prompt], len(one.tokens)])
                for one in plan.assigned
            ],
        )
        for plan in plans
    ]


def test_a_live_run_is_planned_alike_in_the_simulator(tmp_path: Path) -> None:
    records = live(make_checkpoint("llama", tmp_path), requests(seed=1))
    ours = simulated(records)
    assert len(planned(records)) > 20
    assert planned(ours) == planned(records)
    assert replay(records) == replay(ours) == len(planned(records))


def test_the_comparison_sees_a_scheduler_that_differs(tmp_path: Path) -> None:
    """Control: with other block counts the plans are others."""
    records = live(make_checkpoint("llama", tmp_path), requests(seed=2))
    first = records[0]
    records[0] = msgspec.structs.replace(first, config=msgspec.structs.replace(first.config, num_blocks=64))  # type: ignore[union-attr]
    seconds = durations(records)
    ours = _with_spare_seconds(records, seconds)
    assert planned(ours) != planned(records)


def _with_spare_seconds(records: list[Record], seconds: list[float]) -> list[Record]:
    last = records[-1]
    assert isinstance(last, PlanRecord)
    extra = [CommitRecord(0, None, last.now + 0.001 * number) for number in range(1, 400)]  # type: ignore[arg-type]
    return simulated([*records, *extra])


def test_replicas_and_gateway_hold_the_production_classes() -> None:
    simulation = FleetSimulation(
        Router(RoutingConfig()),
        [],
        1,
        SchedulerConfig(num_blocks=8, max_len=64, vocab_size=100),
        lambda shape: 0.01,
    )
    assert type(simulation.replicas["r000"].core) is EngineCore
    assert type(simulation.chooser) is Router
    assert type(simulation.gateway.dispatch) is Dispatch
    for part in (
        simulation.gateway.dispatch.queue,
        simulation.members["r000"].watch,
        simulation.members["r000"].breaker,
    ):
        assert type(part).__module__.startswith("shoal.core.")
