"""Metrics of a fleet: what is exported is what was observed and what the status says, with bounded labels."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shoal.core import metrics as defined
from shoal.core.fleet_types import FleetStatus
from shoal.serve.fleet_metrics import MAX_REASONS, FleetMetrics
from tests.serve.fleet_statuses import STATES, empty, every_state, fleet, model, nothing_known, short_and_degraded


def samples(metrics: FleetMetrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """By name and sorted labels, as Prometheus reads them."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def value(metrics: FleetMetrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((f"shoal:fleet_{name}", tuple(sorted(labels.items()))))


def make(status: FleetStatus) -> FleetMetrics:
    return FleetMetrics(lambda: status, models={"small": 0, "big": 0}, tenants={"red", "blue"})


def test_a_request_is_observed_by_model_and_tenant() -> None:
    metrics = make(empty())
    timer = metrics.timer("small", "red", arrived=100.0, num_prompt_tokens=40, num_sequences=1)
    timer.first_token(100.4)
    timer.first_token(103.0)  # at another endpoint, after a migration: the client had its first token before
    timer.finished(101.4, "stop", 11)
    whose = {"model": "small", "tenant": "red"}
    assert value(metrics, "time_to_first_token_seconds_sum", **whose) == pytest.approx(0.4)
    assert value(metrics, "inter_token_latency_seconds_sum", **whose) == pytest.approx(0.1)
    assert value(metrics, "e2e_request_latency_seconds_sum", **whose) == pytest.approx(1.4)
    assert value(metrics, "time_to_first_token_seconds_count", **whose) == 1
    assert value(metrics, "requests_total", **whose, finished_reason="stop") == 1
    assert value(metrics, "requests_total", **whose, finished_reason="lost") == 0, "a rate needs a beginning"
    assert value(metrics, "prompt_tokens_total", **whose) == 40
    assert value(metrics, "generation_tokens_total", **whose) == 11
    assert value(metrics, "prompt_tokens_total", model="small", tenant="blue") is None


def test_sequences_are_observed_one_by_one_and_those_left_are_aborted() -> None:
    metrics = make(empty())
    timer = metrics.timer("small", "red", 0.0, 5, num_sequences=3)
    timer.first_token(1.0, index=2, num_tokens=4)
    timer.finished(2.0, "length", 4, index=2)
    timer.abandon()
    timer.abandon()
    whose = {"model": "small", "tenant": "red"}
    assert value(metrics, "requests_total", **whose, finished_reason="length") == 1
    assert value(metrics, "requests_total", **whose, finished_reason="abort") == 2
    assert value(metrics, "inter_token_latency_seconds_count", **whose) == 0, "all its tokens came at once"


def test_percentiles_of_a_model_over_all_its_tenants() -> None:
    metrics = make(empty())
    for i, tenant in enumerate(["red", "blue", "nobody"] * 10):
        timer = metrics.timer("big", tenant, float(i), 5, 1)
        timer.first_token(i + 0.2)
        timer.finished(i + 1.2, "stop", 11)
    ttft, itl, e2e = metrics.percentiles("big", 31.0)
    assert (ttft.count, itl.count, e2e.count) == (30, 30, 30)
    assert ttft.p50 == pytest.approx(0.2, rel=0.03)
    assert itl.p99 == pytest.approx(0.1, rel=0.03)
    assert e2e.p90 == pytest.approx(1.2, rel=0.03)
    assert metrics.percentiles("small", 31.0)[0].count == 0
    assert metrics.percentiles("big", 1000.0)[0].count == 0, "five minutes later all of it is forgotten"


def test_clients_cannot_make_series() -> None:
    metrics = make(empty())
    metrics.timer("small", "red", 0.0, 1, 1).finished(1.0, "stop", 1)
    metrics.timer("any", "any", 0.0, 1, 1).finished(1.0, "stop", 1)
    for i in range(MAX_REASONS):
        metrics.refused("any", "any", f"reason-{i}")
    before = len(samples(metrics))
    for i in range(200):
        metrics.timer(f"model-{i}", f"tenant-{i}", 0.0, 1, 1).finished(1.0, "stop", 1)
        metrics.refused(f"model-{i}", f"tenant-{i}", f"another-{i}")
    assert len(samples(metrics)) == before + 2, "one more of refusals, which is two lines: its value, when it began"
    assert value(metrics, "requests_refused_total", model="other", tenant="other", reason="other") == 200


def test_tenants_may_be_added_while_it_runs() -> None:
    tenants: set[str] = set()
    metrics = FleetMetrics(empty, models=["small"], tenants=tenants)
    metrics.refused("small", "green", "rate_limit")
    tenants.add("green")
    metrics.refused("small", "green", "rate_limit")
    whose = {"model": "small", "reason": "rate_limit"}
    assert value(metrics, "requests_refused_total", **whose, tenant="other") == 1
    assert value(metrics, "requests_refused_total", **whose, tenant="green") == 1


def test_the_status_is_exported_whole() -> None:
    status = every_state()
    metrics = make(status)
    small = status.models[0]
    for endpoint in small.endpoints:
        where = {"model": small.name, "endpoint": endpoint.name}
        shown = [s for s in STATES if value(metrics, "endpoint_state", **where, state=s)]
        assert shown == [endpoint.state]
        assert value(metrics, "endpoint_requests", **where) == endpoint.requests
        assert value(metrics, "endpoint_kv_usage", **where) == endpoint.kv_usage, "unknown is absent, not 0"
        assert value(metrics, "endpoint_restarts_total", **where) == endpoint.restarts
    assert value(metrics, "queue_tokens", model=small.name) == small.waiting_tokens
    assert value(metrics, "migrations_total", model=small.name) == small.migrations
    assert value(metrics, "n_plus_one", model=small.name) == 1


def test_n_plus_one_says_how_much_is_missing_and_nothing_while_it_is_unknown() -> None:
    metrics = make(short_and_degraded())
    assert value(metrics, "n_plus_one", model="llama-70b") == 0
    assert value(metrics, "n_plus_one_short_by", model="llama-70b") == 140
    assert value(metrics, "degraded", model="llama-70b") == 1
    unknown = make(nothing_known())
    assert value(unknown, "n_plus_one", model="new") is None
    assert value(unknown, "degraded", model="new") == 0


def test_an_endpoint_that_was_removed_has_no_series() -> None:
    status = every_state()
    metrics = FleetMetrics(lambda: status, models=[])
    assert value(metrics, "endpoint_requests", model="smollm2-135m", endpoint="small-0") is not None
    status = fleet([model("smollm2-135m", [])])
    assert value(metrics, "endpoint_requests", model="smollm2-135m", endpoint="small-0") is None


def test_every_definition_is_exported() -> None:
    metrics = make(every_state())
    metrics.timer("small", "red", 0.0, 1, 1)
    metrics.refused("small", "red", "deadline")
    text = metrics.text().decode()
    names = [m.name for m in vars(defined).values() if isinstance(m, defined.Metric) and "fleet" in m.name]
    assert len(names) > 25
    assert [name for name in names if f"# HELP {name}" not in text] == []
