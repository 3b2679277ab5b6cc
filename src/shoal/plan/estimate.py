"""What engines of one kind do under a load, and the most that they carry: by the event loop, at one rate after another.

The closed form (screen.py) chooses what is looked at here, and says where to begin; it decides nothing that is shown.
"""

from __future__ import annotations

from functools import cached_property
from math import floor, log

import msgspec

from shoal.core.cost.calibration import Calibration
from shoal.core.cost.model import CostModel
from shoal.plan.engines import Engine
from shoal.plan.goal import Target
from shoal.plan.setups import Interval, Prediction
from shoal.plan.steady_state import Distribution, steady
from shoal.plan.workload import Workload

REQUESTS = 1600
"""That one run of the event loop counts: 16 of them are the slowest hundredth."""
FEWEST = 400
STEPS = 100_000
"""Steps with prompts in them that a run may have; prompts of many pieces get fewer requests."""
MOST_ENGINES = 4
"""That a run has. More of them share the load hardly better: of more, each is taken to carry as much."""
STEP = 1.05
"""Between two rates that are tried."""
BEND = 0.6
"""Of the curve of a latency over the rate, for the next rate to be tried: 1 is a straight line."""
FAR = 1 << 20
"""Steps to a rate that no search comes to."""
HOPELESS = 64.0
"""What misses a target at this part of what the closed form says carries nothing."""


class Runs:
    """`replicas` engines behind a router that gives each request to one with least to do."""

    def __init__(
        self,
        engine: Engine,
        replicas: int,
        max_sequences: int,
        workload: Workload,
        calibration: Calibration | None,
        *,
        transfer: float = 0.0,
    ) -> None:
        """`transfer`: seconds from a first token to where the next is made, which its reader waits for."""
        self.engine, self.replicas = engine, replicas
        self._max_sequences, self._workload, self._calibration = max_sequences, workload, calibration
        self._transfer = transfer
        self._known: dict[float, Prediction | None] = {}

    @cached_property
    def _cost(self) -> CostModel:
        shape = msgspec.structs.replace(self.engine.cost.engine, max_sequences=self._max_sequences)
        return CostModel(shape, self._calibration)

    def at(self, rate: float) -> Prediction | None:
        """At so many requests a second for all of them; None where they come faster than they are served."""
        if rate not in self._known:
            self._known[rate] = self._run(rate)
        return self._known[rate]

    def carries(self, targets: tuple[Target, ...], near: float, met: float = 0.0) -> float:
        """Requests a second: the highest of rates STEP apart at which every target is met, looked for from `near` on;
        0 if none is. `met`: a rate at which they are."""
        excess: dict[int, float] = {}

        def holds(number: int, rate: float) -> bool:
            found = self.at(rate)
            excess[number] = float("inf") if found is None else found.excess(targets)
            return excess[number] <= 1.0

        number, low, high, stride = floor(_number(max(near, 1e-9))), -FAR, FAR, 2
        if met and holds(floor(_number(met)), met):
            low = floor(_number(met))
            number = number if number > low else low + max(1, _room(excess[low]))
        while high - low > 1:
            if holds(number, STEP**number):
                low = number
            else:
                high = number
            if high == FAR:
                number, stride = low + max(stride, _room(excess[low])), 2 * stride
            elif low > -FAR and 0.0 < excess[low] < excess[high] < float("inf"):
                number = _crossing(low, high, log(excess[low]), log(excess[high]))
            else:
                number, stride = max((low + high) // 2, high - stride), 2 * stride
            if STEP**number < near / HOPELESS:
                return 0.0
        return max(met, STEP**low)

    def _run(self, rate: float) -> Prediction | None:
        cost, engines = self._cost, min(self.replicas, MOST_ENGINES)
        pieces = self._workload.inputs.mean / (cost.engine.max_batch_tokens * cost.engine.attention_dp) + 1
        requests = int(min(REQUESTS, max(FEWEST, STEPS / pieces)))
        found = steady(cost, self._workload, rate * engines / self.replicas, engines=engines, requests=requests)
        if found.refused or found.saturated:
            return None
        return Prediction(
            ttft_p50=_at(found.ttft, "p50", self._transfer),
            ttft_p90=_at(found.ttft, "p90", self._transfer),
            ttft_p99=_at(found.ttft, "p99", self._transfer),
            itl_p50=_at(found.itl, "p50"),
            itl_p90=_at(found.itl, "p90"),
            itl_p99=_at(found.itl, "p99"),
            tpot=Interval(found.tpot.mean, found.tpot.low, found.tpot.high),
            batch=found.concurrency,
            utilisation=found.utilisation,
            provenance=self.engine.provenance,
        )


def _number(rate: float) -> float:
    return log(rate) / log(STEP)


def _room(excess: float) -> int:
    """Steps to where a target would be missed, if what it is of grew with the rate to the power of 1.5."""
    return int(-log(excess) / (1.5 * log(STEP))) if 0.0 < excess <= 1.0 else 0


def _crossing(low: int, high: int, below: float, above: float) -> int:
    """Where the line through both is 0, a little nearer to `high`, for the curve bends upwards."""
    part: float = max(0.0, -below / (above - below)) ** BEND
    return min(high - 1, max(low + 1, low + round(part * (high - low))))


def _at(distribution: Distribution, percentile: str, plus: float = 0.0) -> Interval:
    """A percentile with the mean's relative interval."""
    value = float(getattr(distribution, percentile))
    mean = distribution.mean or 1.0
    low, high = (value * bound / mean for bound in (distribution.low, distribution.high))
    return Interval(value + plus, low + plus, high + plus)
