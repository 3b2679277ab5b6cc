"""What befalls a simulated fleet: nothing that was delivered is lost or made twice, and everything is told."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.core.admission import AdmissionConfig
from shoal.core.config import SchedulerConfig
from shoal.core.failover import FailoverConfig
from shoal.core.router import Router, RoutingConfig
from shoal.plan.units import duration
from shoal.sim.autoscale import Autoscaler, Autoscaling, Measure
from shoal.sim.faults import Fault, FaultError, parse, schedule
from shoal.sim.fleet_simulation import FleetSimulation
from shoal.sim.gateway import Rules
from shoal.sim.law import Laws, StepTime
from shoal.sim.requests import Arrival
from shoal.sim.summary import Target, summarise

LAW = StepTime(base=0.02, prefill_token=1e-4, sequence=1e-4, kv_token=1e-8)
CONFIG = SchedulerConfig(
    num_blocks=1024, block_size=16, max_len=4096, vocab_size=1 << 30, max_sequences=16, max_batch_tokens=512
)


def load(count: int = 120, rate: float = 12.0, seed: int = 0) -> list[Arrival]:
    rng, at, made = random.Random(seed), 0.0, []
    for number in range(count):
        at += rng.expovariate(rate)
        runs = ((number + 16, rng.randint(20, 800)),)
        output = rng.randint(1, 80)
        made.append(Arrival(id=str(number), at=at, runs=runs, num_output=output, limit=200, blocks=None))
    return made


def slower(factor: float) -> Laws:
    return Laws(lambda shape: LAW(shape) * factor)


def run(
    faults: list[Fault], replicas: int = 3, requests: list[Arrival] | None = None, **more: object
) -> FleetSimulation:
    rules = more.pop("rules", Rules())
    router = Router(RoutingConfig())
    simulation = FleetSimulation(
        router,
        load() if requests is None else requests,
        replicas,
        CONFIG,
        LAW,
        rules=rules,  # type: ignore[arg-type]
        report_interval=0.0,
        start_seconds=5.0,
        **more,  # type: ignore[arg-type]
    )
    schedule(faults, simulation, slower, rank_seconds=2.0)
    simulation.run()
    for replica in simulation.replicas.values():
        replica.core.check()
    router.check()
    simulation.gateway.dispatch.queue.check()
    assert sum(outcome.generated for outcome in simulation.outcomes.values()) == simulation.gateway.generated_tokens
    return simulation


def tokens(simulation: FleetSimulation) -> int:
    return sum(outcome.num_output for outcome in simulation.outcomes.values() if outcome.status == "done")


@pytest.mark.parametrize(
    ("kind", "event", "moves"),
    [("kill", "endpoint_lost", True), ("rank", "rank_lost", True), ("hang", "endpoint_hung", True)],
)
def test_requests_go_on_elsewhere_with_what_they_have(kind: str, event: str, moves: bool) -> None:
    simulation = run([Fault(kind=kind, at=4.0, replica=1, seconds=20.0)])  # type: ignore[arg-type]
    outcomes = simulation.outcomes.values()
    assert all(outcome.status == "done" for outcome in outcomes)
    # Each token was delivered once, and drawn once or, where it was lost with its engine, never delivered.
    assert simulation.gateway.generated_tokens == tokens(simulation)
    assert event in [one.kind for one in simulation.events if one.endpoint == "r001"]
    assert (sum(outcome.moves for outcome in outcomes) > 0) == moves
    assert not simulation.gateway.flights


def test_without_faults_nothing_moves_and_nothing_is_told() -> None:
    simulation = run([])
    assert not simulation.events
    assert not any(outcome.moves or outcome.retries for outcome in simulation.outcomes.values())


def test_a_killed_endpoint_is_back_and_gets_requests_again() -> None:
    simulation = run([Fault(kind="kill", at=2.0, replica=0, seconds=1.5)])
    back = [one.time for one in simulation.events if one.kind == "endpoint_ready"]
    assert back == [pytest.approx(3.5)]
    assert any(o.endpoint == "r000" and o.arrived > 3.5 for o in simulation.outcomes.values())
    assert simulation.members["r000"].up_seconds(10.0) == pytest.approx(8.5)


def test_killed_alone_it_is_waited_for() -> None:
    simulation = run([Fault(kind="kill", at=4.0, replica=0, seconds=3.0)], replicas=1, requests=load(40))
    assert all(outcome.status == "done" for outcome in simulation.outcomes.values())
    late = run(
        [Fault(kind="kill", at=2.0, replica=0, seconds=500.0)],
        replicas=1,
        requests=load(40),
        rules=Rules(failover=FailoverConfig(wait_seconds=10.0)),
    )
    failed = [outcome for outcome in late.outcomes.values() if outcome.status == "failed"]
    assert failed and {outcome.reason for outcome in failed} == {"no endpoint was available"}


def test_spares_serve_only_while_another_is_lost() -> None:
    assert not any(o.endpoint == "r002" for o in run([], replicas=2, spares=1).outcomes.values())
    simulation = run([Fault(kind="kill", at=2.0, replica=0, seconds=4.0)], replicas=2, spares=1)
    served = [outcome.arrived for outcome in simulation.outcomes.values() if outcome.endpoint == "r002"]
    assert served and max(served) < 8.0


@pytest.mark.parametrize("kind", ["throttle", "link"])
def test_a_slow_replica_is_slow_for_as_long_as_it_lasts(kind: str) -> None:
    one = Arrival(id="a", at=0.0, runs=((16, 50),), num_output=101, limit=200)
    before = run([], replicas=1, requests=[one]).outcomes["a"].tpot
    fault = Fault(kind=kind, at=0.5, replica=None, seconds=1.0, factor=3.0)  # type: ignore[arg-type]
    after = run([fault], replicas=1, requests=[one]).outcomes["a"].tpot
    assert before is not None and after is not None
    # A third as many steps in that second as usual, so two thirds of a second more over 100 gaps.
    assert after - before == pytest.approx(2 / 3 / 100, rel=0.15)


def test_more_than_the_queue_takes_is_refused_and_counts_as_never() -> None:
    rules = Rules(admission=AdmissionConfig(max_requests=10, max_wait_seconds=2.0))
    simulation = run([], replicas=1, requests=load(400, rate=200.0), rules=rules)
    summary = summarise(simulation, Target(ttft=1.0), 1, 2.0)
    assert summary.rejected > 50
    assert summary.completed + summary.rejected == 400
    assert summary.ttft.p99 is None  # infinite
    assert summary.ttft.p50 is None or summary.rejected < 200
    assert summary.good <= summary.completed


def test_runs_with_faults_can_be_repeated() -> None:
    faults = [
        Fault(kind="kill", at=2.0, replica=0),
        Fault(kind="rank", at=3.0, replica=1),
        Fault(kind="hang", at=4.0, replica=2, seconds=6.0),
        Fault(kind="throttle", at=5.0, replica=None, factor=2.0),
    ]
    first, second = run(faults, sample_interval=1.0), run(faults, sample_interval=1.0)
    assert first.outcomes == second.outcomes
    assert first.samples == second.samples
    assert first.events == second.events


FAULTS = st.lists(
    st.builds(
        Fault,
        kind=st.sampled_from(["kill", "rank", "hang", "throttle", "link"]),
        at=st.floats(0.0, 8.0),
        replica=st.one_of(st.none(), st.integers(0, 2)),
        seconds=st.floats(0.1, 6.0),
        factor=st.floats(1.0, 5.0),
    ),
    max_size=6,
)


@settings(max_examples=25, deadline=None)
@given(
    FAULTS,
    st.integers(0, 1000),
    st.sampled_from([None, "queue", "running", "kv"]),
    st.sampled_from([1, 2]),
    st.integers(0, 1),
)
def test_whatever_happens_every_request_ends_once_with_the_tokens_that_it_was_given(
    faults: list[Fault], seed: int, measure: Measure | None, depth: int, spares: int
) -> None:
    requests = load(40, seed=seed)
    told: Counter[str] = Counter()
    simulation = FleetSimulation(
        Router(RoutingConfig()),
        requests,
        3,
        msgspec.structs.replace(CONFIG, depth=depth, num_blocks=256, max_len=850),
        LAW,
        rules=Rules(failover=FailoverConfig(wait_seconds=3.0)),
        spares=spares,
        start_seconds=2.0,
        sample_interval=0.5,
    )
    schedule(faults, simulation, slower, rank_seconds=1.0)
    if measure is not None:
        Autoscaler(
            Autoscaling(measure=measure, target=0.5, least=1, most=4, interval=1.0, down_seconds=0.0), simulation
        )
    over = simulation.gateway.dispatch.over

    def count(request_id: str) -> None:
        told[request_id] += 1
        over(request_id)

    simulation.gateway.dispatch.over = count  # type: ignore[method-assign]
    outcomes = simulation.run()
    assert told == Counter(one.id for one in requests)
    for outcome, asked in zip(outcomes, requests, strict=True):
        assert outcome.id == asked.id
        assert outcome.status in ("done", "failed")
        if outcome.status == "done":
            assert outcome.generated == min(asked.num_output, 850 - asked.num_prompt)
            assert outcome.first_token is not None and outcome.end is not None
            assert asked.at <= outcome.first_token <= outcome.end
        else:
            assert outcome.reason and outcome.end is None and outcome.generated < asked.num_output
    gateway = simulation.gateway
    assert sum(outcome.generated for outcome in outcomes) == gateway.generated_tokens
    # Each token but the first of a sequence ends a gap.
    begun = sum(outcome.generated > 0 for outcome in outcomes)
    assert simulation.gaps.count == gateway.generated_tokens - begun
    assert sum(sample.completed for sample in simulation.samples) == sum(s.arrived for s in simulation.samples) == 40
    assert all(0 <= sample.busy <= 1 and 0 <= sample.kv_usage <= 1 for sample in simulation.samples)
    assert not gateway.flights and not gateway.dispatch.num_waiting
    for member in simulation.members.values():
        assert not member.attempts and not member.num_sequences
        assert not member.replica.core.has_work()
        member.replica.core.check()
    assert simulation.num_replicas <= 4 + spares


def test_faults_are_read_as_they_are_written() -> None:
    assert parse("kill, replica=3, at=60s, for=30s", duration) == Fault(kind="kill", at=60.0, replica=3, seconds=30.0)
    assert parse("throttle,replica=all,at=1min,factor=1.5", duration) == Fault(
        kind="throttle", at=60.0, replica=None, factor=1.5
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kil,replica=0,at=1s", "did you mean kill"),
        ("kill,replica=0", "at= is missing"),
        ("kill,at=1s", "replica= is missing"),
        ("kill,replica=x,at=1s", "write its number"),
        ("kill,replica=0,at=5", "needs a unit"),
        ("kill,replica=0,at=1s,factor=2", "says nothing of kill"),
        ("kill,replica=0,at=1s,at=2s", "given twice"),
        ("kill,replica=0,when=1s", "none of replica="),
        ("hang,replica=0,at=1s", "for= is missing"),
        ("link,replica=0,at=1s", "factor= is missing"),
        ("link,replica=0,at=1s,factor=0.5", "at least 1"),
        ("link,replica=0,at=1s,factor=much", "factor is much: write how many times slower"),
        ("link,replica=0,at=1s,factor=nan", "at least 1"),
    ],
)
def test_what_makes_no_sense_is_said(text: str, says: str) -> None:
    with pytest.raises(FaultError, match=says.replace("(", r"\(")):
        parse(text, duration)


def test_a_fault_of_no_replica_is_refused() -> None:
    with pytest.raises(FaultError, match="there are 3"):
        run([Fault(kind="kill", at=1.0, replica=3)])


def test_slow_downs_that_overlap_multiply_and_end_each_by_itself() -> None:
    simulation = FleetSimulation(Router(RoutingConfig()), load(30), 2, CONFIG, LAW, stage_law=LAW, rules=Rules())
    asked: list[float] = []

    def counted(factor: float) -> Laws:
        asked.append(factor)
        return Laws(lambda shape: LAW(shape) * factor, lambda shape: LAW(shape) * factor)

    faults = [
        Fault(kind=kind, at=at, replica=None, seconds=seconds, factor=factor)  # type: ignore[arg-type]
        for kind in ("throttle", "link")
        for at, seconds, factor in ((0.1, 2.0, 1.1), (0.2, 0.5, 3.0), (0.3, 1.0, 1.7))
    ]
    schedule(faults, simulation, counted, rank_seconds=2.0)
    replica, seen = simulation.replicas["r001"], []
    for time in (0.0, 0.15, 0.25, 0.35, 0.8, 1.4, 2.2):
        simulation.at(time, lambda: seen.append((replica.slowness, replica.laws)))
    simulation.run()
    expected = [1, 1.1, 1.1 * 3, 1.1 * 3 * 1.7, 1.1 * 1.7, 1.1, 1]
    assert [slowness for slowness, _ in seen] == pytest.approx(expected)
    assert seen[0] == seen[-1] == (1.0, simulation.laws)  # exactly
    assert len(asked) == len(set(asked)) == 4  # once a factor, whatever the number of replicas
    assert all(laws.stage is not None for _, laws in seen)


def test_hangs_that_overlap_end_with_the_last_and_are_not_work() -> None:
    one = [Arrival(id="a", at=0.0, runs=((16, 50),), num_output=61, limit=200)]
    quiet = Rules(watch=False)
    plain = run([], replicas=1, requests=one, rules=quiet, sample_interval=0.2)
    hangs = [Fault(kind="hang", at=at, replica=0, seconds=1.0) for at in (0.5, 0.9, 1.2)]
    hung = run(hangs, replicas=1, requests=one, rules=quiet, sample_interval=0.2)
    before, after = plain.outcomes["a"].end, hung.outcomes["a"].end
    assert before is not None and after == pytest.approx(before + 1.7)  # from 0.5 to 2.2
    assert all(0 <= sample.busy <= 1 for sample in hung.samples)
    during = [sample.busy for sample in hung.samples if 0.8 < sample.at < 2.1]
    assert during and max(during) == pytest.approx(0, abs=1e-9)
    busy = [simulation.replicas["r000"].busy_until(simulation.now) for simulation in (plain, hung)]
    assert busy[0] == pytest.approx(busy[1])


def test_nothing_befalls_an_engine_that_is_not_there() -> None:
    faults = [
        Fault(kind="kill", at=1.0, replica=0, seconds=2.0),
        Fault(kind="hang", at=1.5, replica=0, seconds=60.0),
        Fault(kind="rank", at=1.6, replica=0, seconds=60.0),
    ]
    simulation = run(faults)
    assert [one.kind for one in simulation.events if one.endpoint == "r000"] == ["endpoint_lost", "endpoint_ready"]
    assert any(o.endpoint == "r000" and o.arrived > 3.0 for o in simulation.outcomes.values())


def test_a_hung_engine_without_work_gets_none() -> None:
    requests = load(60, rate=20.0)
    late = [msgspec.structs.replace(one, at=one.at + 20.0) for one in requests]
    simulation = run([Fault(kind="hang", at=1.0, replica=0, seconds=22.0)], replicas=2, requests=late)
    early = [outcome for outcome in simulation.outcomes.values() if outcome.arrived < 21.5]
    assert early and {outcome.endpoint for outcome in early} == {"r001"}
    assert any(outcome.endpoint == "r000" for outcome in simulation.outcomes.values())  # once it moves again


def test_all_are_those_that_are_there_by_then() -> None:
    simulation = FleetSimulation(Router(RoutingConfig()), load(30), 2, CONFIG, LAW, rules=Rules())
    simulation.at(0.5, lambda: simulation.add("late"))
    schedule([Fault(kind="throttle", at=1.0, replica=None, factor=2.0)], simulation, slower, rank_seconds=2.0)
    simulation.run()
    assert {name: replica.slowness for name, replica in simulation.replicas.items()} == {
        "r000": 2.0,
        "r001": 2.0,
        "late": 2.0,
    }
