"""Load meter and N+1."""

from __future__ import annotations

import pytest

from shoal.core.spare_capacity import EndpointCapacity, LoadMeter, spare_capacity


def endpoint(name: str, speed: float | None, ready: bool = True, spare: bool = False) -> EndpointCapacity:
    return EndpointCapacity(name=name, speed=speed, ready=ready, spare=spare)


def test_the_meter_reads_a_steady_stream_right_from_the_start_and_forgets_it() -> None:
    meter = LoadMeter(100.0)
    assert meter.load(100.0) == 0
    for step in range(1, 1201):
        meter.add(5, 100 + step * 0.1)
        if step >= 50:
            assert meter.load(100 + step * 0.1) == pytest.approx(50, rel=0.03)
    short, long = meter.rates(230.0)
    assert short < 20 < long
    assert meter.load(230.0) == long
    assert meter.load(900.0) < 0.01


def test_a_burst_is_seen_within_seconds() -> None:
    meter = LoadMeter(0.0)
    for second in range(1, 120):
        meter.add(10, second)
    for second in range(120, 135):
        meter.add(1000, second)
    assert meter.load(135.0) > 600


def test_a_burst_at_the_start_is_no_rate_of_thousands() -> None:
    meter = LoadMeter(0.0)
    meter.add(100, 0.001)
    assert meter.load(0.001) < 120


def test_late_time_does_not_break_the_meter() -> None:
    meter = LoadMeter(10.0)
    meter.add(10, 12.0)
    assert meter.load(11.0) == meter.load(12.0) > 0


def test_n_plus_one() -> None:
    fleet = [endpoint("a", 100), endpoint("b", 300), endpoint("c", 200)]
    assert spare_capacity(fleet, 300).label == "ok"
    short = spare_capacity(fleet, 350)
    assert (short.label, short.largest, short.capacity, short.load) == ("short by 50 tokens/s", "b", 300, 350)


def test_a_spare_counts_once_another_is_lost_and_one_that_is_not_ready_does_not() -> None:
    fleet = [endpoint("a", 100), endpoint("b", 100)]
    assert not spare_capacity(fleet, 150).ok
    assert spare_capacity([*fleet, endpoint("s", None, spare=True)], 150).ok
    assert not spare_capacity([*fleet, endpoint("s", None, ready=False, spare=True)], 150).ok


def test_unknown_none_and_a_single_one() -> None:
    assert spare_capacity([endpoint("a", None), endpoint("b", None)], 10).label == "unknown"
    assert not spare_capacity([], 0).ok
    assert spare_capacity([endpoint("a", 100, ready=False)], 30).short_by == 30
    single = spare_capacity([endpoint("a", 100)], 0)
    assert not single.ok and single.short_by == 100
