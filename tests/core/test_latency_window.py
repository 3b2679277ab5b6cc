"""Percentiles over a window of time, against all observations kept and sorted."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shoal.core.fleet_types import Percentiles
from shoal.core.latency_window import LatencyWindow

LATENCIES = st.floats(1e-6, 1e4)


def test_nothing_observed_is_nothing_to_tell() -> None:
    window = LatencyWindow()
    assert window.percentiles(0.0) == Percentiles()
    window.observe(1.0, 0.0)
    assert window.percentiles(1e6) == Percentiles(), "and so again once all of it is too old"


def test_one_slow_request_in_a_hundred() -> None:
    window = LatencyWindow()
    for i in range(1000):
        window.observe(5.0 if i % 50 == 0 else 0.1, now=float(i) / 10)
    found = window.percentiles(100.0)
    assert found.p50 == pytest.approx(0.1, rel=0.025)
    assert found.p90 == pytest.approx(0.1, rel=0.025)
    assert found.p99 == pytest.approx(5.0, rel=0.025)
    assert found.count == 1000


@given(st.lists(LATENCIES, min_size=1, max_size=200))
def test_percentiles_are_those_of_the_sorted_values(values: list[float]) -> None:
    window = LatencyWindow()
    for value in values:
        window.observe(value, 0.0)
    found, ordered = window.percentiles(0.0), sorted(values)
    for share, percentile in ((0.5, found.p50), (0.9, found.p90), (0.99, found.p99)):
        assert percentile == pytest.approx(ordered[math.ceil(share * len(values)) - 1], rel=0.021)


def test_cost_does_not_grow_with_observations() -> None:
    window = LatencyWindow()
    for i in range(20_000):
        window.observe(0.001 + i % 100 / 100, now=i / 50)
    assert len(window._slices) <= 30
    assert sum(len(counts) for _, counts in window._slices) <= 30 * 200


class WindowMachine(RuleBasedStateMachine):
    """Time passes in steps of any length; a model keeps every observation with its time."""

    @initialize(start=st.floats(0, 1e6))
    def begin(self, start: float) -> None:
        self.now = start
        self.window = LatencyWindow(seconds=60.0, num_slices=6)
        self.kept: list[tuple[float, float]] = []

    @rule(seconds=st.sampled_from([0.0, 0.3, 9.9, 10.0, 59.0, 61.0, 1e4]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(value=LATENCIES)
    def observe(self, value: float) -> None:
        self.window.observe(value, self.now)
        self.kept.append((self.now, value))

    @invariant()
    def nothing_young_is_missing_and_nothing_old_is_left(self) -> None:
        count = self.window.percentiles(self.now).count
        self.window.check()
        assert sum(at > self.now - 50.0 + 1e-6 for at, _ in self.kept) <= count
        assert count <= sum(at > self.now - 60.0 - 1e-6 for at, _ in self.kept)

    @invariant()
    def percentiles_lie_among_what_may_count(self) -> None:
        found = self.window.percentiles(self.now)
        young = [value for at, value in self.kept if at > self.now - 60.0 - 1e-6]
        if found.p50 is not None and found.p99 is not None:
            assert min(young) * 0.979 <= found.p50 <= found.p99 <= max(young) * 1.021


TestWindow = WindowMachine.TestCase
