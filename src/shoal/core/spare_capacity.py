"""N+1: whether a model's endpoints would carry the present load without the largest of them, and the spares for that.

Speeds and load are tokens a second of one kind, as the caller defines it: generated, or prefilled and generated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from shoal.core.fleet_types import SpareCapacity


class EndpointCapacity(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    speed: float | None
    """Tokens a second at full load, as learned; None before."""
    ready: bool = True
    spare: bool = False
    """Warm: carries nothing until another endpoint is lost."""


class LoadMeter:
    """Smoothed rate of a stream of tokens: exponentially weighted means over 10 s and over 60 s."""

    WINDOWS = (10.0, 60.0)

    def __init__(self, now: float) -> None:
        self._began = self._at = now
        self._sums = [0.0 for _ in self.WINDOWS]
        """Tokens so far, each weighted by exp(-age / window)."""

    def add(self, tokens: int, now: float) -> None:
        self._age(now)
        self._sums = [total + tokens for total in self._sums]

    def rates(self, now: float) -> tuple[float, ...]:
        """One a window, shortest first."""
        self._age(now)
        elapsed = self._at - self._began
        # The weights of a stream as old as `elapsed` add up to window * (1 - exp(-elapsed / window)): dividing by that,
        # not by the window, makes a young meter right too. Below a second a burst of one step would read as a rate.
        return tuple(
            total / (-math.expm1(-max(elapsed, 1.0) / window) * window)
            for total, window in zip(self._sums, self.WINDOWS, strict=True)
        )

    def load(self, now: float) -> float:
        """The larger of the rates: a burst counts at once, a lull only when it lasts."""
        return max(self.rates(now))

    def _age(self, now: float) -> None:
        passed = max(0.0, now - self._at)
        self._sums = [
            total * math.exp(-passed / window) for total, window in zip(self._sums, self.WINDOWS, strict=True)
        ]
        self._at = max(self._at, now)


def spare_capacity(endpoints: Sequence[EndpointCapacity], load: float) -> SpareCapacity:
    """What is left when the largest endpoint is lost, against the load.

    An endpoint whose speed is not learned yet, as a spare's never is, counts as the slowest that is. Where none would
    be left, one like the lost one is missing even at no load.
    """
    serving = [endpoint for endpoint in endpoints if endpoint.ready and not endpoint.spare]
    learned = [endpoint.speed for endpoint in endpoints if endpoint.speed is not None]
    if not serving:
        return SpareCapacity(ok=False, short_by=load, load=load)
    if not learned:
        return SpareCapacity(ok=False, load=load, known=False)
    speeds = _speeds(endpoints, min(learned))
    largest = max(serving, key=lambda endpoint: speeds[endpoint.name])  # of equal ones the first
    left = [endpoint for endpoint in endpoints if endpoint.ready and endpoint.name != largest.name]
    capacity = sum(speeds[endpoint.name] for endpoint in left)
    need = load if left else max(load, speeds[largest.name])
    return SpareCapacity(
        ok=need <= capacity, short_by=max(0.0, need - capacity), largest=largest.name, load=load, capacity=capacity
    )


def _speeds(endpoints: Sequence[EndpointCapacity], unknown: float) -> dict[str, float]:
    return {endpoint.name: unknown if endpoint.speed is None else endpoint.speed for endpoint in endpoints}
