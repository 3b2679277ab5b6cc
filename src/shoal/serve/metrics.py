"""Prometheus text from core's definitions: histograms filled here, gauges and counters read off the engine's load."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from shoal.core import metrics as defined
from shoal.core.metrics import Metric
from shoal.core.types import EngineLoad, FinishReason
from shoal.serve.fleet import Fleet
from shoal.serve.generation import Piece
from shoal.serve.pool import Pool
from shoal.serve.shoal_endpoint import ShoalEndpoint


class ServerMetrics:
    """One registry a server; nothing global."""

    def __init__(self, fleet: Fleet) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(fleet))
        self._ttft, self._itl, self._e2e = (self._histogram(m) for m in (defined.TTFT, defined.ITL, defined.E2E))
        self._prompt_length = self._histogram(defined.PROMPT_LENGTH)
        self._output_length = self._histogram(defined.OUTPUT_LENGTH)
        self._requests = self._counter(defined.REQUESTS)
        for reason in get_args(FinishReason):
            self._requests.labels(reason)  # a series that begins at 0 has a rate from its first event on
        self._rejected = self._counter(defined.REJECTED)

    def _histogram(self, metric: Metric) -> Histogram:
        return Histogram(metric.name, metric.help, metric.labels, registry=self.registry, buckets=metric.buckets)

    def _counter(self, metric: Metric) -> Counter:
        return Counter(metric.name, metric.help, metric.labels, registry=self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def rejected(self, status: int) -> None:
        self._rejected.labels(str(status)).inc()

    def timer(self, arrived: float, num_prompt_tokens: int, num_sequences: int) -> RequestTimer:
        """For one prompt of a request that arrived at that monotonic second."""
        self._prompt_length.observe(num_prompt_tokens)
        return RequestTimer(self, arrived, num_sequences)


class RequestTimer:
    """Observes the pieces of one request as they are sent."""

    def __init__(self, metrics: ServerMetrics, arrived: float, num_sequences: int) -> None:
        self._metrics = metrics
        self._arrived = arrived
        self._first: list[tuple[float, int] | None] = [None] * num_sequences
        self._num_tokens = [0] * num_sequences
        self._num_unfinished = num_sequences

    def observe(self, piece: Piece) -> None:
        i, m = piece.index, self._metrics
        self._num_tokens[i] += len(piece.token_ids)
        if self._first[i] is None and piece.token_ids:
            now = time.monotonic()
            self._first[i] = (now, len(piece.token_ids))
            m._ttft.observe(now - self._arrived)
        if piece.finish is None:
            return
        now = time.monotonic()
        self._num_unfinished -= 1
        m._requests.labels(piece.finish).inc()
        m._e2e.observe(now - self._arrived)
        m._output_length.observe(self._num_tokens[i])
        first = self._first[i]
        if first is not None and self._num_tokens[i] > first[1]:
            m._itl.observe((now - first[0]) / (self._num_tokens[i] - first[1]))

    def abandon(self) -> None:
        """The client left: nobody waits for the pieces that end the other sequences."""
        self._metrics._requests.labels("abort").inc(self._num_unfinished)
        self._num_unfinished = 0


def own_engines(pool: Pool) -> list[ShoalEndpoint]:
    """Those of a pool's endpoints that are engines which the fleet started, and that are up."""
    endpoints = [member.endpoint for member in pool.members.values()]
    return [one for one in endpoints if isinstance(one, ShoalEndpoint) and one.pid is not None]


class _EngineCollector:
    """Over all engines that the fleet started: every count is their sum."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def describe(self) -> Iterator[GaugeMetricFamily]:
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        engines = [engine for pool in self._fleet.pools.values() for engine in own_engines(pool)]
        loads = [(engine.load, engine) for engine in engines if engine.load is not None]
        if not loads:
            return
        names = EngineLoad.__struct_fields__
        load = EngineLoad(**{name: sum(getattr(one, name) for one, _ in loads if one is not None) for name in names})
        held = load.num_blocks - load.num_free_blocks
        capacity = sum(
            (one.num_blocks - one.num_free_blocks) * engine.info.block_size for one, engine in loads if one is not None
        )
        now = time.monotonic()
        ages = [m.watch.silence(now) for m in self._fleet.members() if m.attempts and m.state != "down"]
        for metric, value in (
            (defined.RUNNING, load.num_running),
            (defined.SLOTS, sum(engine.config.max_sequences for _, engine in loads)),
            (defined.WAITING, load.num_waiting),
            (defined.KV_USAGE, held / load.num_blocks),
            (defined.KV_FILL, load.num_live_tokens / capacity if capacity else 1.0),
            (defined.PROGRESS_AGE, max(ages, default=0.0)),
            (defined.WARM_SPARES, sum(engine.num_spares for engine in engines)),
        ):
            yield GaugeMetricFamily(metric.name, metric.help, value)
        for metric, count in (
            (defined.PROMPT_TOKENS, load.prompt_tokens),
            (defined.CACHE_QUERIES, load.prompt_tokens + load.cached_tokens),
            (defined.CACHE_HITS, load.cached_tokens),
            (defined.GENERATED_TOKENS, load.generated_tokens),
            (defined.PREEMPTIONS, load.preemptions),
            (defined.STEPS, load.steps),
            (defined.FAILURES, load.failures),
        ):
            yield CounterMetricFamily(metric.name, metric.help, count)
        yield from self._imbalance(engines)

    def _imbalance(self, engines: list[ShoalEndpoint]) -> Iterator[GaugeMetricFamily]:
        metric, loads = defined.EXPERT_IMBALANCE, [load for engine in engines for load in engine.experts]
        if not loads:
            return
        family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
        for number, load in enumerate(loads):
            family.add_metric([str(number), "experts"], load.expert_imbalance)
            family.add_metric([str(number), "ranks"], load.rank_imbalance)
        yield family
