"""The most that engines carry: where a target begins to be missed, more for a looser target, more with more engines."""

from __future__ import annotations

import pytest

from shoal.core.cost.model import CostModel
from shoal.core.cost.types import EngineShape
from shoal.core.layout import Layout
from shoal.plan.candidates import Shape
from shoal.plan.catalogue import cluster
from shoal.plan.engines import Engine
from shoal.plan.estimate import STEP, Runs
from shoal.plan.goal import Target, demand_of
from shoal.plan.models import model_shape
from shoal.plan.screen import traffic_of
from shoal.plan.setups import EngineChoice

DEMAND = demand_of(1, 1000, 100)
TTFT = Target(metric="ttft", percentile="p99", seconds=1.0)


def engine(model: str = "llama-3.1-8b", on: str = "H100", chunk: int = 2048, shape: Shape | None = None) -> Engine:
    shape = shape or Shape()
    choice = EngineChoice(shape=shape, weights="bfloat16", cache="bfloat16", max_batch_tokens=chunk, max_sequences=128)
    cost = CostModel(
        EngineShape(
            model=model_shape(model),
            cluster=cluster(on),
            layout=Layout(tp=shape.tp, pp=shape.pp),
            max_batch_tokens=chunk,
            max_sequences=128,
        )
    )
    return Engine(choice, cost, cost.memory(), traffic_of(DEMAND), ())


def runs(replicas: int = 1, **of: object) -> Runs:
    return Runs(engine(**of), replicas, 128, DEMAND.workload(), None)  # type: ignore[arg-type]


def itl(seconds: float) -> Target:
    return Target(metric="itl", percentile="p99", seconds=seconds)


@pytest.mark.parametrize("near", [2.0, 20.0, 200.0])
def test_targets_are_met_at_what_is_carried_and_missed_a_little_above(near: float) -> None:
    """Wherever the closed form says to begin."""
    targets, engines = (TTFT, itl(0.05)), runs()
    most = engines.carries(targets, near)
    at, above = engines.at(most), engines.at(most * STEP)
    assert at is not None and at.excess(targets) <= 1.0
    assert above is None or above.excess(targets) > 1.0


def test_a_looser_target_is_carried_at_no_lower_a_rate() -> None:
    engines = runs()
    rates = [engines.carries((TTFT, itl(seconds)), 20.0) for seconds in (0.045, 0.05, 0.055)]
    assert rates == sorted(rates) and rates[0] < rates[-1]
    rates = [engines.carries((within(seconds),), 20.0) for seconds in (0.1, 0.3, 1.0)]
    assert rates == sorted(rates) and rates[0] < rates[-1]


def within(seconds: float) -> Target:
    return Target(metric="ttft", percentile="p99", seconds=seconds)


@pytest.mark.parametrize("more", [{}, {"model": "qwen3-30b-a3b", "chunk": 1024}], ids=["dense", "experts"])
def test_more_engines_carry_more_and_each_of_them_no_less(more: dict[str, object]) -> None:
    """Behind a router, a queue is everybody's."""
    carried = [runs(replicas, **more).carries((TTFT, itl(0.05)), 20.0 * replicas) for replicas in (1, 2, 4)]
    for before, after in zip(carried, carried[1:], strict=False):
        assert after >= 2 * before / STEP


def test_a_target_that_no_rate_meets_is_carried_at_none() -> None:
    assert runs().carries((itl(1e-4),), 10.0) == 0.0


def test_without_targets_it_is_what_keeps_up() -> None:
    engines = runs()
    most = engines.carries((), 10.0)
    assert engines.at(most) is not None and engines.at(most * STEP) is None
    assert most >= engines.carries((TTFT,), 10.0)


def test_a_rate_that_is_known_to_be_met_is_carried() -> None:
    """Also where it lies between two that are tried."""
    engines = runs()
    most = engines.carries((TTFT, itl(0.05)), 20.0)
    between = most * STEP**-0.5
    assert engines.carries((TTFT, itl(0.05)), 20.0, met=between) >= between


def test_kv_that_is_on_its_way_is_waited_for() -> None:
    near, far = (Runs(engine(), 1, 128, DEMAND.workload(), None, transfer=seconds).at(5.0) for seconds in (0.0, 0.2))
    assert near is not None and far is not None
    assert far.ttft_p99.value == pytest.approx(near.ttft_p99.value + 0.2)
    assert far.itl_p99 == near.itl_p99
