"""Device figures on the machine that runs the tests: they come, they make sense, and a child's failure is said."""

from __future__ import annotations

import pytest

from shoal.engine import device_timing
from shoal.engine.device_timing import Question, measure


@pytest.fixture(scope="module")
def figures() -> device_timing.DeviceFigures:
    short = Question(dtypes=("float32", "int8"), ranks=(1, 2), sizes=(256, 1 << 20), seconds=0.02, memory_bytes=8 << 20)
    return measure(short)


def test_all_that_was_asked_for_was_measured(figures: device_timing.DeviceFigures) -> None:
    assert set(figures.rates) == {"float32", "int8"} and list(figures.all_reduce) == [2]
    assert [size for size, _ in figures.all_reduce[2]] == [256, 1 << 20]
    assert figures.name and figures.kernels in ("native", "torch")
    assert figures.all_reduce_by in ("shared memory", "gloo")


def test_figures_are_of_the_order_of_a_computer(figures: device_timing.DeviceFigures) -> None:
    assert 1e7 < figures.read_bandwidth < 1e13 and 1e7 < figures.copy_bandwidth < 1e13
    assert all(1e7 < rate < 1e16 for rate in figures.rates.values())
    assert 1e-8 < figures.kernel_seconds < 0.1
    assert figures.memory_bytes > 1 << 28
    (_, small), (_, large) = figures.all_reduce[2]
    assert 0 < small < large


def test_a_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="could not be timed.*no-such-device"):
        measure(Question(device="no-such-device"))
