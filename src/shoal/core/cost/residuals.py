"""UNCALIBRATED: how far predictions from data sheets were off, over rows that others measured. Intervals come of these."""

from __future__ import annotations

from shoal.core.cost.calibration import Calibration, Residual

UNCALIBRATED = Calibration(provenance="datasheet", residuals={"tpot": Residual(0.7, 1.0, 1.5, 1)})
