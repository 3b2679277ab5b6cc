"""Percentiles of what was observed in the last minutes, at a cost that does not grow with how much was observed."""

from __future__ import annotations

import math
from collections import deque

from shoal.core.fleet_types import Percentiles

_GROWTH = math.log(1.04)
"""Logarithm of the ratio of two neighbouring buckets' bounds: a percentile is off by 2% at most."""
_SMALLEST = 1e-6
"""Seconds; anything less counts as this."""


class LatencyWindow:
    """Counts in logarithmic buckets, kept by slice of time so that a slice can be taken out when it is too old.

    An observation counts for at least `seconds` less a slice, and at most `seconds`.
    """

    def __init__(self, seconds: float = 300.0, num_slices: int = 30) -> None:
        self._slice_seconds = seconds / num_slices
        self._num_slices = num_slices
        self._slices: deque[tuple[int, dict[int, int]]] = deque()
        """(number of the slice since time 0, counts by bucket), oldest first; a slice without observations is left
        out."""
        self._counts: dict[int, int] = {}
        """Sum of the slices."""
        self._count = 0

    def observe(self, seconds: float, now: float) -> None:
        number = self._expire(now)
        if not self._slices or self._slices[-1][0] < number:
            self._slices.append((number, {}))
        counts = self._slices[-1][1]
        bucket = math.ceil(math.log(max(seconds, _SMALLEST)) / _GROWTH)
        counts[bucket] = counts.get(bucket, 0) + 1
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        self._count += 1

    def percentiles(self, now: float) -> Percentiles:
        self._expire(now)
        if not self._count:
            return Percentiles()
        wanted = [math.ceil(self._count * share) for share in (0.5, 0.9, 0.99)]
        found: list[float] = []
        seen = 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            while len(found) < len(wanted) and seen >= wanted[len(found)]:
                found.append(math.exp((bucket - 0.5) * _GROWTH))
        return Percentiles(p50=found[0], p90=found[1], p99=found[2], count=self._count)

    def _expire(self, now: float) -> int:
        """Take out what is too old; returns the number of the slice that is open at that time."""
        number = math.floor(now / self._slice_seconds)
        while self._slices and self._slices[0][0] <= number - self._num_slices:
            for bucket, count in self._slices.popleft()[1].items():
                self._count -= count
                left = self._counts[bucket] - count
                if left:
                    self._counts[bucket] = left
                else:
                    del self._counts[bucket]
        return number

    def check(self) -> None:
        """The sums are those of the slices, and slices are in order."""
        numbers = [number for number, _ in self._slices]
        assert numbers == sorted(set(numbers)) and len(numbers) <= self._num_slices
        sums: dict[int, int] = {}
        for _, counts in self._slices:
            for bucket, count in counts.items():
                assert count > 0
                sums[bucket] = sums.get(bucket, 0) + count
        assert sums == self._counts
        assert self._count == sum(sums.values())
