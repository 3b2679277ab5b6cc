"""Load meter and N+1."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.spare_capacity import EndpointCapacity, LoadMeter, spare_capacity, wanted_spares


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


def test_spares_are_asked_for_and_kept_while_the_load_wavers() -> None:
    fleet = [endpoint("a", 100), endpoint("b", 100)]
    spare = endpoint("s", None, ready=False, spare=True)
    assert wanted_spares(fleet, 80, most=2) == 0
    assert wanted_spares(fleet, 95, most=2) == 1
    assert wanted_spares([*fleet, spare], 95, most=2) == 1
    assert wanted_spares([*fleet, spare], 80, most=2) == 1
    assert wanted_spares([*fleet, spare], 70, most=2) == 0
    assert wanted_spares(fleet, 500, most=2) == 2
    assert wanted_spares(fleet, 500, most=0) == 0


def test_a_single_endpoint_wants_one_spare_even_when_idle() -> None:
    assert wanted_spares([endpoint("a", 100)], 0, most=1) == 1
    assert wanted_spares([endpoint("a", None)], 0, most=1) == 0


SPEEDS = st.lists(st.one_of(st.none(), st.floats(1, 1e4)), min_size=1, max_size=6)


@given(SPEEDS, st.floats(0, 1e5))
def test_with_the_spares_that_it_wants_the_fleet_is_ok(speeds: list[float | None], load: float) -> None:
    fleet = [endpoint(f"e{i}", speed) for i, speed in enumerate(speeds)]
    wanted = wanted_spares(fleet, load, most=10**6)
    if all(speed is None for speed in speeds):
        assert wanted == 0
        return
    with_spares = [*fleet, *(endpoint(f"s{i}", None, spare=True) for i in range(min(wanted, 200)))]
    if wanted <= 200:
        assert spare_capacity(with_spares, load).ok
        assert wanted_spares(with_spares, load, most=10**6) == wanted
    if wanted > 1:
        assert not spare_capacity(with_spares[: len(fleet) + wanted - 1], load * 1.11).ok
