"""What clients ask of an engine: lengths of inputs and outputs, drawn without randomness of its own.

So an estimate is a function of its arguments.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import msgspec


def scattered(number: int, stream: int = 0) -> float:
    """The `number`-th of a fixed sequence that looks uniform in (0, 1): a mixer of bits, as in splitmix64.

    Sequences that fill the interval evenly will not do: sums of every fourth of them fall together, and so would the
    answers of four clients.
    """
    bits = (number * 4 + stream + 1) * 0x9E3779B97F4A7C15 & _MASK
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & _MASK
    return ((bits ^ bits >> 31) + 0.5) / (_MASK + 1)


_MASK = (1 << 64) - 1


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """Of inputs or outputs, in tokens: uniform in [low, high], or as in `values`."""

    low: int = 1
    high: int = 1
    values: tuple[int, ...] = ()
    """Ascending."""

    @staticmethod
    def fixed(length: int) -> Lengths:
        return Lengths(low=length, high=length)

    @staticmethod
    def uniform(low: int, high: int) -> Lengths:
        return Lengths(low=min(low, high), high=high)

    @staticmethod
    def spread(mean: float, spread: float) -> Lengths:
        """Uniform in mean (1 - spread) to mean (1 + spread)."""
        return Lengths(low=max(1, round(mean * (1 - spread))), high=max(1, round(mean * (1 + spread))))

    @staticmethod
    def of(values: list[int] | tuple[int, ...]) -> Lengths:
        if not values:
            raise ValueError("no lengths are given")
        ordered = tuple(sorted(values))
        return Lengths(low=ordered[0], high=ordered[-1], values=ordered)

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values) if self.values else (self.low + self.high) / 2

    @property
    def longest(self) -> int:
        return self.high

    def draw(self, number: int, stream: int) -> int:
        """The `number`-th of a fixed sequence."""
        return self.low if self.low == self.high else self.at(scattered(number, stream))

    def at(self, share: float) -> int:
        """The length that such a share of all are shorter than."""
        if self.values:
            return self.values[min(len(self.values) - 1, int(share * len(self.values)))]
        return round(self.low + share * (self.high - self.low))


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    inputs: Lengths
    outputs: Lengths
    cached_share: float = 0.0
    """Of a prompt that is found in the prefix cache."""

    def request(self, number: int) -> tuple[int, int]:
        """Input and output of the request of that number."""
        return max(1, self.inputs.draw(number, 0)), max(1, self.outputs.draw(number, 1))


class Weighted:
    """Quantiles of values that each stand for several."""

    def __init__(self) -> None:
        self.values: list[tuple[float, float]] = []

    def add(self, value: float, weight: float = 1.0) -> None:
        self.values.append((value, weight))

    def mean(self) -> float:
        weight = sum(each for _, each in self.values)
        return sum(value * each for value, each in self.values) / weight if weight else 0.0

    def quantiles(self, shares: tuple[float, ...]) -> list[float]:
        if not self.values:
            return [0.0] * len(shares)
        ordered = sorted(self.values)
        sums = list(accumulate(weight for _, weight in ordered))
        last = len(ordered) - 1
        return [ordered[min(last, bisect_right(sums, share * sums[-1]))][0] for share in shares]
