"""Fits the constants of a Calibration to measured steps, through the cost model itself.

The constants are few and each has a physical meaning, so a fit can be read: a stream fraction of 0.8 says that weights
come at 80% of the memory's bandwidth. Errors are relative, since a step of 20 ms matters as much as one of 500, and
points that are far off count less than by their square: on a shared machine some always are.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from shoal.bench.calibration.step_timing import QUIET_CORES, TimedStep
from shoal.core.cost.calibration import Calibration, Residual
from shoal.core.cost.model import CostModel
from shoal.core.cost.types import EngineShape

EngineOf = Callable[[int], EngineShape]
"""The engine by its tensor-parallel ranks."""
Array = NDArray[np.float64]

_STEP, _ROUNDS = 0.02, 30
_HUBER = 0.06
"""Relative error from which a point pulls no harder than in proportion."""


class Constant(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    """A field of Calibration; a key of its fractions or factors behind a dot."""
    start: float
    least: float
    most: float
    meaning: str
    parallel: bool = False
    """Shows only in steps of several ranks."""


def constants(weights: str) -> list[Constant]:
    """What is fitted. Bounds are physical: no fraction is of more than all there is, but for caches that help."""
    return [
        Constant(
            name=f"fractions.stream.{weights}", start=0.8, least=0.1, most=1.1,
            meaning="of the memory's bandwidth, that weights are read at",
        ),
        Constant(
            name=f"fractions.matmul.{weights}", start=0.8, least=0.05, most=1.5,
            meaning="of the matrix rate, that the model's matrix products reach",
        ),
        Constant(
            name="sharpness", start=2.0, least=1.0, most=8.0,
            meaning="of the corner between reading weights and computing: 1 is one after the other",
        ),
        Constant(
            name="fractions.attention.decode", start=0.8, least=0.05, most=3.0,
            meaning="of the memory's bandwidth, that decode attention reads the KV cache at",
        ),
        Constant(
            name="fractions.attention.prefill", start=0.5, least=0.02, most=1.5,
            meaning="of the matrix rate, that prefill attention reaches",
        ),
        Constant(
            name="step_seconds", start=1e-3, least=5e-5, most=0.05,
            meaning="host seconds of every step",
        ),
        Constant(
            name="row_seconds", start=5e-5, least=1e-6, most=2e-3,
            meaning="host seconds of every sequence in a step: its inputs, its draw",
        ),
        Constant(
            name="token_seconds", start=1e-5, least=1e-7, most=1e-3,
            meaning="seconds of every token in a step besides its matrix products: norms, rotation, activation",
        ),
        Constant(
            name="factors.collectives", start=1.5, least=0.2, most=20.0, parallel=True,
            meaning="time of the collectives in a step relative to alone: ranks also wait for each other there",
        ),
    ]  # fmt: skip


class Fitted(msgspec.Struct, frozen=True, kw_only=True):
    calibration: Calibration
    values: dict[str, float]
    errors: list[float]
    """Predicted / measured - 1, of the steps in their order."""


def fit(engine_of: EngineOf, base: Calibration, steps: Sequence[TimedStep], weights: str) -> Fitted:
    """`base` holds what was measured by itself and is not fitted. Raises ValueError without steps."""
    if not steps:
        raise ValueError("there are no measured steps to fit to")
    chosen = [c for c in constants(weights) if not c.parallel or any(step.tp > 1 for step in steps)]
    engines = {tp: engine_of(tp) for tp in sorted({step.tp for step in steps})}
    measured = np.log([step.seconds for step in steps])
    bounds = np.log([[c.least for c in chosen], [c.most for c in chosen]])
    start = np.log([c.start for c in chosen])

    def predicted(x: Array) -> Array:
        calibration = applied(base, chosen, np.exp(x))
        models = {tp: CostModel(engine, calibration) for tp, engine in engines.items()}
        return np.log([models[step.tp].seconds(step.point.shape()) for step in steps])

    # Beside others' work a step is slower by nobody knows how much: it counts less than one that was left alone.
    trust = np.array([1 / (1 + (step.foreign_cores / QUIET_CORES) ** 2) for step in steps])
    trust /= trust.max()
    x = _least_squares(predicted, measured, trust, start, bounds)
    values = np.exp(x)
    calibration = applied(base, chosen, values)
    errors = np.exp(predicted(x) - measured) - 1
    named = {constant.name: float(value) for constant, value in zip(chosen, values, strict=True)}
    return Fitted(calibration=calibration, values=named, errors=[float(error) for error in errors])


def applied(base: Calibration, chosen: Sequence[Constant], values: Sequence[float] | Array) -> Calibration:
    fields: dict[str, float] = {}
    groups: dict[str, dict[str, float]] = {"fractions": dict(base.fractions), "factors": dict(base.factors)}
    for constant, value in zip(chosen, values, strict=True):
        group, _, key = constant.name.partition(".")
        if key:
            groups[group][key] = float(value)
        else:
            fields[group] = float(value)
    return msgspec.structs.replace(base, **fields, **groups)


def _least_squares(
    predicted: Callable[[Array], Array], measured: Array, trust: Array, start: Array, bounds: Array
) -> Array:
    """Levenberg and Marquardt's method with Huber's weights and numerical derivatives, kept within bounds.

    What no measurement determines stays near where it starts: each constant counts as one very uncertain point.
    """
    prior = 0.02  # 1 / relative uncertainty of the starting values, against errors of some percent
    x, damping = start.copy(), 1e-2

    def loss(at: Array) -> tuple[float, Array]:
        error = predicted(at) - measured
        size = np.abs(error)
        huber = np.where(size <= _HUBER, error**2, 2 * _HUBER * size - _HUBER**2)
        return float((trust * huber).sum() + (prior * (at - start) ** 2 * 0.1).sum()), error

    best, error = loss(x)
    for _ in range(_ROUNDS):
        columns = []
        for place in range(len(x)):
            moved = x.copy()
            moved[place] += _STEP
            columns.append((predicted(moved) - measured - error) / _STEP)
        jacobian = np.stack(columns, axis=1)
        weight = trust * np.minimum(1.0, _HUBER / np.maximum(np.abs(error), 1e-12))
        normal = jacobian.T @ (weight[:, None] * jacobian) + prior * 0.1 * np.eye(len(x))
        gradient = jacobian.T @ (weight * error) + prior * 0.1 * (x - start)
        improved = False
        for _ in range(8):
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -gradient)
            tried = np.clip(x + np.clip(step, -1.0, 1.0), bounds[0], bounds[1])
            value, tried_error = loss(tried)
            if value < best:
                improved = best - value > 1e-9
                x, best, error, damping = tried, value, tried_error, max(damping / 3, 1e-6)
                break
            damping *= 4
        if not improved:
            break
    return x


def residual(errors: Sequence[float], floor: float = 0.02) -> Residual:
    """Measured / predicted, of errors that are predicted / measured - 1.

    `floor`: what even a perfect fit may claim no better than, since a few points cannot show a tail.
    """
    ratios = sorted(1 / (1 + error) for error in errors)
    median = statistics.median(ratios)
    # Of few points the outermost stand for the tails: one in twenty of thirty is one and a half.
    low, high = quantile(ratios, 0.05), quantile(ratios, 0.95)
    return Residual(
        low=min(low, median * (1 - floor)), median=median, high=max(high, median * (1 + floor)), rows=len(ratios)
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """Between the nearest two, as far as `share` says, of values in order."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
