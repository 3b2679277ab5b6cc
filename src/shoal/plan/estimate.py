"""Predictions of setups: by the closed form while searching, by the event loop for those that may be the answer."""

from __future__ import annotations

from shoal.core.cost.types import StepShape
from shoal.plan.engines import Engine
from shoal.plan.screen import Load
from shoal.plan.setups import Interval, Prediction


def from_load(engine: Engine, load: Load, capacity: float) -> Prediction:
    """The closed form's, with the interval of a step's time for latencies."""
    rows = max(1, round(load.batch))
    step = engine.cost.step(
        StepShape(decode_rows=rows, decode_context=int(rows * engine.traffic.context), sampled=rows)
    )
    low, high = step.low / step.seconds, step.high / step.seconds

    def interval(value: float) -> Interval:
        return Interval(value, value * low, value * high)

    return Prediction(
        ttft_p50=interval(load.ttft_p50),
        ttft_p99=interval(load.ttft_p99),
        itl_p50=interval(load.itl_p50),
        itl_p99=interval(load.itl_p99),
        tpot=interval(load.itl_mean),
        batch=load.batch,
        utilisation=load.utilisation,
        capacity=capacity,
        method="closed form",
        provenance=step.provenance,
    )
