"""The ledger keeps one line a family: of the setup that came nearest, by the way in which it got furthest."""

from __future__ import annotations

from shoal.core.cost.types import Part, StepCost
from shoal.plan.candidates import Shape
from shoal.plan.catalogue import cluster
from shoal.plan.rejections import Ledger, where_time_goes

NODES = cluster("2x8xH100:tcp-25")


def told(text: str, relaxation: str = "") -> object:
    return lambda: (text, relaxation)


def test_the_nearest_speaks_for_its_family() -> None:
    ledger = Ledger(NODES)
    for pp, distance in ((2, 3.0), (4, 1.0), (8, 2.0)):
        ledger.add("weights", Shape(pp=pp), "bfloat16", distance, told(f"pp{pp} misses", f"{distance} GB"))  # type: ignore[arg-type]
    (line,) = ledger.lines()
    assert (line.family, line.why, line.relaxation, line.setups) == ("pp4", "pp4 misses", "1.0 GB", 3)
    assert str(line) == "pp4 (bfloat16): pp4 misses; admitted by 1.0 GB"


def test_the_furthest_reason_is_told_and_only_it() -> None:
    ledger = Ledger(NODES)
    ledger.add("weights", Shape(pp=2), "bfloat16", 0.1, told("does not fit"))  # type: ignore[arg-type]
    ledger.add("itl", Shape(pp=4), "bfloat16", 9.0, told("is slow"))  # type: ignore[arg-type]
    (line,) = ledger.lines()
    assert (line.reason, line.family, line.setups) == ("itl", "pp4", 2)


def test_families_differ_by_tp_axes_networks_and_precision() -> None:
    ledger = Ledger(NODES)
    for shape in (Shape(tp=8), Shape(tp=16), Shape(tp=8, pp=2), Shape(tp=4, pp=2), Shape(tp=4, pp=4)):
        ledger.add("itl", shape, "bfloat16", 1.0, told("1"))  # type: ignore[arg-type]
    ledger.add("itl", Shape(tp=8), "float8", 1.0, told("1"))  # type: ignore[arg-type]
    assert len(ledger.lines()) == 6, "tp4 x pp2 is within a node, tp4 x pp4 is not"


def test_the_nearest_to_the_answer_come_first() -> None:
    ledger = Ledger(NODES)
    for number, reason in enumerate(("layout", "weights", "itl", "rate", "larger")):
        ledger.add(reason, Shape(tp=2**number), "bfloat16", 1.0, told("1"))  # type: ignore[arg-type]
    assert [line.reason for line in ledger.lines()] == ["larger", "rate", "itl", "weights", "layout"]


def step(**seconds: float) -> StepCost:
    parts = tuple(Part(name=name, seconds=value, bound="latency") for name, value in seconds.items())
    return StepCost(seconds=sum(seconds.values()), parts=parts, low=0, high=1, provenance="datasheet")


def test_where_time_goes_names_the_part_and_the_network() -> None:
    busy = step(collectives=0.071, linear=0.029)
    assert where_time_goes(busy, Shape(tp=16), NODES) == (
        "tp=16 crosses nodes: all-reduce would be 71% of a decode step over tcp-25"
    )
    assert where_time_goes(busy, Shape(tp=8), NODES) == "all-reduce would be 71% of a decode step over nvlink4"
    assert "exchanging attention would be" in where_time_goes(busy, Shape(cp=16), NODES)
    assert "all-to-all would be" in where_time_goes(busy, Shape(attention_dp=16), NODES)
    assert where_time_goes(step(linear=0.08, host=0.02), Shape(tp=8), NODES) == (
        "reading the weights is 80% of a decode step of 100 ms"
    )
