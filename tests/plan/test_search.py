"""What practice knows must be found: no rule of thumb is in the search, only times and bytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shoal.plan.candidates import Shape, crosses_nodes, lost_engines, replicas_for
from shoal.plan.catalogue import cluster
from shoal.plan.planner import Plan
from shoal.plan.setups import Setup
from tests.plan.goals import CHAT, LOOSE, plan

PLAN = Path(__file__).parents[2] / "src" / "shoal" / "plan"


def setup_of(found: Plan) -> Setup:
    assert found.answer is not None, found.impossible
    return found.answer.setup


def shape_of(found: Plan) -> Shape:
    setup = setup_of(found)
    assert len(setup.pools) == 1, f"{setup} is apart"
    return setup.pools[0].engine.shape


# --- one GPU, one node, two nodes -------------------------------------------------------------------------------------


def test_8b_is_served_by_one_gpu() -> None:
    found = plan("llama-3.1-8b", "8xH100", 1)
    assert setup_of(found).devices == 1
    assert "not needed" in found.distribution
    assert not any(signal.present for signal in found.signals)


def test_a_higher_rate_is_met_by_replicas_of_one_gpu_and_not_by_splitting() -> None:
    found = plan("llama-3.1-8b", "8xH100", 60, 1000, 200)
    (pool,) = setup_of(found).pools
    assert pool.engine.shape == Shape()
    assert pool.replicas > 1
    assert [signal.present for signal in found.signals] == [False, False, True]


def test_70b_in_16_bits_is_two_h100s_for_short_contexts() -> None:
    found = plan("llama-3.1-70b", "8xH100", 0.3, 500, 200, (("ttft", "p99", 3.0), ("itl", "p99", 0.06)))
    assert shape_of(found) == Shape(tp=2)
    assert found.signals[0].present, "it does not fit in one"


def test_70b_in_16_bits_is_four_h100s_for_long_contexts() -> None:
    found = plan("llama-3.1-70b", "8xH100", 0.02, 60_000, 500, (("ttft", "p99", 60.0), ("itl", "p99", 1.0)))
    assert shape_of(found) == Shape(tp=4)
    (line,) = [line for line in found.rejections if line.family == "tp2"]
    assert line.reason == "cache" and "60,500 tokens take" in line.why
    assert int(re.sub(r"\D", "", line.relaxation)) < 60_500, "the relaxation is a length that fits"


def test_405b_in_8_bits_is_one_node() -> None:
    found = plan(
        "llama-3.1-405b", "2x8xH100:ndr", 1, 1000, 300, (("ttft", "p99", 3.0), ("itl", "p99", 0.1)), weights=("float8",)
    )
    assert setup_of(found).devices == 8
    assert not crosses_nodes(shape_of(found), cluster("2x8xH100:ndr"))


def test_405b_in_16_bits_is_two_nodes_with_tp_within_and_pp_across() -> None:
    found = plan("llama-3.1-405b", "2x8xH100:ndr", 1, 1000, 300, (("ttft", "p99", 3.0), ("itl", "p99", 0.1)))
    assert shape_of(found) == Shape(tp=8, pp=2)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [LOOSE, ()], ids=["targets", "no targets"])
@pytest.mark.parametrize(("model", "rate"), [("llama-3.1-405b", 1.0), ("llama-3.1-70b", 6.0)])
def test_tp_is_never_across_nodes_over_tcp(model: str, rate: float, targets: tuple[object, ...]) -> None:
    found = plan(model, "2x8xH100:tcp-25", rate, 1000, 300, targets)
    assert found.answer is not None
    for one in (found.answer, *found.equals):
        for pool in one.setup.pools:
            assert "tp" not in crosses_nodes(pool.engine.shape, cluster("2x8xH100:tcp-25")), one.setup


def test_across_nodes_there_are_stages_or_replicas() -> None:
    found = plan("llama-3.1-405b", "2x8xH100:tcp-25", 1, 1000, 300, LOOSE)
    assert crosses_nodes(shape_of(found), cluster("2x8xH100:tcp-25")) == ["pp"]
    found = plan("llama-3.1-70b", "2x8xH100:ndr", 24, 1000, 300, CHAT)
    (pool,) = setup_of(found).pools
    assert pool.replicas > 1 and not crosses_nodes(pool.engine.shape, cluster("2x8xH100:ndr"))


def test_what_crosses_nodes_is_told_with_its_share_and_its_network() -> None:
    found = plan("llama-3.1-70b", "2x8xH100:tcp-25", 1, 1000, 300, (("ttft", "p99", 2.0), ("itl", "p99", 0.025)))
    told = [line for line in found.rejections if "crosses nodes" in line.why]
    assert told, [str(line) for line in found.rejections]
    assert re.search(r"tp=16 crosses nodes: all-reduce would be \d\d% of a decode step over tcp-25", told[0].why)


def test_more_gpus_make_one_sequence_slower_beyond_a_point_and_the_plan_says_where() -> None:
    found = plan("llama-3.1-70b", "2x8xH100:ndr", 24, 1000, 300, CHAT)
    times = {step.devices: step.seconds for step in found.alone}
    assert times[8] < times[4] < times[2]
    assert times[16] > times[8]
    assert "fastest on 8 GPUs" in found.turning_point and "16 take" in found.turning_point


def test_within_a_node_more_gpus_end_to_help_a_small_model() -> None:
    """Even NVLink's latency outweighs what is left to read."""
    times = [step.seconds for step in plan("smollm2-135m", "8xH100", 1, 500, 100, ()).alone]
    assert times[-1] > min(times)


