"""The traces of the live routing benchmark, and what is made of its samples."""

import pytest

from gateway.routers import Router
from gateway.routing_live import GROUP, LONG, SHARED, Results, Sample, make_trace, render_trace


@pytest.mark.parametrize("name", ["skewed", "system prompt"])
def test_traces_follow_from_the_seed(name):
    one = make_trace(name, 1, 50.0, 20.0)
    assert one == make_trace(name, 1, 50.0, 20.0) != make_trace(name, 2, 50.0, 20.0)
    assert 800 < len(one) < 1200
    assert all(before.at <= after.at < 20.0 for before, after in zip(one, one[1:], strict=False))


def test_one_request_of_each_group_is_long():
    trace = make_trace("skewed", 3, 100.0, 30.0)
    where = [number for number, arrival in enumerate(trace) if arrival.num_prompt == LONG]
    whole = len(trace) // GROUP
    assert [number // GROUP for number in where][:whole] == list(range(whole))
    assert len({number % 8 for number in where}) > 1  # not always the same engine's turn


def test_most_prompts_share_their_beginning():
    trace = make_trace("system prompt", 3, 100.0, 20.0)
    share = sum(arrival.num_shared == SHARED for arrival in trace) / len(trace)
    assert 0.7 < share < 0.9
    assert all(arrival.num_prompt > arrival.num_shared for arrival in trace)


def sample(p99, *, valid=True):
    figures = {"ttft_p50": p99 / 2, "ttft_p99": p99, "e2e_p50": 1.0, "completed": 9, "offered": 10, "valid": valid}
    return Sample(figures, 0.25, 0.0)


def test_the_best_policy_is_that_of_the_lowest_median_and_ratios_are_within_rounds():
    shoal = Router("shoal", "", None, ("predicted_completion", "round_robin"))
    rival = Router("vllm-router", "", None, ("cache_aware", "power_of_two"))
    results = Results([(router, policy) for router in (shoal, rival) for policy in router.policies], {})
    given = {
        ("shoal", "predicted_completion"): [0.1, 0.2, 0.3],
        ("shoal", "round_robin"): [1.0, 1.0, 1.0],
        ("vllm-router", "cache_aware"): [0.1, 5.0, 5.0],
        ("vllm-router", "power_of_two"): [0.2, 0.4, 0.6],
    }
    for (router, policy), values in given.items():
        results.samples["skewed", router, policy] = {number: sample(value) for number, value in enumerate(values)}
    assert results.best("skewed", "vllm-router") == "power_of_two"
    assert results.best("skewed", "sglang-router") is None
    text = "\n".join(render_trace(results, "skewed"))
    assert "that of shoal with round_robin: 0.20 (0.10–0.30)" in text
    assert "that of vllm-router with power_of_two, its best: 0.50 (0.50–0.50)" in text
    times = "500 (500–500) | 1,000 (1,000–1,000) | 1,000 (1,000–1,000)"
    assert f"| shoal | round_robin | {times} | 0.25 (0.25–0.25) | 27 of 30 | 3 |" in text


def test_a_round_in_which_the_generator_was_disturbed_does_not_count():
    shoal = Router("shoal", "", None, ("predicted_completion",))
    results = Results([(shoal, "predicted_completion")], {})
    samples = {0: sample(0.1), 1: sample(9.0, valid=False)}
    results.samples["skewed", "shoal", "predicted_completion"] = samples
    assert results.values("skewed", "shoal", "predicted_completion", "ttft_p99") == {0: 0.1}
