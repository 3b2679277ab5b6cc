"""What an engine did in a window, in neutral quantities: gauges as they were, counters and histograms as they grew."""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal.plan.diagnose.dialects import DEVICE, QUANTITIES, Dialect, Fold, Replicas, dialects_of
from shoal.plan.diagnose.histogram import Histogram, merged
from shoal.plan.diagnose.prometheus_text import Exposition, Labels, Sample

Basis = Literal["window", "lifetime"]
_MOST = 1e18
"""No quantity here is negative or reaches this: what does was not counted."""


class Snapshot(msgspec.Struct, frozen=True):
    exposition: Exposition
    at: float | None = None
    """Monotonic seconds; None where it is not known when it was taken."""


class Gauge(msgspec.Struct, frozen=True):
    mean: float
    low: float
    high: float
    readings: int
    metric: str


class Counter(msgspec.Struct, frozen=True):
    grown: float
    metric: str


class Latency(msgspec.Struct, frozen=True):
    histogram: Histogram
    metric: str


class Interval(msgspec.Struct, frozen=True):
    """Between two readings of a window."""

    running: float
    """In the batch, halfway between both."""
    tokens_per_second: float


class Part(msgspec.Struct, frozen=True):
    """One replica of a fleet: means of its gauges."""

    name: str
    running: float
    waiting: float
    kv_usage: float | None = None
    itl: float | None = None
    """Mean seconds between tokens, where it is known."""


class Reading(msgspec.Struct, frozen=True):
    engine: str
    """Name of the dialect; "" where no engine's metrics were found."""
    basis: Basis
    """lifetime: counters since the engine started, gauges at one moment."""
    seconds: float | None
    """Of the window; None where it is not known."""
    gauges: dict[str, Gauge] = {}
    counters: dict[str, Counter] = {}
    latencies: dict[str, Latency] = {}
    intervals: tuple[Interval, ...] = ()
    parts: tuple[Part, ...] = ()
    resets: int = 0
    """Times that the engine started anew within the window: what it counted before is lost."""

    def gauge(self, name: str) -> float | None:
        found = self.gauges.get(name)
        return found.mean if found else None

    def grown(self, name: str) -> float | None:
        found = self.counters.get(name)
        return found.grown if found else None

    def rate(self, name: str) -> float | None:
        """A second."""
        grown = self.grown(name)
        return grown / self.seconds if grown is not None and self.seconds else None

    def histogram(self, name: str) -> Histogram | None:
        """None if it is not there or saw nothing."""
        found = self.latencies.get(name)
        return found.histogram if found and found.histogram.count else None

    def metric(self, name: str) -> str:
        found = self.gauges.get(name) or self.counters.get(name) or self.latencies.get(name)
        return found.metric if found else ""


def read(snapshots: list[Snapshot], seconds: float | None = None) -> Reading:
    """From scrapes of one target in order of time; of one alone, over the engine's lifetime.

    `seconds` is the length of the window where the snapshots do not say when they were taken.
    """
    last = snapshots[-1].exposition
    engine, has_device = dialects_of(list(last))
    first_at, last_at = snapshots[0].at, snapshots[-1].at
    if len(snapshots) == 1:
        seconds = None
    elif first_at is not None and last_at is not None:
        seconds = last_at - first_at
    gauges, counters, latencies, resets = {}, {}, {}, 0
    for dialect in (*([engine] if engine else []), *([DEVICE] if has_device else [])):
        for name in dialect.names:
            metric = _present(dialect, name, last)
            if metric is None:
                continue
            quantity = QUANTITIES[name]
            if quantity.kind == "gauge":
                values = [_gauge(one.exposition, dialect, name, metric, quantity.fold) for one in snapshots]
                known = [value for value in values if value is not None]
                if known:
                    gauges[name] = Gauge(sum(known) / len(known), min(known), max(known), len(known), metric)
            elif quantity.kind == "counter":
                grown, times = _growth([_series(s.exposition, dialect, name, metric) for s in snapshots])
                counters[name], resets = Counter(sum(grown.values()), metric), max(resets, times)
            else:
                latencies[name] = Latency(_histogram(snapshots, dialect, name, metric), metric)
    return Reading(
        engine=engine.name if engine else "",
        basis="window" if len(snapshots) > 1 else "lifetime",
        seconds=seconds,
        gauges=gauges,
        counters=counters,
        latencies=latencies,
        intervals=_intervals(snapshots, engine) if engine else (),
        parts=_parts(snapshots, engine, engine.replicas) if engine and engine.replicas else (),
        resets=resets,
    )


def with_device(reading: Reading, devices: list[Reading]) -> Reading:
    """With the means of what exporters on other ports say of the devices, if it has nothing of its own."""
    missing = [name for name in DEVICE.names if name not in reading.gauges]
    gauges = dict(reading.gauges)
    for name in missing:
        found = [device.gauges[name] for device in devices if name in device.gauges]
        if found:
            gauges[name] = Gauge(
                sum(one.mean for one in found) / len(found),
                min(one.low for one in found),
                max(one.high for one in found),
                min(one.readings for one in found),
                found[0].metric,
            )
    return msgspec.structs.replace(reading, gauges=gauges)


