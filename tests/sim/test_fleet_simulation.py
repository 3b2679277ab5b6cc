"""The simulation: nothing is lost, equal runs are equal, times follow the law; and the real router over real cores."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from shoal.core.config import SchedulerConfig
from shoal.core.hashing import chain
from shoal.core.router import PolicyName, Router, RoutingConfig
from shoal.sim.fleet_simulation import FleetSimulation
from shoal.sim.law import StepTime
from shoal.sim.requests import Arrival, Outcome

LAW = StepTime(base=0.01, prefill_token=1e-4, sequence=1e-4, kv_token=1e-8)
CONFIG = SchedulerConfig(
    num_blocks=2048, block_size=32, max_len=40_000, vocab_size=1 << 30, max_sequences=16, max_batch_tokens=1024
)


def arrivals(count: int, rate: float, *, long_every: int = 0, shared: int = 0, seed: int = 0) -> list[Arrival]:
    rng = random.Random(seed)
    made, at = [], 0.0
    for number in range(count):
        at += rng.expovariate(rate)
        length = 16_384 if long_every and number % long_every == long_every // 2 else rng.randint(50, 600)
        runs = ((1, shared), (number + 2, length)) if shared else ((number + 2, length),)
        blocks = tuple(chain([token for token, times in runs for _ in range(times)], 32))
        output = rng.randint(5, 60)
        made.append(Arrival(id=str(number), at=at, runs=runs, num_output=output, limit=2000, blocks=blocks))
    return made


def simulate(
    requests: list[Arrival], policy: PolicyName = "predicted_completion", replicas: int = 8, **options: float
) -> FleetSimulation:
    router = Router(RoutingConfig(policy=policy, block_size=32))
    return FleetSimulation(router, requests, replicas, CONFIG, LAW, **options)  # type: ignore[arg-type]


def ttft(outcomes: list[Outcome], share: float) -> float:
    waits = sorted(o.first_token - o.arrived for o in outcomes if o.first_token is not None)
    return waits[int(len(waits) * share)]


def test_one_request_takes_what_the_law_says() -> None:
    simulation = simulate([Arrival(id="a", at=2.0, runs=((5, 100),), num_output=3, limit=100)], replicas=1)
    (outcome,) = simulation.run()
    first = 2.0 + 0.01 + 100 * 1e-4 + 100 * 1e-8
    assert outcome.first_token == pytest.approx(first)
    assert outcome.end == pytest.approx(first + 2 * (0.01 + 1e-4) + (101 + 102) * 1e-8)


@pytest.mark.parametrize("interval", [None, 0.0, 0.3])
def test_everything_ends_and_a_run_can_be_repeated(interval: float | None) -> None:
    requests = arrivals(150, 60, long_every=40, shared=256)
    runs = []
    for _ in range(2):
        simulation = simulate(requests, report_interval=interval, report_delay=0.1 if interval else 0.0)
        runs.append(simulation.run())
        assert isinstance(simulation.chooser, Router)
        simulation.chooser.check()
        for replica in simulation.replicas.values():
            replica.core.check()
            assert not replica.core.has_work()
            assert simulation.chooser.requests(replica.name) == 0
            assert simulation.chooser.outstanding(replica.name) == pytest.approx(0, abs=1e-6)
    assert runs[0] == runs[1]
    assert all(o.end is not None and not o.rejected for o in runs[0])
    assert sum(o.num_cached for o in runs[0]) > 150 * 256 / 2


def test_plans_in_flight_overlap() -> None:
    config = CONFIG
    for depth in (1, 2):
        router = Router(RoutingConfig(block_size=32))
        deep = SchedulerConfig(
            num_blocks=config.num_blocks, block_size=32, max_len=40_000, vocab_size=1 << 30, depth=depth
        )
        outcomes = FleetSimulation(router, arrivals(40, 60), 2, deep, LAW).run()
        assert all(o.end is not None for o in outcomes)


def test_what_cannot_run_is_rejected_and_what_finds_no_replica_waits_for_one() -> None:
    requests = [
        Arrival(id="long", at=0.0, runs=((5, 50_000),), num_output=3, limit=100),
        Arrival(id="early", at=0.0, runs=((5, 50),), num_output=3, limit=100),
    ]
    outcomes = simulate(requests, replicas=1).run()
    assert [o.rejected for o in outcomes] == [True, False]
    simulation = simulate(requests[1:], replicas=0)
    simulation.at(3.0, lambda: simulation.add("late") and None)
    (outcome,) = simulation.run()
    assert outcome.endpoint == "late"
    assert outcome.first_token is not None and outcome.first_token > 3.0


def test_a_few_long_prompts_hold_up_half_as_many_as_in_turn() -> None:
    requests = arrivals(800, 80, long_every=150)
    p99 = {policy: ttft(simulate(requests, policy).run(), 0.98) for policy in ("round_robin", "predicted_completion")}
    assert p99["predicted_completion"] < p99["round_robin"] / 2


def test_a_shared_prompt_is_found_and_pulls_nobody_aside() -> None:
    requests = arrivals(400, 80, shared=2048)
    simulation = simulate(requests)
    outcomes = simulation.run()
    counts = Counter(o.endpoint for o in outcomes)
    assert max(counts.values()) < 2 * 400 / 8
    assert sum(o.num_cached for o in outcomes) > 0.8 * 400 * 2048


def test_a_slow_replica_loses_its_share_and_gets_it_back() -> None:
    requests = arrivals(1600, 40)
    shares = {}
    for policy in ("predicted_completion", "round_robin"):
        simulation = simulate(requests, policy, replicas=4)

        def pace(factor: float, simulation: FleetSimulation = simulation) -> None:
            simulation.replicas["r001"].slowness = factor

        simulation.at(10.0, lambda pace=pace: pace(6.0))  # type: ignore[misc]
        simulation.at(20.0, lambda pace=pace: pace(1.0))  # type: ignore[misc]
        outcomes = simulation.run()
        spans = ((0.0, 10.0), (11.0, 20.0), (28.0, 40.0))
        shares[policy] = [
            Counter(o.endpoint for o in outcomes if begin <= o.arrived < end)["r001"]
            / sum(begin <= o.arrived < end for o in outcomes)
            for begin, end in spans
        ]
    before, slow, after = shares["predicted_completion"]
    assert before > 0.15
    assert slow < 0.1
    assert after > 0.12
    assert shares["round_robin"][1] > 0.2  # control: the fault alone does not keep requests away