# --- experts, tp, headroom --------------------------------------------------------------------------------------------


def test_deepseek_v3_spreads_its_experts_over_many_gpus() -> None:
    found = plan(
        "deepseek-v3",
        "2x8xH100:ndr",
        5,
        2000,
        300,
        (("ttft", "p99", 3.0), ("itl", "p99", 0.08)),
        weights=("float8-block",),
    )
    shape = shape_of(found)
    assert shape.ep * shape.attention_dp > 1


def test_the_least_tp_that_meets_a_target_is_taken_and_more_only_for_a_harder_one() -> None:
    sizes = []
    for itl in (0.1, 0.03, 0.0195):
        found = plan("llama-3.1-70b", "8xH100", 0.2, 200, 200, (("itl", "p50", itl),), pools=False)
        sizes.append(setup_of(found).devices)
    assert sizes == sorted(sizes) and sizes[0] == 2 and sizes[-1] > 2


def test_what_must_be_survived_is_there_twice() -> None:
    plain = plan("llama-3.1-8b", "2x8xH100:ndr", 1)
    gpu = plan("llama-3.1-8b", "2x8xH100:ndr", 1, survive="gpu")
    node = plan("llama-3.1-70b", "2x8xH100:ndr", 4, survive="node")
    assert setup_of(gpu).devices == setup_of(plain).devices + 1
    assert gpu.answer is not None and gpu.answer.degraded is not None
    assert gpu.answer.degraded.itl_p99.value >= gpu.answer.prediction.itl_p99.value
    assert sum(pool.replicas for pool in setup_of(node).pools) >= 2


@pytest.mark.parametrize("survive", ["", "gpu", "node"])
@pytest.mark.parametrize("devices", [1, 2, 8, 16])
@pytest.mark.parametrize("needed", [1, 2, 5])
def test_replicas_leave_what_is_needed_and_no_fewer_would(needed: int, devices: int, survive: str) -> None:
    nodes = cluster("4x8xH100:ndr")
    count = replicas_for(needed, devices, nodes, survive)
    assert count - lost_engines(count, devices, nodes, survive) >= needed
    assert count == needed or (count - 1) - lost_engines(count - 1, devices, nodes, survive) < needed


def test_no_rule_of_thumb_is_in_the_code() -> None:
    """No comparison of an axis with a number other than 1."""
    for file in ("search", "engines", "candidates", "screen", "pools"):
        source = (PLAN / f"{file}.py").read_text(encoding="utf-8")
        found = re.findall(r"\b(?:tp|pp|ep|cp|attention_dp)\s*(?:[<>]=?|==|!=)\s*(\d+)", source)
        assert set(found) <= {"1"}, f"{file}: {found}"


# --- cost of a plan ---------------------------------------------------------------------------------------------------


def test_a_plan_of_405b_on_64_gpus_runs_few_event_loops() -> None:
    """That is what a plan's seconds go into (aim: 5 s on one core; docs/planning.md has what it takes)."""
    found = plan(
        "llama-3.1-405b",
        "8x8xH100:ndr",
        5,
        2000,
        300,
        (("ttft", "p99", 2.0), ("itl", "p99", 0.06)),
        weights=("float8", "bfloat16"),
    )
    assert found.answer is not None
    assert 100 < found.looked_at < 2000
    assert found.closer <= 24
