"""Rows of a profile: shares make a whole, limits are the work's."""

from __future__ import annotations

import pytest

from shoal.bench.profile.report import BETWEEN, WITHIN, rows_of
from shoal.bench.profile.trace import PartTime, Profile
from shoal.core.cost.kernels import PartWork

PROFILE = Profile(
    steps=2,
    on_device=True,
    step_seconds=10e-3,
    low=9e-3,
    high=11e-3,
    parts=(
        PartTime(name="linear", seconds=6e-3, calls=5),
        PartTime(name="attention", seconds=2e-3, calls=1),
        PartTime(name="copies", seconds=0.5e-3, calls=1),
    ),
    gap_within=1e-3,
    gap_between=0.5e-3,
)
WORK = {
    "linear": PartWork(bytes=1e9, operations=1e9, limit_seconds=3e-3, stream_seconds=3e-3),
    "attention": PartWork(bytes=1e6, operations=1e12, limit_seconds=1.5e-3, stream_seconds=0.0),
}


def test_rows() -> None:
    rows = {row.part: row for row in rows_of(PROFILE, WORK, has_limits=True)}
    assert list(rows) == ["linear", "attention", "copies", WITHIN, BETWEEN]
    assert sum(row.share for row in rows.values()) == pytest.approx(1.0)
    assert rows["linear"].share == pytest.approx(0.6)
    assert (rows["linear"].of_limit, rows["linear"].bound) == (pytest.approx(0.5), "bandwidth")
    assert (rows["attention"].of_limit, rows["attention"].bound) == (pytest.approx(0.75), "compute")
    assert rows["copies"].bytes is None and rows["copies"].of_limit is None and rows[WITHIN].calls is None


def test_an_unknown_device_has_work_and_no_limits() -> None:
    linear = rows_of(PROFILE, WORK, has_limits=False)[0]
    assert linear.bytes == 1e9 and linear.limit_seconds is None and linear.of_limit is None and linear.bound == ""
