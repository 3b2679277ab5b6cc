"""Percentiles of a Prometheus histogram, with the width of the bucket that each was found in."""

from __future__ import annotations

import math

import msgspec


class Percentile(msgspec.Struct, frozen=True):
    """Between `low` and `high` for certain; `value` supposes that a bucket's observations are spread evenly in it."""

    value: float
    low: float
    high: float
    count: int
    """Observations that it is a percentile of."""


class Histogram(msgspec.Struct, frozen=True):
    bounds: tuple[float, ...]
    """Upper ones, ascending; the last is infinite."""
    cumulative: tuple[float, ...]
    """Observations at or below each bound."""
    total: float
    """Sum of what was observed."""

    @property
    def count(self) -> float:
        return self.cumulative[-1] if self.cumulative else 0.0

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    def percentile(self, share: float) -> Percentile | None:
        """`share` of 1 in (0, 1]. None without observations."""
        if not self.count:
            return None
        rank, below, lower = share * self.count, 0.0, 0.0
        for bound, cumulative in zip(self.bounds, self.cumulative, strict=True):
            if cumulative >= rank:
                inside = cumulative - below
                value = lower if math.isinf(bound) else lower + (bound - lower) * (rank - below) / inside
                return Percentile(value, lower, bound, int(self.count))
            below, lower = cumulative, bound
        # Scrapes are not atomic: a bucket may have been read before the count that follows it.
        return Percentile(lower, lower, math.inf, int(self.count))


def merged(histograms: list[Histogram]) -> Histogram | None:
    """Their sum. Where bounds differ, those that all of them have, so that no observation moves between buckets."""
    if not histograms:
        return None
    common = [bound for bound in histograms[0].bounds if all(bound in one.bounds for one in histograms)]
    cumulative = tuple(sum(one.cumulative[one.bounds.index(bound)] for one in histograms) for bound in common)
    return Histogram(tuple(common), cumulative, sum(one.total for one in histograms))
