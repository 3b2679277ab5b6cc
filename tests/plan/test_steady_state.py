"""Estimates of serving: laws that hold whatever the constants, small cases by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.core.cost.model import CostModel
from shoal.plan.steady_state import capacity, closed_loop, disaggregated, offline, open_loop, static_batch
from shoal.plan.workload import Lengths, Weighted, Workload, scattered
from tests.core.cost.engines import DEEPSEEK, LLAMA_8B, LLAMA_70B, LLAMA_405B, engine

CHAT = Workload(inputs=Lengths.uniform(800, 1000), outputs=Lengths.uniform(160, 200))


def test_more_clients_give_more_tokens_and_wait_longer():
    cost = CostModel(engine(tp=8))
    found = [closed_loop(cost, CHAT, clients) for clients in (1, 4, 16, 64)]
    for less, more in zip(found, found[1:], strict=False):
        assert more.output_tokens_per_second > less.output_tokens_per_second
        assert more.tpot.mean > less.tpot.mean
    for each in found:
        assert each.ttft.p50 <= each.ttft.p90 <= each.ttft.p99
        assert each.ttft.low < each.ttft.mean < each.ttft.high
        assert 0 < each.utilisation <= 1


def test_one_client_alone_sees_a_prompt_and_then_steps():
    cost = CostModel(engine(LLAMA_8B))
    work = Workload(inputs=Lengths.fixed(500), outputs=Lengths.fixed(100))
    found, batch = closed_loop(cost, work, 1), static_batch(cost, 500, 100, 1)
    assert found.tpot.mean == pytest.approx(batch.tpot.mean, rel=0.02)
    profile = cost.profile
    front = profile.front_seconds + profile.front_request_seconds + 500 * profile.front_token_seconds
    assert found.ttft.mean == pytest.approx(batch.ttft.mean + front, rel=0.02)
    assert found.requests_per_second == pytest.approx(found.output_tokens_per_second / 100)


def test_the_same_question_has_the_same_answer():
    cost = CostModel(engine(tp=4))
    assert closed_loop(cost, CHAT, 16) == closed_loop(cost, CHAT, 16)
    assert open_loop(cost, CHAT, 5.0) == open_loop(cost, CHAT, 5.0)


def test_a_cache_that_is_too_small_makes_requests_wait():
    cost = CostModel(engine(LLAMA_70B, tp=2))
    long = Workload(inputs=Lengths.fixed(8000), outputs=Lengths.fixed(500))
    few, many = closed_loop(cost, long, 2, requests=12), closed_loop(cost, long, 48, requests=144)
    assert many.cache_share > 0.9
    assert many.concurrency < 24
    assert many.ttft.p50 > 5 * few.ttft.p50


def test_what_does_not_fit_is_refused_with_its_number():
    found = closed_loop(CostModel(engine(LLAMA_405B, tp=4)), CHAT, 1)
    assert "GB more than a device's" in found.refused
    assert found.ttft.mean == float("inf")
    long = Workload(inputs=Lengths.fixed(2_000_000), outputs=Lengths.fixed(10))
    assert "one sequence takes up to 2000010" in offline(CostModel(engine(tp=8)), long).refused


def test_an_open_loop_below_its_capacity_keeps_up_and_above_it_does_not():
    cost = CostModel(engine(tp=8))
    most = offline(cost, CHAT).requests_per_second
    calm, crowded = open_loop(cost, CHAT, 0.5 * most), open_loop(cost, CHAT, 2.0 * most)
    assert not calm.saturated
    assert crowded.saturated
    assert calm.requests_per_second == pytest.approx(0.5 * most, rel=0.15)  # It begins and ends empty.
    assert crowded.ttft.p90 > 3 * calm.ttft.p90


def test_capacity_meets_its_targets():
    cost = CostModel(engine(tp=8))
    rate, found = capacity(cost, CHAT, ttft=1.0, itl=0.1)
    assert rate > 0
    assert found.ttft.p99 <= 1.0
    assert found.itl.p99 <= 0.1
    nothing, _ = capacity(cost, CHAT, itl=1e-3)
    assert nothing == 0


def test_pools_decode_without_interruption():
    cost = CostModel(engine(tp=8))
    work = Workload(inputs=Lengths.fixed(4000), outputs=Lengths.fixed(200))
    mixed = closed_loop(cost, work, 32, requests=200)
    apart = disaggregated(cost, 1, cost, 1, work, 32, requests=200, transfer_seconds=0.01)
    assert apart.tpot.mean < mixed.tpot.mean
    assert apart.itl.p99 < mixed.itl.p99
    half = disaggregated(cost, 1, cost, 2, work, 32, requests=200)
    assert half.tpot.mean < apart.tpot.mean


def test_a_scheduler_that_looks_seldom_answers_late():
    cost = CostModel(engine(tp=8))
    assert closed_loop(cost, CHAT, 16, poll_steps=30).ttft.p50 > closed_loop(cost, CHAT, 16).ttft.p50
    waiting = closed_loop(cost, CHAT, 16, wait_steps=20)
    assert waiting.ttft.p50 > closed_loop(cost, CHAT, 16).ttft.p50


def test_groups_of_attention_hold_more_sequences_of_a_latent():
    together = CostModel(engine(DEEPSEEK, tp=8, weights="float4"))
    apart = CostModel(engine(DEEPSEEK, attention_dp=8, weights="float4"))
    work = Workload(inputs=Lengths.fixed(30_000), outputs=Lengths.fixed(100))
    busy = closed_loop(together, work, 64, requests=128), closed_loop(apart, work, 64, requests=128)
    assert busy[1].cache_share < busy[0].cache_share


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(50, 3000), st.integers(2, 300))
def test_every_request_is_answered_whole(clients, inputs, outputs):
    work = Workload(inputs=Lengths.uniform(inputs // 2 + 1, inputs), outputs=Lengths.uniform(outputs // 2 + 1, outputs))
    found = closed_loop(CostModel(engine(tp=8)), work, clients, requests=3 * clients)
    asked = sum(work.request(number)[1] for number in range(3 * clients))
    assert found.output_tokens_per_second / found.requests_per_second == pytest.approx(asked / (3 * clients))
    assert found.end_to_end.mean > found.ttft.mean
    assert found.itl.mean > 0


def test_lengths():
    assert Lengths.fixed(7).mean == 7
    assert Lengths.of([30, 10, 20]).mean == 20
    assert Lengths.of([30, 10, 20]).longest == 30
    assert {Lengths.uniform(1, 3).at(share) for share in (0.01, 0.5, 0.99)} == {1, 2, 3}
    with pytest.raises(ValueError, match="no lengths"):
        Lengths.of([])
    drawn = [scattered(number, 1) for number in range(2000)]
    assert sum(drawn) / 2000 == pytest.approx(0.5, abs=0.02)
    assert sum(value < 0.1 for value in drawn) == pytest.approx(200, abs=40)


def test_quantiles_count_weights():
    values = Weighted()
    values.add(1.0, 98)
    values.add(5.0, 2)
    assert values.mean() == pytest.approx(1.08)
    assert values.quantiles((0.5, 0.99)) == [1.0, 5.0]


def test_an_engine_that_prefills_apart_takes_in_who_came_meanwhile():
    """Requests that come during a step of prompts do not wait for a sequence to end."""
    cost = CostModel(engine(tp=8, profile="sglang"))
    found = closed_loop(cost, Workload(inputs=Lengths.uniform(800, 1000), outputs=Lengths.uniform(800, 1000)), 4)
    assert found.ttft.p99 < 0.1 * found.end_to_end.p50
