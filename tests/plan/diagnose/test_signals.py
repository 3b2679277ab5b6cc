from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.plan.diagnose import thresholds
from shoal.plan.diagnose.findings import Finding, Targets
from shoal.plan.diagnose.reading import Interval, Reading, read
from shoal.plan.diagnose.signals import diagnose, is_idle, throughput_per_batch, waiting, wanted_kv
from tests.plan.diagnose.expositions import SECONDS, recorded, snapshot, vllm

NO_TARGETS = Targets()
SLOW_ITL = {0.02: 97_000, 0.04: 1000, 0.5: 2000}
"""2% of the time between tokens is 10 times the median or more."""


def of(*texts: str) -> Reading:
    return read([snapshot(text, 10.0 * at if len(texts) > 1 else None) for at, text in enumerate(texts)])


def states(reading: Reading, targets: Targets = NO_TARGETS) -> tuple[str, ...]:
    return tuple(finding.state for finding in diagnose(reading, targets))


def finding(reading: Reading, number: int, targets: Targets = NO_TARGETS) -> Finding:
    return diagnose(reading, targets)[number - 1]


# --- what a real vLLM wrote -------------------------------------------------------------------------------------------


def window(name: str) -> Reading:
    return read([recorded(f"{name}-before"), recorded(f"{name}-after")], SECONDS[name])


def test_recorded_one_request_after_another_is_healthy() -> None:
    assert states(read([recorded("light")])) == ("absent",) * 3


def test_recorded_more_requests_than_places_hits_the_limit_of_the_batch() -> None:
    reading = window("batch")
    assert states(reading) == ("absent", "absent", "present")
    found = finding(reading, 3)
    assert found.try_first[0].lever == "max_sequences"
    assert 8 < int(found.try_first[0].value) <= 16, "as many as want to, but at most what the cache holds and twice"
    queue = waiting(reading)
    assert queue is not None
    assert 50 < queue[0] < 120, "of 120 at most"


def test_recorded_too_few_blocks_do_not_fit() -> None:
    reading = window("memory")
    assert states(reading) == ("present", "absent", "absent")
    found = finding(reading, 1)
    assert found.certainty == "shown"
    wanted = wanted_kv(reading)
    # 16 clients of 416 tokens at the end, half of that on the average; the cache holds 1,280 tokens.
    assert wanted is not None
    assert 16 * 208 / 1280 * 0.8 < wanted < 16 * 416 / 1280
    assert found.try_first[0].lever == "tensor_parallel", "three times the cache comes from no setting"


# --- each sign --------------------------------------------------------------------------------------------------------


def test_a_full_cache_with_nobody_waiting_is_well_used() -> None:
    found = finding(of(vllm(kv=0.97)), 1)
    assert found.state == "absent"
    assert "nearly full" in found.summary


def test_a_full_cache_and_a_queue_do_not_fit() -> None:
    reading = of(vllm(kv=0.97, waiting=1, running=8))
    assert states(reading) == ("present", "absent", "absent")
    assert finding(reading, 1).certainty == "indicated", "one reading of a gauge"
    assert finding(reading, 1).try_first[0].lever == "kv_memory", "9 of 8 need little more"


@pytest.mark.parametrize(
    ("preemptions", "finished", "state"),
    [(0, 1000, "absent"), (9, 1000, "absent"), (10, 1000, "present"), (0, 0, "absent"), (1, 0, "present")],
)
def test_one_sequence_in_a_hundred_is_preempted(preemptions: int, finished: int, state: str) -> None:
    found = finding(of(vllm(preemptions=preemptions, finished=finished)), 1)
    assert found.state == state
    assert "preemptions" in found.evidence[0].says, "also where there are too few to matter"


def test_the_limit_of_the_batch_is_each_replicas() -> None:
    reading = of(vllm(running=8, waiting=5, engine="0") + vllm(running=8, waiting=5, engine="1"))
    assert "stays at 16" in finding(reading, 3, Targets(max_sequences=8)).summary
    assert "stays at" not in finding(reading, 3, Targets(max_sequences=16)).summary


def test_without_metrics_of_the_cache_nothing_is_said_of_it() -> None:
    found = finding(of("vllm:num_requests_running 3\n"), 1)
    assert (found.state, bool(found.missing)) == ("unknown", True)


def test_a_tail_with_a_small_batch_is_idle_compute() -> None:
    found = finding(of(vllm(itl=SLOW_ITL)), 2)
    assert (found.state, found.certainty) == ("present", "indicated"), "inferred from the batch"
    busy = {"DCGM_FI_PROF_SM_ACTIVE": 0.95}
    idle = {"DCGM_FI_PROF_SM_ACTIVE": 0.2}
    assert finding(of(vllm(itl=SLOW_ITL, device=busy)), 2).state == "absent"
    found = finding(of(vllm(itl={0.02: 97_000, 0.2: 0, 0.5: 3000}, device=idle)), 2)
    assert (found.state, found.certainty) == ("present", "shown")


