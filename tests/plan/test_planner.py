"""What a plan tells: signals, impossible goals, rejections, ties, the front, pools and precisions."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.plan import units
from shoal.plan.catalogue import cluster
from shoal.plan.engines import Options
from shoal.plan.goal import GoalError
from shoal.plan.models import model_shape
from shoal.plan.planner import Plan, make_plan
from tests.plan.goals import CHAT, goal, plan

SEVENTY = ("llama-3.1-70b", "8xH100", 2.0)


def flags(text: str) -> dict[str, float]:
    """Targets in a line of flags."""
    return {name: units.duration(value) for name, value in re.findall(r"--((?:ttft|itl)-p\d\d) (\S+)", text)}


# --- impossible goals -------------------------------------------------------------------------------------------------


def test_memory_is_said_to_be_the_bound_with_the_gpus_it_takes() -> None:
    found = plan("llama-3.1-405b", "8xH100", 1)
    assert found.answer is None and found.impossible is not None
    assert found.impossible.bound.startswith("memory: ")
    least = int(re.findall(r"at least (\d+) such GPUs", found.impossible.nearest)[0])
    assert 811.7e9 / (cluster("8xH100").device.memory_bytes * 0.9) < least <= 16


@pytest.mark.parametrize(("target", "word"), [(("itl", "p99", 0.002), "ITL p99"), (("ttft", "p99", 0.01), "TTFT p99")])
def test_a_latency_that_nothing_reaches_is_named_and_the_nearest_is_reached(
    target: tuple[str, str, float], word: str
) -> None:
    found = plan(*SEVENTY, targets=(target,))
    assert found.answer is None and found.impossible is not None
    assert word in found.impossible.bound
    relaxed = flags(found.impossible.nearest)[f"{target[0]}-{target[1]}"]
    assert relaxed > target[2]
    again = plan(*SEVENTY, targets=((*target[:2], relaxed),))
    assert again.answer is not None, "what was said to be met is met"


def test_a_rate_that_is_too_high_is_named_and_the_nearest_is_carried() -> None:
    found = plan("llama-3.1-8b", "H100", 500, 1000, 200)
    assert found.answer is None and found.impossible is not None
    assert "rate" in found.impossible.bound
    rate = units.rate(re.findall(r"--rate (\S+)", found.impossible.nearest)[0])
    assert plan("llama-3.1-8b", "H100", rate, 1000, 200).answer is not None


def test_a_budget_that_is_too_small_is_named_and_the_least_that_does() -> None:
    found = plan(*SEVENTY, budget=3.0)
    assert found.answer is None and found.impossible is not None
    assert "budget" in found.impossible.bound
    price = units.money_per_hour(found.impossible.nearest.removeprefix("--budget "))
    again = plan(*SEVENTY, budget=price)
    assert again.answer is not None and again.answer.setup.dollars_per_hour == pytest.approx(price, abs=0.01)


@pytest.mark.parametrize(
    ("on", "more", "message"),
    [
        ("H100", {"survive": "gpu"}, "--survive 1gpu needs two GPUs"),
        ("8xH100", {"survive": "node"}, "--survive 1node needs two nodes"),
    ],
)
def test_what_one_device_or_node_cannot_survive(on: str, more: dict[str, object], message: str) -> None:
    with pytest.raises(GoalError, match=message):
        make_plan(model_shape("llama-3.1-8b"), goal(on, 1, 100, 100, CHAT, **more))


def test_a_sequence_longer_than_the_model_takes_is_refused() -> None:
    with pytest.raises(GoalError, match="131,072"):
        make_plan(model_shape("llama-3.1-8b"), goal("H100", 1, 140_000, 100, CHAT))


def test_a_budget_without_prices_is_refused() -> None:
    asked = goal("H100", 1, 100, 100, CHAT, budget=3.0)
    free = msgspec.structs.replace(asked.cluster, dollars_per_device_hour=None)
    with pytest.raises(GoalError, match="--price"):
        make_plan(model_shape("llama-3.1-8b"), msgspec.structs.replace(asked, cluster=free))


# --- rejections -------------------------------------------------------------------------------------------------------


def test_every_rejection_has_a_number_and_every_family_one_line() -> None:
    found = plan("llama-3.1-70b", "2x8xH100:ndr", 24.0, targets=CHAT)
    assert len(found.rejections) > 10
    for line in found.rejections:
        assert re.search(r"\d", line.why), line
    keys = [(line.family, line.precision) for line in found.rejections]
    assert len(keys) == len(set(keys))


def test_relaxations_admit_what_they_say() -> None:
    """Of latencies: with the relaxed target, the family is no longer rejected for it."""
    targets = (("itl", "p99", 0.012),)
    found = plan(*SEVENTY, targets=targets, pools=False)
    line = next(line for line in found.rejections if line.reason == "itl" and line.family == "tp4")
    relaxed = flags(line.relaxation)["itl-p99"]
    again = plan(*SEVENTY, targets=(("itl", "p99", relaxed * 1.01),), pools=False)
    assert not [other for other in again.rejections if other.family == "tp4" and other.reason == "itl"]


def test_the_answer_and_its_equals_are_not_rejected() -> None:
    found = plan(*SEVENTY)
    assert found.answer is not None
    chosen = {str(one.setup.pools[0].engine.shape) for one in (found.answer, *found.equals)}
    assert not chosen & {line.family for line in found.rejections if line.reason != "estimate"}


# --- ties, front, pools, precisions -----------------------------------------------------------------------------------


def test_a_target_within_the_band_is_flagged_and_one_far_away_is_not() -> None:
    found = plan(*SEVENTY)
    assert found.answer is not None
    band = found.answer.prediction.itl_p99
    close = plan(*SEVENTY, targets=(("itl", "p99", band.high * 0.95),))
    assert close.answer is not None and close.answer.tie
    far = plan(*SEVENTY, targets=(("itl", "p99", band.high * 4),))
    assert far.answer is not None and not far.answer.tie


def test_nothing_on_the_front_is_beaten_by_another() -> None:
    found = plan(*SEVENTY)
    marks = [
        (one.setup.cost, one.prediction.ttft_p99.value, one.prediction.itl_p99.value, -(one.capacity or 0.0))
        for one in found.front
    ]
    assert len(marks) > 3
    for one in marks:
        for other in marks:
            assert one is other or any(a < b * 1.05 for a, b in zip(one, other, strict=True))


def test_what_is_shown_to_carry_more_than_is_asked_meets_the_targets_and_nothing_else_does() -> None:
    found = plan(*SEVENTY)
    assert found.answer is not None and found.answer.capacity is not None
    for one in (found.answer, *found.equals, *found.front):
        assert one.meets == (one.capacity is not None and one.capacity >= found.asked.rate)
        assert one.meets or one.capacity is None
    dollars = found.answer.dollars_per_million_output
    at_most = found.answer.dollars_per_million_at_capacity
    assert dollars is not None and at_most is not None
    assert at_most == pytest.approx(dollars * found.asked.rate / found.answer.capacity)


def test_of_setups_that_cost_the_same_the_answer_carries_most() -> None:
    found = plan(*SEVENTY)
    assert found.answer is not None and found.equals
    assert all((one.capacity or 0.0) <= (found.answer.capacity or 0.0) * 1.05 for one in found.equals)


def test_it_says_not_to_disaggregate_when_that_needs_more() -> None:
    found = plan("llama-3.1-8b", "8xH100", 1)
    assert found.pools is not None and not found.pools.advised
    assert found.pools.text.startswith("Do not disaggregate")
    assert re.search(r"at least \d+ GPUs", found.pools.text)


def test_it_disaggregates_when_steps_with_prompts_are_what_breaks_the_target() -> None:
    """Long prompts, few tokens out, and a gap between tokens that no step with a prompt's piece keeps."""
    found = plan("llama-3.1-8b", "8xH100", 4, 16_000, 200, (("ttft", "p99", 3.0), ("itl", "p99", 0.0135)))
    assert found.pools is not None and found.pools.advised, found.pools
    assert found.answer is not None and [pool.role for pool in found.answer.setup.pools] == ["prefill", "decode"]
    assert found.answer.prediction.itl_p99.value <= 0.0135


