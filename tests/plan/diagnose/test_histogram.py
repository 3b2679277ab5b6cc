from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from shoal.plan.diagnose.histogram import Histogram, merged

BOUNDS = (0.1, 0.5, 1.0, 5.0, math.inf)


def filled(values: list[float]) -> Histogram:
    return Histogram(BOUNDS, tuple(float(sum(v <= bound for v in values)) for bound in BOUNDS), sum(values))


def test_interpolation_inside_a_bucket() -> None:
    found = Histogram((1.0, 2.0, math.inf), (10.0, 20.0, 20.0), 25.0).percentile(0.75)
    assert found is not None
    assert (found.value, found.low, found.high, found.count) == (1.5, 1.0, 2.0, 20)


def test_beyond_the_last_bound_only_that_bound_is_known() -> None:
    found = filled([7.0, 9.0]).percentile(0.5)
    assert found is not None
    assert (found.value, found.low, found.high) == (5.0, 5.0, math.inf)


def test_nothing_observed_has_no_percentile() -> None:
    assert filled([]).percentile(0.99) is None
    assert Histogram((), (), 0.0).percentile(0.99) is None
    assert filled([]).mean is None


@given(st.lists(st.floats(0.001, 20.0), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_the_true_percentile_is_in_the_bucket(values: list[float], share: float) -> None:
    found = filled(values).percentile(share)
    true = sorted(values)[math.ceil(share * len(values)) - 1]
    assert found is not None
    assert found.low <= true <= found.high
    assert found.low <= found.value <= found.high


@given(st.lists(st.floats(0.001, 20.0), min_size=1), st.lists(st.floats(0.001, 20.0), min_size=1))
def test_a_merge_is_the_histogram_of_all(one: list[float], other: list[float]) -> None:
    found = merged([filled(one), filled(other)])
    assert found is not None
    assert found.cumulative == filled(one + other).cumulative
    assert math.isclose(found.total, sum(one) + sum(other))


def test_a_merge_keeps_the_bounds_that_both_have() -> None:
    other = Histogram((0.5, 2.0, math.inf), (1.0, 2.0, 3.0), 9.0)
    found = merged([filled([0.3, 3.0]), other])
    assert found is not None
    assert (found.bounds, found.cumulative) == ((0.5, math.inf), (2.0, 5.0))