def test_a_busy_device_may_be_nearly_empty_but_an_idle_one_is_idle() -> None:
    slow = {0.02: 97_000, 0.2: 0, 0.5: 3000}
    found = finding(of(vllm(itl=slow, device={"DCGM_FI_DEV_GPU_UTIL": 99})), 2)
    assert (found.state, found.certainty) == ("present", "indicated"), "by its small batch"
    found = finding(of(vllm(itl=slow, running=60, kv=0.8, device={"DCGM_FI_DEV_GPU_UTIL": 99})), 2)
    assert found.state == "absent"
    found = finding(of(vllm(itl=slow, running=60, kv=0.8, device={"DCGM_FI_DEV_GPU_UTIL": 20})), 2)
    assert (found.state, found.certainty) == ("present", "shown")


def test_one_slow_request_of_a_few_is_no_tail() -> None:
    few = {0.02: 50, 0.04: 30, 0.5: 1}
    found = finding(of(vllm(itl=few)), 2)
    assert found.state == "absent"
    assert "too few for a p99" in found.evidence[1].says
    found = finding(of(vllm(itl={0.02: 60, 0.04: 10, 0.5: 11})), 2)
    assert (found.state, found.certainty) == ("present", "indicated"), "one in eight is"


def test_a_target_replaces_the_median() -> None:
    reading = of(vllm())
    assert finding(reading, 2).state == "absent"
    assert finding(reading, 2, Targets(itl_p99=0.03)).state == "present"
    assert finding(reading, 2, Targets(ttft_p99=0.05)).state == "present"
    assert finding(reading, 2, Targets(ttft_p99=0.25, itl_p99=0.05)).state == "absent"


def test_time_outside_the_engine_is_named() -> None:
    found = finding(of(vllm(ttft_seconds=700.0, queue_seconds=10.0, prefill_seconds=80.0)), 2)
    assert found.state == "present"
    assert "outside the engine" in found.summary
    assert "front_end" in [action.lever for action in found.try_first]


def test_a_gateway_that_holds_requests_back_from_an_engine_with_room() -> None:
    text = "shoal:num_requests_running {}\nshoal:num_requests_waiting 0\nshoal:kv_cache_usage_perc 0.1\n"
    text += "shoal:fleet_requests_waiting 20\nshoal:num_preemptions_total 0\n"
    text += 'shoal:time_to_first_token_seconds_bucket{{le="+Inf"}} 5\nshoal:time_to_first_token_seconds_count 5\n'
    reading = of(text.format(2).replace("{{", "{").replace("}}", "}"))
    held = diagnose(reading, Targets(max_sequences=64))
    assert [one.state for one in held] == ["absent", "present", "absent"]
    assert "ahead of an engine" in held[1].summary
    full = diagnose(reading, Targets(max_sequences=2))
    assert [one.state for one in full] == ["absent", "absent", "present"], "the same queue before a full batch"


def test_an_engine_that_says_its_slots_needs_no_flag() -> None:
    text = "shoal:num_requests_running 8\nshoal:num_requests_waiting 20\nshoal:kv_cache_usage_perc 0.1\n"
    assert finding(of(text), 3).certainty == "indicated"
    full = finding(of(text + "shoal:max_num_seqs 8\n"), 3)
    assert (full.state, full.certainty) == ("present", "shown") and "stays at 8" in full.summary
    assert "stays at" not in finding(of(text + "shoal:max_num_seqs 64\n"), 3).summary


def test_who_waits_with_room_in_the_cache_hits_the_limit_of_the_batch() -> None:
    reading = of(*[vllm(running=16, waiting=5, kv=0.3)] * 3)
    found = finding(reading, 3)
    assert (found.state, found.certainty) == ("present", "shown")
    assert found.try_first[0].value == "21"
    # As reported of a vLLM whose steps are full of prompts: few run, many wait, and the cache is nearly empty.
    reading = of(*(vllm(running=running, waiting=90 - running, kv=0.02 * running) for running in (10, 16, 22, 28)))
    found = finding(reading, 3)
    assert (found.state, found.certainty) == ("present", "indicated")
    assert found.try_first[0].lever == "batch_tokens"


def test_who_waits_for_an_adapter_does_not_wait_for_a_place() -> None:
    deferred = 'vllm:num_requests_waiting_by_reason{reason="deferred"} 5\n'
    found = finding(of(vllm(running=16, waiting=5) + deferred), 3)
    assert found.state == "absent"
    assert "adapter" in found.summary


def test_throughput_that_does_not_grow_with_the_batch_is_the_device() -> None:
    def intervals(power: float) -> tuple[Interval, ...]:
        return tuple(Interval(batch, 100 * batch**power) for batch in (8, 16, 24, 32))

    reading = of(*[vllm(running=32, waiting=5, kv=0.3)] * 3)
    flat = msgspec.structs.replace(reading, intervals=intervals(0.1))
    assert throughput_per_batch(flat) == pytest.approx(0.1)
    assert "device is at its limit" in finding(flat, 3).summary
    assert finding(flat, 3).try_first[0].lever == "replicas"
    grows = msgspec.structs.replace(reading, intervals=intervals(0.9))
    assert finding(grows, 3).try_first[0].lever == "max_sequences"
    alike = msgspec.structs.replace(reading, intervals=(Interval(8, 1), Interval(9, 2), Interval(8, 3)))
    assert throughput_per_batch(alike) is None


