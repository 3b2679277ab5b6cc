"""Predictions of setups: by the closed form while searching, by the event loop for those that may be the answer."""

from __future__ import annotations

import msgspec

from shoal.core.cost.calibration import Calibration
from shoal.core.cost.model import CostModel
from shoal.plan.engines import Engine
from shoal.plan.screen import Load
from shoal.plan.setups import Interval, Prediction
from shoal.plan.steady_state import Distribution, interval, open_loop
from shoal.plan.workload import Workload

REQUESTS = 1600
"""Of one run of the event loop."""
FEWEST = 400
STEPS = 100_000
"""Steps with prompts in them that a run may have; prompts of many pieces get fewer requests."""


def from_load(engine: Engine, load: Load, capacity: float) -> Prediction:
    """The closed form's."""
    first, later = interval(engine.cost, "ttft"), interval(engine.cost, "tpot")
    ttft = [Interval(value, value * first[0], value * first[1]) for value in (load.ttft_p50, load.ttft_p99)]
    itl = [Interval(value, value * later[0], value * later[1]) for value in (load.itl_p50, load.itl_p99, load.itl_mean)]
    return Prediction(
        ttft_p50=ttft[0],
        ttft_p90=ttft[1],
        ttft_p99=ttft[1],
        itl_p50=itl[0],
        itl_p90=itl[1],
        itl_p99=itl[1],
        tpot=itl[2],
        batch=load.batch,
        utilisation=load.utilisation,
        capacity=capacity,
        method="closed form",
        provenance=engine.provenance,
    )


def by_event_loop(
    engine: Engine,
    workload: Workload,
    rate: float,
    max_sequences: int,
    capacity: float,
    calibration: Calibration | None,
) -> Prediction | None:
    """One engine at so many requests a second; None where they come faster than they are served."""
    shape = msgspec.structs.replace(engine.cost.engine, max_sequences=max_sequences)
    pieces = workload.inputs.mean / (shape.max_batch_tokens * shape.attention_dp) + 1
    requests = int(min(REQUESTS, max(FEWEST, STEPS / pieces)))
    found = open_loop(CostModel(shape, calibration), workload, rate, requests=requests)
    if found.refused or found.saturated:
        return None
    return Prediction(
        ttft_p50=_at(found.ttft, "p50"),
        ttft_p90=_at(found.ttft, "p90"),
        ttft_p99=_at(found.ttft, "p99"),
        itl_p50=_at(found.itl, "p50"),
        itl_p90=_at(found.itl, "p90"),
        itl_p99=_at(found.itl, "p99"),
        tpot=Interval(found.tpot.mean, found.tpot.low, found.tpot.high),
        batch=found.concurrency,
        utilisation=found.utilisation,
        capacity=capacity,
        method="event loop",
        provenance=engine.provenance,
    )


def _at(distribution: Distribution, percentile: str) -> Interval:
    """A percentile with the mean's relative interval."""
    value = float(getattr(distribution, percentile))
    mean = distribution.mean or 1.0
    return Interval(value, value * distribution.low / mean, value * distribution.high / mean)
