"""The closed form: it rises and falls as loads do, keeps its targets, and is near the event loop."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.core.cost.model import CostModel
from shoal.core.cost.types import EngineShape, StepShape
from shoal.core.layout import Layout
from shoal.plan.catalogue import cluster
from shoal.plan.goal import Target, demand_of
from shoal.plan.models import model_shape
from shoal.plan.screen import Curve, Traffic, traffic_of
from shoal.plan.steady_state import steady


def curve(input: float = 1000, output: float = 200, chunk: int = 512, **more: object) -> Curve:
    """Of an engine whose step takes 10 ms, and 0.1 ms more for a token of a prompt and 0.05 ms for a sequence."""

    def seconds(step: StepShape) -> float:
        return 0.01 + 1e-4 * step.prefill_tokens + 5e-5 * step.decode_rows

    traffic = Traffic(input=input, output=output, long_input=input, spread=0.0)
    given = {"chunk": chunk, "max_sequences": 256, "cache_tokens": 200_000.0} | more
    return Curve(seconds, traffic, **given)  # type: ignore[arg-type]


def target(metric: str, percentile: str, seconds: float) -> Target:
    return Target(metric=metric, percentile=percentile, seconds=seconds)  # type: ignore[arg-type]


def test_one_request_alone_is_its_prompt_and_its_tokens() -> None:
    idle = curve().idle
    assert idle is not None
    assert idle.ttft_p50 == pytest.approx(2 * (0.01 + 0.0512)), "two pieces of at most 512 tokens"
    assert idle.itl_mean == pytest.approx(0.01 + 5e-5)
    assert idle.rate == 0


@given(
    input=st.integers(10, 8000),
    output=st.integers(2, 2000),
    chunk=st.sampled_from([128, 512, 4096]),
    stages=st.sampled_from([1, 2, 4]),
)
def test_more_load_is_never_faster(input: int, output: int, chunk: int, stages: int) -> None:
    loads = curve(input, output, chunk, stages=stages).loads
    for before, after in zip(loads, loads[1:], strict=False):
        assert after.rate >= before.rate and after.batch > before.batch
        assert after.itl_p99 >= before.itl_p99 * 0.999
        assert after.ttft_p99 >= before.ttft_p99 * 0.999


@given(itl=st.floats(0.011, 0.2), ttft=st.floats(0.1, 3.0))
def test_the_best_load_keeps_every_target(itl: float, ttft: float) -> None:
    targets = (target("itl", "p99", itl), target("ttft", "p99", ttft))
    best = curve(targets=targets).best(targets)
    if best is not None:
        assert best.itl_p99 <= itl and best.ttft_p99 <= ttft and best.excess(targets) <= 1


def test_a_looser_target_is_never_met_by_less() -> None:
    rates = []
    for itl in (0.02, 0.05, 0.07, 0.1, 0.2):
        best = curve().best((target("itl", "p99", itl),))
        rates.append(0.0 if best is None else best.rate)
    assert rates == sorted(rates) and rates[-1] > rates[0]


def test_memory_ends_the_curve() -> None:
    small, large = curve(cache_tokens=5_000.0), curve(cache_tokens=500_000.0)
    assert small.loads[-1].batch < large.loads[-1].batch
    assert small.held == pytest.approx(5_000 / 1100)
    assert not curve(cache_tokens=500.0).loads, "not one sequence has room"


def test_a_rate_beyond_the_curve_has_no_load() -> None:
    found = curve()
    assert found.at(found.loads[-1].rate * 1.01) is None
    middle = found.at(found.loads[-1].rate / 2)
    assert middle is not None and middle.rate == pytest.approx(found.loads[-1].rate / 2)


@settings(max_examples=6, deadline=None)
@given(share=st.sampled_from([0.2, 0.5, 0.8]), layout=st.sampled_from([Layout(tp=2), Layout(tp=4), Layout(tp=2, pp=2)]))
def test_the_closed_form_is_near_the_event_loop(share: float, layout: Layout) -> None:
    """Near enough to choose what is looked at closely."""
    engine = EngineShape(
        model=model_shape("llama-3.1-70b"), cluster=cluster("8xH100"), layout=layout, max_batch_tokens=512
    )
    cost, demand = CostModel(engine), demand_of(1, 1000, 200)
    found = Curve(
        cost.seconds,
        traffic_of(demand),
        chunk=512,
        max_sequences=256,
        cache_tokens=cost.memory().cache_tokens,
        front_seconds=cost.profile.front_seconds,
        stages=layout.pp,
    )
    rate = found.loads[-1].rate * share
    load, run = found.at(rate), steady(cost, demand.workload(), rate)
    assert load is not None and not run.saturated
    assert load.itl_mean == pytest.approx(run.tpot.mean, rel=0.25)
    assert load.itl_p99 == pytest.approx(run.itl.p99, rel=0.4)
    assert load.ttft_p50 == pytest.approx(run.ttft.p50, rel=0.5)
