"""Percentiles of more values than one wants to keep."""

from __future__ import annotations

from math import ceil, exp, inf, log

_GROWTH = log(1.01)
"""Logarithm of the ratio of two neighbouring buckets' bounds: a percentile is off by 0.5% at most."""
_SMALLEST = 1e-9


class Histogram:
    """Counts in logarithmic buckets."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = 0.0
        self.greatest = 0.0
        self._counts: dict[int, int] = {}

    def add(self, value: float, times: int = 1) -> None:
        bucket = ceil(log(value if value > _SMALLEST else _SMALLEST) / _GROWTH)
        self._counts[bucket] = self._counts.get(bucket, 0) + times
        self.count += times
        self.sum += value * times
        if value > self.greatest:
            self.greatest = value

    def percentile(self, share: float) -> float | None:
        """By nearest rank; None of nothing."""
        wanted, seen = max(ceil(self.count * share), 1), 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= wanted:
                return min(exp((bucket - 0.5) * _GROWTH), self.greatest)
        return None


def percentile(ascending: list[float], share: float) -> float | None:
    """By nearest rank; None of nothing. What failed is infinite and comes last."""
    return ascending[max(ceil(len(ascending) * share), 1) - 1] if ascending else None


def mean(values: list[float]) -> float | None:
    """Of what is finite: a failure has no latency, it counts in the percentiles."""
    finite = [value for value in values if value < inf]
    return sum(finite) / len(finite) if finite else None
