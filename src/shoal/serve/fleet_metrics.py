"""Prometheus text of a fleet: latencies and ends observed here by model and tenant, the rest read off its status.

Observed per request, first token and end of a sequence, never per token. Labels are bounded: of models and tenants by
what is configured, of endpoints by what is in the fleet, of reasons by a number.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family

from shoal.core import metrics as defined
from shoal.core.fleet_types import EndpointState, EndpointStatus, FleetStatus, ModelStatus, Percentiles
from shoal.core.latency_window import LatencyWindow
from shoal.core.metrics import Metric
from shoal.core.types import FinishReason

OTHER = "other"
"""Stands for whatever is not configured: a client must not be able to make a series by naming one."""
MAX_REASONS = 32

_BREAKER = {"closed": 0.0, "half_open": 0.5, "open": 1.0}

_OF_MODEL: tuple[tuple[Metric, Callable[[ModelStatus], float | None]], ...] = (
    (defined.FLEET_RUNNING, lambda model: model.running),
    (defined.FLEET_WAITING, lambda model: model.waiting),
    (defined.FLEET_WAITING_TOKENS, lambda model: model.waiting_tokens),
    (defined.FLEET_DEGRADED, lambda model: bool(model.served_by)),
    (defined.FLEET_N_PLUS_ONE, lambda model: model.n_plus_one.ok if model.n_plus_one.known else None),
    (defined.FLEET_SHORT_BY, lambda model: model.n_plus_one.short_by if model.n_plus_one.known else None),
    (defined.FLEET_MIGRATIONS, lambda model: model.migrations),
    (defined.FLEET_RETRIES, lambda model: model.retries),
    (defined.FLEET_HEDGES, lambda model: model.hedges),
    (defined.FLEET_DEGRADATIONS, lambda model: model.degradations),
)
_OF_ENDPOINT: tuple[tuple[Metric, Callable[[EndpointStatus], float | None]], ...] = (
    (defined.ENDPOINT_REQUESTS, lambda endpoint: endpoint.requests),
    (defined.ENDPOINT_TOKENS, lambda endpoint: endpoint.tokens),
    (defined.ENDPOINT_RUNNING, lambda endpoint: endpoint.num_running),
    (defined.ENDPOINT_WAITING, lambda endpoint: endpoint.num_waiting),
    (defined.ENDPOINT_KV_USAGE, lambda endpoint: endpoint.kv_usage),
    (defined.ENDPOINT_STEP_AGE, lambda endpoint: endpoint.step_age),
    (defined.ENDPOINT_STEP, lambda endpoint: endpoint.median_step),
    (defined.ENDPOINT_PREFILL_SPEED, lambda endpoint: endpoint.prefill_speed),
    (defined.ENDPOINT_DECODE, lambda endpoint: endpoint.decode_seconds),
    (defined.ENDPOINT_BREAKER, lambda endpoint: _BREAKER[endpoint.breaker]),
    (defined.ENDPOINT_RESTARTS, lambda endpoint: endpoint.restarts),
    (defined.ENDPOINT_COMPLETED, lambda endpoint: endpoint.completed),
    (defined.ENDPOINT_FAILURES, lambda endpoint: endpoint.failures),
)


class _Windows:
    """What one model did in the last five minutes, all tenants together."""

    def __init__(self) -> None:
        self.ttft, self.itl, self.e2e = LatencyWindow(), LatencyWindow(), LatencyWindow()


class FleetMetrics:
    """One registry a gateway; nothing global. Times are monotonic seconds.

    `models` and `tenants` are asked with every request, so that they may grow: pass the live dictionaries.
    """

    def __init__(
        self, status: Callable[[], FleetStatus], *, models: Container[str], tenants: Container[str] = ()
    ) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_StatusCollector(status))
        self._models, self._tenants = models, tenants
        self._reasons: dict[str, None] = {}
        self._windows: dict[str, _Windows] = {}
        self._series: dict[tuple[str, str], _Series] = {}
        self.ttft, self.itl, self.e2e = (
            Histogram(m.name, m.help, m.labels, registry=self.registry, buckets=m.buckets)
            for m in (defined.FLEET_TTFT, defined.FLEET_ITL, defined.FLEET_E2E)
        )
        self.requests, self._refused, self.prompt_tokens, self.generated_tokens = (
            Counter(m.name, m.help, m.labels, registry=self.registry)
            for m in (
                defined.FLEET_REQUESTS,
                defined.FLEET_REFUSED,
                defined.FLEET_PROMPT_TOKENS,
                defined.FLEET_GENERATED_TOKENS,
            )
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def refused(self, model: str, tenant: str, reason: str) -> None:
        """A request was not accepted. `reason` is a code of the gateway's, never a client's text."""
        if reason not in self._reasons and len(self._reasons) < MAX_REASONS:
            self._reasons[reason] = None
        self._refused.labels(*self._labels(model, tenant), reason if reason in self._reasons else OTHER).inc()

    def timer(self, model: str, tenant: str, arrived: float, num_prompt_tokens: int, num_sequences: int) -> FleetTimer:
        """For a request that was accepted. `model` is what the client asked for, also where another one serves it."""
        labels = self._labels(model, tenant)
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = _Series(self, labels)
        series.prompt_tokens.inc(num_prompt_tokens)
        return FleetTimer(series, arrived, num_sequences)

    def windows(self, model: str) -> _Windows:
        return self._windows.setdefault(model, _Windows())

    def percentiles(self, model: str, now: float) -> tuple[Percentiles, Percentiles, Percentiles]:
        """Time to first token, between tokens, and to the end: for `ModelStatus.ttft`, `itl` and `e2e`."""
        windows = self.windows(model)
        return windows.ttft.percentiles(now), windows.itl.percentiles(now), windows.e2e.percentiles(now)

    def _labels(self, model: str, tenant: str) -> tuple[str, str]:
        return model if model in self._models else OTHER, tenant if tenant in self._tenants else OTHER


class _Series:
    """What is counted of one model and tenant, looked up once. Counters begin at 0, so that they have a rate from their
    first event on."""

    def __init__(self, metrics: FleetMetrics, labels: tuple[str, str]) -> None:
        self.ttft, self.itl, self.e2e = (h.labels(*labels) for h in (metrics.ttft, metrics.itl, metrics.e2e))
        self.prompt_tokens = metrics.prompt_tokens.labels(*labels)
        self.generated_tokens = metrics.generated_tokens.labels(*labels)
        self.finished = {reason: metrics.requests.labels(*labels, reason) for reason in get_args(FinishReason)}
        self.windows = metrics.windows(labels[0])


class FleetTimer:
    """Observes one request: the first token of each of its sequences, and their ends."""

    def __init__(self, series: _Series, arrived: float, num_sequences: int) -> None:
        self._series = series
        self._arrived = arrived
        self._first: list[tuple[float, int] | None] = [None] * num_sequences
        self._num_unfinished = num_sequences

    def first_token(self, now: float, index: int = 0, num_tokens: int = 1) -> None:
        """`num_tokens` came at once. A second call for a sequence, as after a migration, is ignored."""
        if self._first[index] is not None:
            return
        self._first[index] = (now, num_tokens)
        self._series.ttft.observe(now - self._arrived)
        self._series.windows.ttft.observe(now - self._arrived, now)

    def finished(self, now: float, reason: FinishReason, num_tokens: int, index: int = 0) -> None:
        """A sequence ended with so many tokens in all, from however many endpoints they came."""
        self._num_unfinished -= 1
        series, latency, first = self._series, now - self._arrived, self._first[index]
        series.finished[reason].inc()
        series.generated_tokens.inc(num_tokens)
        series.e2e.observe(latency)
        series.windows.e2e.observe(latency, now)
        if first is not None and num_tokens > first[1]:
            between = (now - first[0]) / (num_tokens - first[1])
            series.itl.observe(between)
            series.windows.itl.observe(between, now)

    def abandon(self) -> None:
        """The client left: nobody waits for the ends of the sequences that are still running."""
        self._series.finished["abort"].inc(self._num_unfinished)
        self._num_unfinished = 0


class _StatusCollector:
    def __init__(self, status: Callable[[], FleetStatus]) -> None:
        self._status = status

    def describe(self) -> Iterator[Family]:
        return iter(())

    def collect(self) -> Iterator[Family]:
        models = self._status().models
        endpoints = [(model.name, endpoint) for model in models for endpoint in model.endpoints]
        for metric, of_model in _OF_MODEL:
            yield _family(metric, (((model.name,), of_model(model)) for model in models))
        for metric, of_endpoint in _OF_ENDPOINT:
            yield _family(metric, (((name, endpoint.name), of_endpoint(endpoint)) for name, endpoint in endpoints))
        states = get_args(EndpointState)
        yield _family(
            defined.ENDPOINT_STATE,
            (((name, e.name, state), float(e.state == state)) for name, e in endpoints for state in states),
        )


def _family(metric: Metric, samples: Iterable[tuple[tuple[str, ...], float | None]]) -> Family:
    """What is not known has no sample: 0 would be a claim."""
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=metric.labels)
    for labels, value in samples:
        if value is not None:
            family.add_metric(labels, value)
    return family
