"""What is learned online: lines follow, do not panic, and take their shape from peers; lengths against the data."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.estimates import Line, OutputLengths


def test_a_line_finds_the_line() -> None:
    rng = random.Random(0)
    line = Line()
    for _ in range(200):
        x = rng.uniform(1, 40)
        line.observe(x, 0.01 + 0.002 * x)
    assert line.coefficients.at(5) == pytest.approx(0.02, rel=0.2)
    assert line.coefficients.at(40) == pytest.approx(0.09, rel=0.2)


def test_one_hiccup_is_not_a_slow_endpoint_and_many_are() -> None:
    line = Line()
    for _ in range(50):
        line.observe(8, 0.01)
    line.observe(8, 10.0)
    assert line.coefficients.at(8) < 0.015
    for _ in range(50):
        line.observe(8, 0.1)
    assert line.coefficients.at(8) > 0.09
    for _ in range(80):
        line.observe(8, 0.01)
    assert line.coefficients.at(8) < 0.012


def test_a_line_at_one_x_has_the_shape_that_its_peers_found() -> None:
    peers = Line(rate=1 / 512)
    for x in range(1, 100):
        peers.observe(x, 0.01 + 0.001 * x)
    line = Line(peers=peers)
    for _ in range(20):
        line.observe(10, 0.04)  # twice as slow as the peers
    assert line.coefficients.at(40) == pytest.approx(0.1, rel=0.25)


@given(st.lists(st.tuples(st.floats(0.1, 1e5), st.floats(1e-6, 1e3)), min_size=1, max_size=60))
def test_a_line_is_never_below_zero_nor_falls(points: list[tuple[float, float]]) -> None:
    line = Line(peers=Line(proportional=1.0))
    for x, y in points:
        line.observe(x, y)
    assert line.coefficients.intercept >= 0
    assert line.coefficients.slope >= 0
    assert line.coefficients.at(1.0) > 0


def test_lengths_are_those_that_were_seen() -> None:
    rng = random.Random(1)
    lengths = OutputLengths()
    seen = [round(rng.lognormvariate(5, 1)) + 1 for _ in range(3000)]
    for length in seen:
        lengths.observe(length)
    for generated, most in ((0, 100_000), (0, 300), (200, 100_000), (500, 600)):
        left = [min(length, most) - generated for length in seen if length > generated]
        assert lengths.remaining(generated, most) == pytest.approx(sum(left) / len(left), rel=0.1)


def test_what_outputs_were_changes_with_what_they_are() -> None:
    lengths = OutputLengths()
    for _ in range(4000):
        lengths.observe(1000)
    for _ in range(20_000):
        lengths.observe(50)
    assert lengths.remaining(0, 4096) < 100


@given(st.lists(st.integers(0, 200_000), max_size=100), st.floats(0, 1e6), st.integers(1, 1_000_000))
def test_something_comes_until_the_limit(seen: list[int], generated: float, most: int) -> None:
    lengths = OutputLengths()
    for length in seen:
        lengths.observe(length)
    remaining = lengths.remaining(generated, most)
    assert 0 <= remaining <= max(most - generated, 0)
    assert remaining >= min(1.0, max(most - generated, 0))
