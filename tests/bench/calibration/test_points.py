"""Points fit the engine, and their shapes are those of the plans that are run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.bench.calibration.points import Limits, StepPoint, grid, held_out
from shoal.core.cost.types import shape_of_plan
from shoal.core.types import StepPlan

LARGE = Limits(max_len=2200, max_sequences=40, max_batch_tokens=512, cache_tokens=24_000)
limits = st.builds(
    Limits,
    max_len=st.integers(64, 4096),
    max_sequences=st.integers(2, 64),
    max_batch_tokens=st.integers(64, 1024),
    cache_tokens=st.integers(256, 30_000),
)
sizes = st.integers(2, 500)
points = st.one_of(
    st.builds(StepPoint, decodes=sizes, context=sizes),
    st.builds(StepPoint, chunk=sizes, behind=sizes),
    st.builds(StepPoint, decodes=sizes, context=sizes, chunk=sizes, behind=sizes),
)


@given(points)
def test_the_shape_is_that_of_the_plan(point: StepPoint) -> None:
    assert point.shape() == shape_of_plan(StepPlan(1, [], [], point.rows()))


@given(points)
def test_every_row_has_room(point: StepPoint) -> None:
    needs = point.needs()
    for row in point.rows():
        assert row.start + row.num_tokens <= needs[row.slot]
    assert len({row.slot for row in point.rows()}) == len(point.rows())


@given(limits, st.integers(0, 5))
def test_no_point_is_beyond_the_limits_and_none_comes_twice(limits: Limits, seed: int) -> None:
    known = grid(limits)
    others = held_out(limits, 6, seed, known)
    for point in known + others:
        assert limits.allow(point)
        assert max(row.start + row.num_tokens for row in point.rows()) < limits.max_len
    assert len(set(known + others)) == len(known + others)


def test_all_kinds_are_there_and_a_seed_repeats_them() -> None:
    for chosen in (grid(LARGE), grid(LARGE, quick=True), held_out(LARGE, 15)):
        assert any(point.decodes and not point.chunk for point in chosen)
        assert any(point.chunk and not point.decodes for point in chosen)
        assert any(point.chunk and point.decodes for point in chosen)
    assert set(grid(LARGE, quick=True)) < set(grid(LARGE))
    assert held_out(LARGE, 15, 3) == held_out(LARGE, 15, 3) != held_out(LARGE, 15, 4)


@pytest.mark.parametrize(
    ("point", "text"),
    [
        (StepPoint(decodes=3, context=40), "3 decode at 40"),
        (StepPoint(chunk=16, behind=2), "16 tokens behind 2"),
        (StepPoint(decodes=1, context=9, chunk=16), "1 decode at 9 + 16 tokens behind 0"),
    ],
)
def test_points_read_well(point: StepPoint, text: str) -> None:
    assert str(point) == text
