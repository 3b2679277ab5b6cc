"""What a plan is made of: engines, pools of them, what they are predicted to do, and what they cost."""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal.core.cost.types import CachePrecision, Part, StepCost, WeightPrecision
from shoal.core.hardware import Provenance
from shoal.plan.candidates import Shape
from shoal.plan.goal import Goal, Target

Role = Literal["both", "prefill", "decode"]


class EngineChoice(msgspec.Struct, frozen=True, kw_only=True):
    shape: Shape
    weights: WeightPrecision
    cache: CachePrecision
    max_batch_tokens: int
    max_sequences: int

    def __str__(self) -> str:
        return f"{self.shape}, {self.weights}" + (f", {self.cache} KV" if self.cache != "bfloat16" else "")


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    engine: EngineChoice
    replicas: int
    role: Role = "both"

    @property
    def devices(self) -> int:
        return self.engine.shape.devices * self.replicas

    def __str__(self) -> str:
        shape = str(self.engine.shape)
        times = f"{self.replicas} x ({shape})" if " x " in shape and self.replicas > 1 else f"{self.replicas} x {shape}"
        text = times if self.replicas > 1 else shape
        return text if self.role == "both" else f"{text} for {self.role}"


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    pools: tuple[Pool, ...]
    devices: int
    dollars_per_hour: float | None
    """None where no price is known: then devices are the cost."""

    @property
    def cost(self) -> float:
        return float(self.devices) if self.dollars_per_hour is None else self.dollars_per_hour

    @property
    def precision(self) -> str:
        first = self.pools[0].engine
        return f"{first.weights} weights, {first.cache} KV"

    def __str__(self) -> str:
        return " + ".join(str(pool) for pool in self.pools)


class Interval(msgspec.Struct, frozen=True):
    value: float
    low: float
    high: float
    """Nine of ten are between, by the residuals of the calibration."""


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """At one rate, by the event loop."""

    ttft_p50: Interval
    ttft_p90: Interval
    ttft_p99: Interval
    itl_p50: Interval
    itl_p90: Interval
    itl_p99: Interval
    tpot: Interval
    """Mean."""
    batch: float
    """Sequences that an engine generates at once, on average."""
    utilisation: float
    provenance: Provenance

    def interval(self, target: Target) -> Interval:
        if target.metric == "tpot":
            return self.tpot
        found: Interval = getattr(self, f"{target.metric}_{target.percentile}")
        return found

    def excess(self, targets: tuple[Target, ...]) -> float:
        """The most by which a target is missed, as a factor; at most 1 where all are met."""
        return max((self.interval(target).value / target.seconds for target in targets), default=0.0)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """A setup, and what is predicted of it."""

    setup: Setup
    prediction: Prediction
    """At the asked rate, with all engines there."""
    degraded: Prediction | None = None
    """With what must be survived gone."""
    meets: bool
    capacity: float | None = None
    """Requests a second under the targets, of the whole setup, by the event loop; None where it was not looked for."""
    tie: str = ""
    """Why measurement could turn the order round; empty where it could not."""
    dollars_per_million_output: float | None = None
    """Tokens generated, at the asked rate."""
    dollars_per_million_at_capacity: float | None = None

    def carrying(self, capacity: float, output: float) -> Verdict:
        """The same, with the most that it carries; `output`: mean tokens of an answer."""
        dollars = per_million(self.setup.dollars_per_hour, capacity * output)
        return msgspec.structs.replace(self, capacity=capacity, dollars_per_million_at_capacity=dollars)


def verdict(
    setup: Setup, prediction: Prediction, degraded: Prediction | None, goal: Goal, meets: bool, tie: str = ""
) -> Verdict:
    return Verdict(
        setup=setup,
        prediction=prediction,
        degraded=degraded,
        meets=meets,
        tie=tie,
        dollars_per_million_output=per_million(setup.dollars_per_hour, goal.demand.output_tokens_per_second),
    )


def per_million(dollars_per_hour: float | None, tokens_per_second: float) -> float | None:
    if dollars_per_hour is None or tokens_per_second <= 0:
        return None
    return dollars_per_hour / (tokens_per_second * 3600) * 1e6


def parts_of(step: StepCost) -> tuple[Part, ...]:
    """The largest first, without those that take no time."""
    return tuple(sorted((part for part in step.parts if part.seconds > 0), key=lambda part: -part.seconds))