def test_nothing_at_all_is_idle() -> None:
    text = vllm(running=0, kv=0, finished=0, tokens=0)
    assert is_idle(of(text, text))
    assert not is_idle(of(text, vllm(running=0, kv=0, finished=1)))


# --- monotone ---------------------------------------------------------------------------------------------------------

NUMBERS: dict[str, Any] = {
    "running": st.integers(0, 64),
    "waiting": st.sampled_from([0, 0, 1, 2, 40]),
    "kv": st.floats(0, 1),
    "preemptions": st.sampled_from([0, 1, 9, 10, 11, 500]),
    "finished": st.sampled_from([0, 100, 1000]),
    "queue_seconds": st.sampled_from([0.0, 10.0, 49.0, 51.0, 90.0]),
}
settings_ = settings(max_examples=60, deadline=None)


@settings_
@given(st.fixed_dictionaries(NUMBERS), st.integers(1, 1000), st.sampled_from(["preemptions", "waiting"]))
def test_more_of_it_never_makes_it_fit(numbers: dict[str, Any], more: int, what: str) -> None:
    before, after = of(vllm(**numbers)), of(vllm(**numbers | {what: numbers[what] + more}))
    assert finding(before, 1).state == "absent" or finding(after, 1).state == "present"


@settings_
@given(st.fixed_dictionaries(NUMBERS), st.floats(0, 1))
def test_a_fuller_cache_never_makes_it_fit(numbers: dict[str, Any], kv: float) -> None:
    less, more = sorted((kv, numbers["kv"]))
    before, after = (of(vllm(**numbers | {"kv": one})) for one in (less, more))
    assert finding(before, 1).state == "absent" or finding(after, 1).state == "present"


@settings_
@given(st.fixed_dictionaries(NUMBERS), st.integers(1, 1000), st.sampled_from([None, 8, 64]))
def test_a_longer_queue_never_unhits_the_limit(numbers: dict[str, Any], more: int, places: int | None) -> None:
    """Unless it turns out to be one for memory: then the first sign is there."""
    before, after = of(vllm(**numbers)), of(vllm(**numbers | {"waiting": numbers["waiting"] + more}))
    targets = Targets(max_sequences=places)
    then = finding(after, 3, targets).state == "present" or finding(after, 1, targets).state == "present"
    assert finding(before, 3, targets).state == "absent" or then


@settings_
@given(st.fixed_dictionaries(NUMBERS), st.integers(0, 5000), st.integers(0, 5000), st.floats(0, 1), st.floats(0, 1))
def test_a_longer_tail_and_idler_compute_never_explain_each_other_away(
    numbers: dict[str, Any], slow: int, slower: int, busy: float, busier: float
) -> None:
    numbers["queue_seconds"] = 1.0
    few, many = sorted((slow, slower))
    less, more = sorted((busy, busier))

    def at(count: int, active: float) -> str:
        itl = {0.02: 100_000 - count, 0.04: 0, 0.5: count}
        return finding(of(vllm(**numbers, itl=itl, device={"DCGM_FI_PROF_SM_ACTIVE": active})), 2).state

    assert at(few, less) == "absent" or at(many, less) == "present"
    assert at(few, more) == "absent" or at(few, less) == "present"


@settings_
@given(st.fixed_dictionaries(NUMBERS))
def test_every_finding_has_what_it_must_say(numbers: dict[str, Any]) -> None:
    for found in diagnose(of(vllm(**numbers)), NO_TARGETS):
        assert found.summary
        if found.state == "present":
            assert found.evidence
            assert all(one.metric for one in found.evidence)
            assert found.try_first
            assert found.disproved_by
        assert bool(found.missing) == (found.state == "unknown")


@settings_
@given(st.fixed_dictionaries(dict.fromkeys(NUMBERS, st.floats())), st.sampled_from([None, 1, 64]))
def test_no_number_breaks_it(numbers: dict[str, Any], places: int | None) -> None:
    reading = of(vllm(**numbers), vllm(**numbers | {"finished": 1.0}))
    assert len(diagnose(reading, Targets(max_sequences=places))) == 3


def test_thresholds_have_their_reason_beside_them() -> None:
    import ast
    from pathlib import Path

    body = ast.parse(Path(thresholds.__file__).read_text(encoding="utf-8")).body[2:]
    values, reasons = body[::2], body[1::2]
    assert len(values) == len(reasons) >= 10
    assert all(isinstance(one, ast.Assign) for one in values)
    assert all(isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant) for one in reasons)
