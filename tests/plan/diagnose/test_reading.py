from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.plan.diagnose.reading import read, with_device
from tests.plan.diagnose.expositions import histogram, recorded, snapshot, vllm

SGLANG = """\
sglang:num_running_reqs{{dp_rank="0",tp_rank="0",priority=""}} {a}
sglang:num_running_reqs{{dp_rank="0",tp_rank="1",priority=""}} {a}
sglang:num_running_reqs{{dp_rank="0",tp_rank="0",priority="7"}} 99
sglang:num_running_reqs{{dp_rank="1",tp_rank="0",priority=""}} 5
sglang:num_queue_reqs{{dp_rank="0",tp_rank="0",priority=""}} 2
sglang:num_queue_reqs{{dp_rank="1",tp_rank="0",priority=""}} 0
sglang:token_usage{{dp_rank="0",tp_rank="0",priority=""}} 0.75
sglang:token_usage{{dp_rank="1",tp_rank="0",priority=""}} 0.25
sglang:fwd_occupancy NaN
# TYPE sglang:num_retracted_requests_total counter
sglang:num_retracted_requests_total{{dp_rank="0",tp_rank="0"}} 3
"""


def test_counters_are_growth_in_a_window_and_gauges_their_mean() -> None:
    reading = read([recorded("batch-before", 100.0), recorded("batch-after", 108.03)])
    assert reading.engine == "vllm"
    assert (reading.basis, reading.seconds) == ("window", pytest.approx(8.03))
    grown = reading.grown("generated_tokens")
    assert grown is not None
    assert reading.rate("generated_tokens") == pytest.approx(grown / 8.03)
    assert reading.gauges["running"].mean == 8
    # One step computes no more than the whole batch and one prompt.
    steps = reading.grown("steps")
    assert steps is not None
    assert 1 < grown / steps <= 8


def test_one_scrape_is_a_lifetime() -> None:
    reading = read([recorded("light")])
    assert (reading.basis, reading.seconds, reading.rate("generated_tokens")) == ("lifetime", None, None)
    assert reading.grown("finished") == 21


def test_a_restart_loses_only_what_was_before_it() -> None:
    states = [vllm(tokens=tokens, preemptions=tokens / 10) for tokens in (1000, 1500, 200, 300)]
    reading = read([snapshot(text, float(at)) for at, text in enumerate(states)])
    assert reading.grown("generated_tokens") == 500 + 200 + 100
    assert reading.grown("preemptions") == 80
    assert reading.resets == 1


@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=5), min_size=1, max_size=4))
def test_growth_is_what_was_counted_however_often_it_began_anew(lives: list[list[int]]) -> None:
    """Each list is a process that counts from 0, scraped after each step; the first scrape is at 0."""
    seen = [0.0]
    for life in lives:
        count = 0
        for step in life:
            count += step
            seen.append(float(count))
    reading = read([snapshot(vllm(tokens=value), float(at)) for at, value in enumerate(seen)])
    counted = sum(sum(life) for life in lives)
    grown = reading.grown("generated_tokens")
    # A restart that overtook the old count between two scrapes cannot be seen: then it is too little, never too much.
    assert grown is not None
    assert 0 <= grown <= counted
    if len(lives) == 1:
        assert grown == counted


def test_histograms_of_a_window_hold_what_was_observed_in_it() -> None:
    before = histogram("vllm:inter_token_latency_seconds", {0.01: 100, 0.1: 5}, 1.0)
    after = histogram("vllm:inter_token_latency_seconds", {0.01: 110, 0.1: 95}, 9.0)
    found = read([snapshot(before, 0.0), snapshot(after, 1.0)]).histogram("itl")
    assert found is not None
    assert (found.count, found.total) == (100, 8.0)
    p50 = found.percentile(0.5)
    assert p50 is not None
    assert (p50.low, p50.high) == (0.01, 0.1)


def test_copies_by_ranks_and_parts_of_sums_count_once() -> None:
    reading = read([snapshot(SGLANG.format(a=4))])
    assert reading.engine == "sglang"
    assert reading.gauge("running") == 9
    assert reading.gauge("waiting") == 2
    assert reading.gauge("kv_usage") == 0.75, "of the fullest replica"
    assert reading.grown("preemptions") == 3
    assert [(part.name, part.running, part.waiting) for part in reading.parts] == [
        ("dp_rank 0", 4, 2),
        ("dp_rank 1", 5, 0),
    ]


def test_engines_of_one_exposition_are_replicas() -> None:
    text = vllm(running=8, waiting=9, engine="0") + vllm(running=1, engine="1")
    reading = read([snapshot(text)])
    assert reading.gauge("running") == 9
    assert [part.name for part in reading.parts] == ["engine 0", "engine 1"]
    assert not read([recorded("light")]).parts, "one alone is no fleet"


def test_percent_and_shares_are_one_unit_and_devices_are_lent() -> None:
    device = read([snapshot('DCGM_FI_DEV_GPU_UTIL{gpu="0"} 40\nDCGM_FI_DEV_GPU_UTIL{gpu="1"} 60\n')])
    assert device.gauge("device_busy") == pytest.approx(0.5)
    assert with_device(read([recorded("light")]), [device]).gauge("device_busy") == pytest.approx(0.5)
    own = read([snapshot(vllm(device={"DCGM_FI_PROF_SM_ACTIVE": 0.9}))])
    other = read([snapshot("DCGM_FI_PROF_SM_ACTIVE 0.1\n")])
    assert with_device(own, [other]).gauge("sm_active") == 0.9, "its own goes before others'"


def test_a_gauge_that_was_never_set_is_not_there() -> None:
    reading = read([snapshot("vllm:num_requests_running 1\nvllm:kv_cache_usage_perc NaN\n")])
    assert reading.gauge("kv_usage") is None
    assert not any(math.isnan(gauge.mean) for gauge in reading.gauges.values())
