"""The fit finds constants that explain steps, also those that it has not seen; liars among the steps move it little."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.bench.calibration.fit import constants, fit, quantile, residual
from shoal.bench.calibration.session import check
from shoal.core.cost.calibration import Calibration, decode, encode
from tests.bench.calibration.subjects import steps_of, subject, timed

BASE = Calibration(device="example-cpu-2c")


def calibration(
    stream: float, matmul: float, decode: float, prefill: float, step: float, row: float, sharpness: float
) -> Calibration:
    return Calibration(
        device=BASE.device,
        fractions={
            "stream.float32": stream,
            "matmul.float32": matmul,
            "attention.decode": decode,
            "attention.prefill": prefill,
        },
        factors={"collectives": 2.0},
        step_seconds=step,
        row_seconds=row,
        token_seconds=1e-5,
        sharpness=sharpness,
    )


USUAL = calibration(0.85, 0.8, 0.6, 0.4, 2e-3, 1e-4, 1.5)


@settings(max_examples=12, deadline=None)
@given(
    st.builds(
        calibration,
        st.floats(0.5, 1.0),
        st.floats(0.4, 1.0),
        st.floats(0.3, 1.2),
        st.floats(0.2, 1.0),
        st.floats(5e-4, 5e-3),
        st.floats(2e-5, 5e-4),
        st.floats(1.1, 4.0),
    )
)
def test_steps_that_were_not_seen_are_predicted_whatever_the_constants(truth: Calibration) -> None:
    found = fit(subject().engine_shape, BASE, steps_of(truth), "float32")
    errors = sorted(abs(one.error) for one in check(subject(), found.calibration, steps_of(truth, unseen=8)))
    assert quantile(errors, 0.5) < 0.02 and errors[-1] < 0.08


def test_constants_that_every_step_shows_are_found() -> None:
    found = fit(subject().engine_shape, BASE, steps_of(USUAL), "float32").calibration
    for name in ("stream.float32", "matmul.float32", "attention.decode", "attention.prefill"):
        assert found.fractions[name] == pytest.approx(USUAL.fractions[name], rel=0.15)
    assert found.step_seconds == pytest.approx(USUAL.step_seconds, rel=0.5)
    assert found.factors["collectives"] == pytest.approx(2.0, rel=0.3)


def test_noise_and_disturbed_steps_move_it_little() -> None:
    draw, noisy = random.Random(2), []
    for number, step in enumerate(steps_of(USUAL)):
        factor = draw.gauss(1.0, 0.02)
        if number % 6 == 0:  # something else ran, and it is known
            noisy.append(timed(step.tp, step.point, step.seconds * 3, foreign_cores=1.4))
        else:
            noisy.append(timed(step.tp, step.point, step.seconds * factor))
    found = fit(subject().engine_shape, BASE, noisy, "float32").calibration
    errors = sorted(abs(one.error) for one in check(subject(), found, steps_of(USUAL, unseen=15)))
    assert quantile(errors, 0.5) < 0.03 and quantile(errors, 0.9) < 0.08


def test_one_rank_says_nothing_of_collectives() -> None:
    found = fit(subject().engine_shape, BASE, steps_of(USUAL, ranks=(1,)), "float32")
    assert "factors.collectives" not in found.values and not found.calibration.factors


def test_values_stay_within_their_bounds() -> None:
    absurd = [timed(step.tp, step.point, step.seconds * 1e-3) for step in steps_of(USUAL)]
    found = fit(subject().engine_shape, BASE, absurd, "float32")
    bounds = {constant.name: constant for constant in constants("float32")}
    for name, value in found.values.items():
        assert bounds[name].least * 0.999 <= value <= bounds[name].most * 1.001


def test_nothing_to_fit_to_is_said() -> None:
    with pytest.raises(ValueError, match="no measured steps"):
        fit(subject().engine_shape, BASE, [], "float32")


def test_what_is_written_can_be_read() -> None:
    found = fit(subject().engine_shape, BASE, steps_of(USUAL), "float32").calibration
    assert decode(encode(found)) == found


@given(st.lists(st.floats(-0.4, 0.8), min_size=1, max_size=40))
def test_intervals_hold_the_median_and_are_never_empty(errors: list[float]) -> None:
    found = residual(errors)
    assert found.low < found.median < found.high
    inside = sum(found.low <= 1 / (1 + error) <= found.high for error in errors)
    assert inside >= 0.85 * len(errors) - 2 and found.rows == len(errors)