def _present(dialect: Dialect, quantity: str, exposition: Exposition) -> str | None:
    """The name under which an exposition has a quantity."""
    end = "_count" if QUANTITIES[quantity].kind == "histogram" else ""
    return next((name for name in dialect.names[quantity] if name + end in exposition), None)


def _series(exposition: Exposition, dialect: Dialect, quantity: str, name: str) -> dict[Labels, float]:
    """By labels, each thing once: without copies by ranks, without parts of sums that are there too."""
    label, wanted = dialect.only.get(quantity, ("", ""))
    scale = dialect.scale.get(name, 1.0)
    found: dict[Labels, float] = {}
    for sample in exposition[name]:
        if label and sample.labels.get(label) != wanted or any(sample.labels.get(part) for part in dialect.parts):
            continue
        if not 0 <= sample.value < _MOST:  # a gauge that was never set is NaN
            continue
        key = tuple(pair for pair in sample.key if pair[0] not in dialect.copies)
        found[key] = max(found.get(key, sample.value * scale), sample.value * scale)
    return found


def _fold(values: list[float], fold: Fold) -> float | None:
    if not values:
        return None
    total = sum(values)
    return total if fold == "sum" else max(values) if fold == "max" else total / len(values)


def _gauge(exposition: Exposition, dialect: Dialect, quantity: str, name: str, fold: Fold) -> float | None:
    return _fold(list(_series(exposition, dialect, quantity, name).values()), fold)


def _growth(readings: list[dict[Labels, float]]) -> tuple[dict[Labels, float], int]:
    """How much each series of a counter grew, and how often one began anew. One reading is growth since the start."""
    if len(readings) == 1:
        return readings[0], 0
    grown: dict[Labels, float] = {}
    resets = 0
    for before, after in zip(readings, readings[1:], strict=False):
        restarted = any(value < before.get(key, 0.0) for key, value in after.items())
        resets += restarted
        for key, value in after.items():
            # A counter that fell began at 0 again: what it holds now came since.
            was = before.get(key, 0.0)
            grown[key] = grown.get(key, 0.0) + (value - was if value >= was else value)
    return grown, resets


def _histogram(snapshots: list[Snapshot], dialect: Dialect, quantity: str, name: str) -> Histogram:
    buckets, _ = _growth([_series(one.exposition, dialect, quantity, f"{name}_bucket") for one in snapshots])
    sums, _ = _growth([_series(one.exposition, dialect, quantity, f"{name}_sum") for one in snapshots])
    by_series: dict[Labels, list[tuple[float, float]]] = {}
    for labels, value in buckets.items():
        bound = float(dict(labels).get("le", "inf").replace("+Inf", "inf"))
        rest = tuple(pair for pair in labels if pair[0] != "le")
        by_series.setdefault(rest, []).append((bound, value))
    histograms = []
    for labels, pairs in by_series.items():
        pairs.sort()
        bounds, cumulative = zip(*pairs, strict=True)
        histograms.append(Histogram(bounds, cumulative, sums.get(labels, 0.0)))
    return merged(histograms) or Histogram((), (), 0.0)


def _intervals(snapshots: list[Snapshot], dialect: Dialect) -> tuple[Interval, ...]:
    found = []
    for before, after in zip(snapshots, snapshots[1:], strict=False):
        if before.at is None or after.at is None or after.at <= before.at:
            continue
        running = [_one(one.exposition, dialect, "running") for one in (before, after)]
        tokens = [_one(one.exposition, dialect, "generated_tokens") for one in (before, after)]
        if None in running or None in tokens or tokens[1] < tokens[0]:  # type: ignore[operator]
            continue
        batch = (running[0] + running[1]) / 2  # type: ignore[operator]
        found.append(Interval(batch, (tokens[1] - tokens[0]) / (after.at - before.at)))  # type: ignore[operator]
    return tuple(found)


def _one(exposition: Exposition, dialect: Dialect, quantity: str) -> float | None:
    name = _present(dialect, quantity, exposition)
    return None if name is None else _gauge(exposition, dialect, quantity, name, "sum")


def _parts(snapshots: list[Snapshot], dialect: Dialect, replicas: Replicas) -> tuple[Part, ...]:
    """Replicas that one exposition tells apart; none where there is but one."""

    def means(name: str) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for snapshot in snapshots:
            samples: dict[str, Sample] = {}
            for sample in snapshot.exposition[name]:
                if replicas.label in sample.labels and not any(sample.labels.get(part) for part in dialect.parts):
                    samples.setdefault(sample.labels[replicas.label], sample)
            for label, sample in samples.items():
                found.setdefault(label, []).append(sample.value)
        return {label: sum(values) / len(values) for label, values in found.items()}

    running, waiting, usage = means(replicas.running), means(replicas.waiting), means(replicas.kv_usage)
    if len(running) < 2:
        return ()
    return tuple(
        Part(f"{replicas.label} {label}", value, waiting.get(label, 0.0), usage.get(label))
        for label, value in sorted(running.items())
    )