def test_a_smaller_precision_is_offered_and_does_what_is_said() -> None:
    found = plan(*SEVENTY)
    assert found.answer is not None
    one = next(one for one in found.advice if one.precision == "float8")
    assert one.saves == found.answer.setup.devices - one.devices > 0
    again = plan(*SEVENTY, weights=("float8",), pools=False)
    assert again.answer is not None and again.answer.setup.devices == one.devices


def test_signals_name_what_is_missing_on_one_gpu() -> None:
    fits, idle, batching = plan("llama-3.1-8b", "8xH100", 60, 500, 200, (("itl", "p99", 0.004),)).signals
    assert not fits.present
    assert idle.present and "one request alone has itl-p99" in idle.evidence
    assert re.search(r"with 0\.\d% of the compute", idle.evidence)
    assert batching.present


def test_dollars_are_devices_times_price_over_tokens() -> None:
    found = plan(*SEVENTY)
    one = found.answer
    assert one is not None and one.dollars_per_million_output is not None
    price = found.asked.dollars_per_device_hour
    assert price is not None
    tokens = found.asked.rate * found.asked.output * 3600
    assert one.dollars_per_million_output == pytest.approx(one.setup.devices * price / tokens * 1e6)


def test_a_plan_is_the_same_every_time() -> None:
    asked = goal("8xH100", 2, 1000, 300, CHAT)
    first, second = (make_plan(model_shape("llama-3.1-70b"), asked) for _ in range(2))
    assert msgspec.json.encode(first) == msgspec.json.encode(second)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rate=st.sampled_from([0.1, 1.0, 7.0, 40.0]),
    input=st.sampled_from([30, 1000, 9000]),
    output=st.sampled_from([2, 100, 1500]),
    itl=st.sampled_from([0.005, 0.03, 0.2]),
    on=st.sampled_from(["H100", "4xL40S", "2x8xA100:hdr"]),
)
def test_whatever_is_asked_an_answer_meets_it_or_the_plan_says_why(
    rate: float, input: int, output: int, itl: float, on: str
) -> None:
    targets = (("ttft", "p99", 2.0), ("itl", "p99", itl))
    asked = goal(on, rate, input, output, targets)
    found: Plan = make_plan(model_shape("llama-3.1-8b"), asked, Options(pools=False))
    if found.answer is None:
        assert found.impossible is not None and found.impossible.bound
        return
    assert found.answer.setup.devices <= asked.cluster.num_devices
    assert found.answer.prediction.itl_p99.value <= itl
    assert found.answer.prediction.ttft_p99.value <= 2.0
    for other in found.equals:
        assert other.setup.cost == found.answer.setup.cost
