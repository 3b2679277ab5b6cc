"""Estimates of serving: laws that hold whatever the constants, small cases by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.core.cost.model import CostModel
from shoal.core.cost.types import StepShape
from shoal.plan.steady_state import (
    FIRST,
    closed_loop,
    disaggregated,
    exponential,
    offline,
    open_loop,
    static_batch,
    steady,
)
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
    assert steady(cost, CHAT, 5.0) == steady(cost, CHAT, 5.0)


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


def test_a_load_below_the_most_is_kept_up_with_and_one_above_it_is_not():
    cost = CostModel(engine(tp=8))
    most = offline(cost, CHAT).requests_per_second
    calm, crowded = steady(cost, CHAT, 0.5 * most), steady(cost, CHAT, 1.2 * most)
    assert not calm.saturated
    assert crowded.saturated
    assert steady(cost, CHAT, 5 * most).saturated
    assert calm.requests_per_second == pytest.approx(0.5 * most, rel=0.05)
    assert crowded.ttft.p90 > 3 * calm.ttft.p90


@pytest.mark.parametrize("load", [0.6, 0.75, 0.9])
@pytest.mark.parametrize("before", [100, 400])
def test_arrivals_of_a_run_are_those_of_a_long_one(load, before):
    """By the waits of a queue whose service takes `load` mean gaps: their mean is known (Pollaczek-Khinchine)."""

    def waits(first, count):
        wait, found = 0.0, []
        for number in range(count):
            wait = max(0.0, wait + load - exponential(first + number))
            found.append(wait)
        return found

    run, long = sorted(waits(FIRST, before + 1600)[before:]), sorted(waits(0, 100_000))
    assert sum(run) / 1600 == pytest.approx(load**2 / (2 * (1 - load)), rel=0.15)
    assert run[int(0.99 * 1600)] == pytest.approx(long[99_000], rel=0.15)


def test_neither_ramp_is_counted():
    """A load generator's run begins and ends with an empty engine; a load that lasts has neither."""
    cost = CostModel(engine(tp=8))
    rate = 0.8 * offline(cost, CHAT).requests_per_second
    run, lasting = open_loop(cost, CHAT, rate, requests=300), steady(cost, CHAT, rate, requests=300)
    assert lasting.concurrency > 1.1 * run.concurrency
    assert lasting.tpot.mean > run.tpot.mean
    usual, longer = (steady(cost, CHAT, rate, requests=requests) for requests in (1600, 6400))
    assert usual.tpot.mean == pytest.approx(longer.tpot.mean, rel=0.1)
    assert usual.concurrency == pytest.approx(longer.concurrency, rel=0.1)


def test_engines_behind_a_router_wait_less_than_one_alone():
    cost = CostModel(engine(tp=8))
    rate = 0.8 * offline(cost, CHAT).requests_per_second
    alone, together = steady(cost, CHAT, rate), steady(cost, CHAT, 4 * rate, engines=4)
    assert together.ttft.p99 < alone.ttft.p99
    assert together.tpot.mean == pytest.approx(alone.tpot.mean, rel=0.1)
    assert together.utilisation == pytest.approx(alone.utilisation, rel=0.1)
    assert together.requests_per_second == pytest.approx(4 * alone.requests_per_second, rel=0.1)


def test_a_pipeline_stalls_when_its_steps_become_longer():
    """Behind a short step, the stages of a longer one are waited for: gaps are longer than its time alone."""
    cost = CostModel(engine(tp=4, pp=2, max_batch_tokens=512))
    found = steady(cost, Workload(inputs=Lengths.fixed(2000), outputs=Lengths.fixed(300)), 2.0)
    chunk = cost.engine.max_batch_tokens
    step = StepShape(
        prefill_tokens=chunk, prefill_rows=1, prefill_pairs=chunk * 1000.0, prefill_context=2000, decode_rows=8,
        decode_context=8 * 2150, sampled=8,
    )  # fmt: skip
    assert found.itl.p99 > 1.1 * cost.seconds(step)


def test_pieces_of_a_prompt_are_as_many_steps_as_it_fills():
    """Those that are computed together, too."""
    cost = CostModel(engine(tp=8))
    chunk = cost.engine.max_batch_tokens
    work = Workload(inputs=Lengths.fixed(5 * chunk + 1), outputs=Lengths.fixed(1))
    one = closed_loop(cost, work, 1, requests=1)
    steps = [
        cost.seconds(
            StepShape(
                prefill_tokens=n, prefill_rows=1, prefill_pairs=n * (before + (n + 1) / 2), prefill_context=before + n,
                sampled=0 if n == chunk else 1,
            )
        )
        for before, n in [*((number * chunk, chunk) for number in range(5)), (5 * chunk, 1)]
    ]  # fmt: skip
    profile = cost.profile
    front = profile.front_seconds + profile.front_request_seconds + (5 * chunk + 1) * profile.front_token_seconds
    assert one.ttft.mean == pytest.approx(sum(steps) + front, rel=0.01)


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
