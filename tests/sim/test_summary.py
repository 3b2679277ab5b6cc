"""Definitions of the metrics, on runs whose times can be worked out by hand."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.admission import AdmissionConfig
from shoal.core.config import SchedulerConfig
from shoal.core.cost.types import StepShape
from shoal.core.failover import FailoverConfig
from shoal.core.router import Router, RoutingConfig
from shoal.sim.autoscale import Autoscaler, Autoscaling, AutoscalingError, check
from shoal.sim.fleet_simulation import FleetSimulation, FrontEnd
from shoal.sim.gateway import Rules
from shoal.sim.histogram import Histogram, percentile
from shoal.sim.law import StepLaw, StepTime, remembered
from shoal.sim.requests import Arrival
from shoal.sim.summary import Target, summarise

CONFIG = SchedulerConfig(
    num_blocks=512, block_size=16, max_len=2048, vocab_size=1 << 30, max_sequences=8, max_batch_tokens=256
)


def arrival(number: int, at: float, prompt: int, output: int) -> Arrival:
    return Arrival(id=str(number), at=at, runs=((16 + number, prompt),), num_output=output, limit=output, blocks=None)


def simulate(requests: list[Arrival], law: StepLaw, replicas: int = 1, **more: object) -> FleetSimulation:
    simulation = FleetSimulation(
        Router(RoutingConfig()),
        requests,
        replicas,
        CONFIG,
        law,
        rules=Rules(),
        **more,  # type: ignore[arg-type]
    )
    simulation.run()
    return simulation


def test_times_of_one_request() -> None:
    simulation = simulate(
        [arrival(0, 1.0, 100, 5)],
        lambda shape: 0.5,
        front=FrontEnd(delay=0.1, request_seconds=0.05, token_seconds=0.001),
    )
    summary = summarise(simulation, Target(ttft=1.0, tpot=0.5, e2e=3.0), 4, 3.6)
    assert summary.ttft.p50 == pytest.approx(0.75)
    assert summary.tpot.p50 == pytest.approx(0.5)
    assert summary.itl.count == 4
    assert summary.itl.mean == pytest.approx(0.5)
    assert summary.itl.p99 == pytest.approx(0.5, rel=0.01)
    assert summary.e2e.greatest == pytest.approx(2.75)
    assert (summary.good, summary.goodput) == (1, pytest.approx(1 / 2.75))
    assert summary.output_tokens_per_second == pytest.approx(5 / 2.75)
    assert summary.output_tokens_per_second_per_gpu == pytest.approx(5 / (4 * 3.75))  # from time 0 on
    assert summary.dollars == pytest.approx(4 * 3.75 / 3600 * 3.6)
    assert summary.busy.mean == pytest.approx(2.5 / simulation.now, rel=0.01)


def test_gaps_are_pooled_and_means_are_of_requests() -> None:
    """A step takes 0.1 s a row. The first request's comes alone, its next three beside the second's three rows."""
    simulation = simulate([arrival(0, 0.0, 10, 9), arrival(1, 0.0, 10, 3)], lambda shape: 0.1 * shape.rows)
    summary = summarise(simulation, Target(tpot=0.15), 1, None)
    assert summary.itl.count == 10
    assert summary.itl.mean == pytest.approx((5 * 0.2 + 5 * 0.1) / 10)
    assert summary.itl.p50 == pytest.approx(0.1, rel=0.01)
    assert summary.itl.p90 == pytest.approx(0.2, rel=0.01)
    assert summary.tpot.p50 == pytest.approx((3 * 0.2 + 5 * 0.1) / 8)
    assert summary.tpot.greatest == pytest.approx(0.2)
    assert summary.good == 1
    assert summary.dollars is None


def test_preemptions_and_cache_hits_are_counted() -> None:
    rng = random.Random(0)
    crowd = [arrival(n, 0.01 * n, rng.randint(300, 900), 700) for n in range(24)]
    summary = summarise(simulate(crowd, lambda shape: 0.02), Target(), 1, None)
    assert summary.preemptions > 0
    assert summary.kv_usage_peak > 0.95
    assert summary.completed == 24
    again = [Arrival(id=f"{n}", at=5.0 * n, runs=((16, 256),), num_output=2, limit=2, blocks=None) for n in range(4)]
    summary = summarise(simulate(again, lambda shape: 0.02), Target(), 1, None)
    assert summary.cached_tokens == 3 * 240  # the last block is computed again
    assert summary.cache_hit_rate == pytest.approx(3 * 240 / (4 * 256))


def test_a_run_that_is_cut_short_says_so() -> None:
    simulation = simulate([arrival(0, 0.0, 10, 1000)], lambda shape: 0.1, until=5.0)
    summary = summarise(simulation, Target(e2e=100.0), 1, None)
    assert (summary.unfinished, summary.completed, summary.good) == (1, 0, 0)
    assert summary.e2e.p50 is None


def test_rates_of_a_run_that_is_cut_are_over_the_time_until_then() -> None:
    summary = summarise(simulate([arrival(0, 1.0, 10, 1000)], lambda shape: 0.1, until=5.0), Target(), 1, 3600.0)
    assert summary.completed == 0
    assert summary.seconds == pytest.approx(4.0, abs=0.11)
    assert summary.output_tokens_per_second == pytest.approx(10, rel=0.05)
    assert summary.dollars == pytest.approx(5.0, abs=0.11)


def test_the_window_reaches_to_the_end_of_what_failed() -> None:
    late = Rules(failover=FailoverConfig(wait_seconds=7.0))
    requests = [arrival(n, 0.0, 10, 40) for n in range(2)]
    simulation = FleetSimulation(Router(RoutingConfig()), requests, 1, CONFIG, lambda shape: 0.1, rules=late)
    simulation.at(2.0, lambda: simulation.kill("r000", "told", back_after=100.0))
    simulation.run()
    summary = summarise(simulation, Target(), 1, None)
    assert (summary.failed, summary.completed) == (2, 0)
    assert summary.seconds == pytest.approx(9.0, abs=0.2)
    assert summary.output_tokens == sum(outcome.generated for outcome in simulation.outcomes.values()) > 0
    assert summary.ttft.p50 is None and summary.tpot.p50 is None  # they failed: as good as never


def test_what_does_not_fit_is_refused_unread_and_what_reaches_the_limit_is_cut_short() -> None:
    requests = [arrival(0, 0.0, 10**12, 5), arrival(1, 0.0, 2047, 5), arrival(2, 0.0, 2048, 5), arrival(3, 0.0, 100, 9)]
    simulation = simulate(requests, lambda shape: 0.1)
    assert [(o.status, o.generated) for o in simulation.outcomes.values()] == [
        ("rejected", 0),
        ("done", 1),
        ("rejected", 0),
        ("done", 9),
    ]
    summary = summarise(simulation, Target(tpot=0.1), 1, None)
    assert (summary.shortened, summary.output_tokens) == (1, 10)
    assert summary.tpot.count == 3  # one token has no next
    (longest,) = simulate([arrival(0, 0.0, 2000, 500)], lambda shape: 0.1).outcomes.values()
    assert (longest.generated, longest.tpot) == (48, pytest.approx(0.1))


def test_samples_add_up() -> None:
    requests = [arrival(n, 0.3 * n, 100, 20) for n in range(40)]
    simulation = simulate(requests, StepTime(), replicas=2, sample_interval=1.0)
    assert sum(sample.arrived for sample in simulation.samples) == 40
    assert sum(sample.completed for sample in simulation.samples) == 40
    seconds = [b.at - a for a, b in zip([0.0, *(s.at for s in simulation.samples)], simulation.samples, strict=False)]
    made = sum(s.output_tokens_per_second * t for s, t in zip(simulation.samples, seconds, strict=True))
    assert made == pytest.approx(800)
    assert all(0 <= sample.busy <= 1 and sample.ready == 2 for sample in simulation.samples)


def test_a_pipeline_makes_a_step_every_stage() -> None:
    config = SchedulerConfig(
        num_blocks=512, max_len=2048, vocab_size=1 << 30, max_sequences=8, max_batch_tokens=256, depth=2, stages=2
    )
    requests = [arrival(n, 0.0, 10, 51) for n in range(2)]

    def total(shape: StepShape) -> float:
        return 0.2

    simulation = FleetSimulation(Router(RoutingConfig()), requests, 1, config, total, stage_law=lambda shape: 0.1)
    outcomes = simulation.run()
    # Each sequence waits for its own token to pass both stages; two of them keep both stages busy.
    assert [outcome.tpot for outcome in outcomes] == [pytest.approx(0.2, rel=0.02)] * 2
    assert simulation.replicas["r000"].totals()[0] >= 100  # a step of each, in turn
    assert simulation.now < 50 * 0.2 + 0.6  # and not one after the other


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_the_histogram_agrees_with_all_values(values: list[float], share: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    assert histogram.percentile(share) == pytest.approx(percentile(sorted(values), share), rel=0.0051)
    assert histogram.sum == pytest.approx(sum(values))


# --- autoscaling ------------------------------------------------------------------------------------------------------


def scaled(measure: str, target: float, requests: list[Arrival], start: float = 10.0) -> FleetSimulation:
    simulation = FleetSimulation(
        Router(RoutingConfig()),
        requests,
        1,
        CONFIG,
        StepTime(base=0.05),
        rules=Rules(),
        start_seconds=start,
        sample_interval=5.0,
    )
    policy = Autoscaling(measure=measure, target=target, least=1, most=6, down_seconds=30.0)  # type: ignore[arg-type]
    Autoscaler(policy, simulation)
    simulation.run()
    return simulation


def wave() -> list[Arrival]:
    """Five a second for a minute, then one in five seconds."""
    busy = [arrival(n, 0.2 * n, 200, 60) for n in range(300)]
    return busy + [arrival(300 + n, 60.0 + 5.0 * n, 200, 60) for n in range(40)]


@pytest.mark.parametrize(("measure", "target"), [("queue", 2.0), ("running", 0.6), ("kv", 0.2)])
def test_more_come_with_load_after_a_start_and_go_without(measure: str, target: float) -> None:
    simulation = scaled(measure, target, wave())
    assert all(outcome.status == "done" for outcome in simulation.outcomes.values())
    assert not any(outcome.moves for outcome in simulation.outcomes.values())  # drained, not cut off
    asked = next(one.time for one in simulation.events if one.kind == "scaled_up")
    ready = next(one.time for one in simulation.events if one.kind == "endpoint_ready")
    assert ready == pytest.approx(asked + 10.0)
    assert 1 < simulation.most_replicas <= 6
    assert simulation.samples[-1].ready == 1
    summary = summarise(simulation, Target(), 2, 1.0)
    assert summary.gpus == 2 * simulation.most_replicas
    assert summary.gpu_hours < summary.gpus * summary.seconds / 3600


def test_fewer_at_once_where_nothing_is_waited_for() -> None:
    simulation = FleetSimulation(
        Router(RoutingConfig()), wave(), 3, CONFIG, StepTime(base=0.05), rules=Rules(), start_seconds=10.0, spares=1
    )
    kept: list[int] = []
    scaler = Autoscaling(measure="running", target=0.6, least=1, most=3, down_seconds=0.0)
    Autoscaler(scaler, simulation)
    simulation.at(40.0, lambda: kept.append(simulation.num_replicas))
    simulation.run()
    drained = [one.endpoint for one in simulation.events if one.kind == "draining"]
    assert drained and "r003" not in drained  # the spare is no part of it
    assert simulation.most_replicas <= 4
    assert not any(outcome.endpoint == "r003" for outcome in simulation.outcomes.values())


def test_those_that_still_end_what_they_have_hold_their_devices() -> None:
    """Load that comes and goes faster than long outputs end: never more than fit, though some are draining."""
    bursts = [arrival(100 * burst + n, 40.0 * burst, 100, 900) for burst in range(4) for n in range(24)]
    patient = Rules(admission=AdmissionConfig(max_wait_seconds=1e9))
    simulation = FleetSimulation(
        Router(RoutingConfig()), bursts, 1, CONFIG, StepTime(base=0.1), rules=patient, start_seconds=1.0
    )
    Autoscaler(Autoscaling(measure="queue", target=1.0, least=1, most=3, interval=5.0, down_seconds=0.0), simulation)
    simulation.run()
    assert any(one.kind == "draining" for one in simulation.events)
    assert simulation.most_replicas == 3
    assert all(outcome.status == "done" for outcome in simulation.outcomes.values())


def test_bounds_are_checked() -> None:
    for policy, says in (
        (Autoscaling(measure="queue", target=0.0, least=1, most=2), "above 0"),
        (Autoscaling(measure="kv", target=1.5, least=1, most=2), "at most 1"),
        (Autoscaling(measure="kv", target=0.5, least=3, most=2), "3 to 2"),
    ):
        with pytest.raises(AutoscalingError, match=says):
            check(policy)


def test_a_law_that_is_remembered_is_the_same_law() -> None:
    asked: list[StepShape] = []

    def law(shape: StepShape) -> float:
        asked.append(shape)
        return StepTime()(shape)

    shapes = [
        StepShape(
            decode_rows=rows, decode_context=100 * context, sampled=sampled, prefill_rows=prefill, prefill_tokens=9
        )
        for rows in (0, 1, 4, 5)
        for context in (1, 2)
        for sampled in (0, 1)
        for prefill in (0, 1)
    ]
    seconds = remembered(law)
    assert [seconds(shape) for shape in shapes * 2] == [StepTime()(shape) for shape in shapes * 2]
    assert len(shapes) < len(asked) < 2 * len(shapes)


def test_a_front_end_takes_one_after_the_other_in_each_process() -> None:
    requests = [arrival(n, 0.0, 100, 1) for n in range(4)]
    for processes, expected in ((1, [0.6, 1.1, 1.6, 2.1]), (2, [0.6, 0.6, 1.1, 1.1]), (9, [0.6] * 4)):
        front = FrontEnd(delay=0.1, request_seconds=0.3, token_seconds=0.002, processes=processes)
        assert [at for at, _ in front.passed(requests)] == pytest.approx(expected)
