"""A session from opening engines to the files: what is fitted, what is kept back, and that engines are stopped."""

from __future__ import annotations

import pytest

from shoal.bench.calibration.session import calibrate, concluded
from shoal.bench.calibration.step_timing import TimingError
from shoal.core.config import EngineConfig
from shoal.core.cost.model import CostModel
from tests.bench.calibration.subjects import steps_of, subject
from tests.bench.calibration.test_fit import USUAL
from tests.bench.calibration.test_step_timing import Recorder


class Info:
    num_blocks = 1540
    max_len = 2200


class Engine(Recorder):
    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__(fails_at)
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True


def test_engines_are_timed_one_after_another_and_stopped() -> None:
    opened: list[tuple[EngineConfig, Engine]] = []

    def open_engine(config: EngineConfig) -> tuple[Engine, Info]:
        assert all(engine.stopped for _, engine in opened)
        opened.append((config, Engine()))
        return opened[-1][1], Info()

    heard: list[float] = []
    outcome = calibrate(
        subject(),
        open_engine,
        {"date": "today"},
        lambda what, share: heard.append(share),
        rounds=1,
        checks=3,
        quick=True,
    )
    assert [(config.layout.tp, config.threads) for config, _ in opened] == [(1, 2), (2, 1)]
    assert all(engine.stopped for _, engine in opened)
    assert heard == sorted(heard) and heard[-1] == pytest.approx(1.0)
    assert len(outcome.checked) == 6 and len(outcome.fit_errors) == 20
    fitted = {(step.tp, step.point) for step in outcome.steps[:20]}
    assert not fitted & {(one.step.tp, one.step.point) for one in outcome.checked}
    assert outcome.calibration.made["date"] == "today"


def test_an_engine_that_fails_is_stopped() -> None:
    engine = Engine(fails_at=3)
    with pytest.raises(TimingError):
        calibrate(subject(), lambda config: (engine, Info()), {}, lambda what, share: None, rounds=1)
    assert engine.stopped


def test_intervals_are_those_of_the_residuals_and_the_step_says_calibrated() -> None:
    outcome = concluded(subject(), steps_of(USUAL), steps_of(USUAL, unseen=6), {})
    model = CostModel(subject().engine_shape(1), outcome.calibration)
    for step in (one for one in outcome.steps if one.tp == 1):
        cost = model.step(step.point.shape())
        assert cost.low < step.seconds < cost.high and cost.provenance == "calibrated"
        assert cost.high / cost.low < 1.2
    assert outcome.calibration.residuals["step"].rows == len(outcome.steps)
