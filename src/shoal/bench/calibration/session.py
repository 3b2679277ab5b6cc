"""A calibration from its beginning to its files: devices, then steps of the real engine, then the fit, then a check.

Engines are opened by the caller, for this ring knows none: one after another, each with all of the machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from shoal.bench.calibration.fit import Fitted, fit, residual
from shoal.bench.calibration.machine import Machine
from shoal.bench.calibration.points import Limits, StepPoint, grid, held_out
from shoal.bench.calibration.step_timing import Executor, StepTiming, TimedStep, time_steps
from shoal.core.config import EngineConfig
from shoal.core.cost.calibration import Calibration
from shoal.core.cost.model import CostModel
from shoal.core.cost.types import CachePrecision, EngineShape
from shoal.core.layout import Layout
from shoal.core.model_shape import ModelShape

MAX_LEN = 2200
MAX_SEQUENCES = 40
MAX_BATCH_TOKENS = 512
CACHE_TOKENS = 24_000
"""Most that the KV caches of one engine hold: filling them takes longer than timing."""

Report = Callable[[str, float], None]
"""What is being done, and how much of all is done."""


class EngineInfo(Protocol):
    """Of `shoal.engine.executor.WorkerInfo`."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def max_len(self) -> int: ...


class StoppableExecutor(Executor, Protocol):
    def stop(self) -> None: ...


OpenEngine = Callable[[EngineConfig], tuple[StoppableExecutor, EngineInfo]]
"""Opens and starts one."""


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What is timed."""

    shape: ModelShape
    config: EngineConfig
    """Of one rank; ranks and threads are set for each engine."""
    machine: Machine
    cores: int
    """That the engine may use."""
    vocab_size: int
    ranks: tuple[int, ...] = (1,)

    def engine_config(self, tp: int) -> EngineConfig:
        threads = max(1, self.cores // tp) if self.machine.is_shared else None
        return msgspec.structs.replace(self.config, layout=Layout(tp=tp), threads=threads)

    def engine_shape(self, tp: int) -> EngineShape:
        config = self.config
        return EngineShape(
            model=self.shape,
            cluster=self.machine.cluster(tp),
            layout=Layout(tp=tp),
            weights=config.dtype,
            cache=self.cache,
            profile="shoal",
            block_size=config.block_size,
            max_batch_tokens=config.max_batch_tokens,
            max_sequences=config.max_sequences,
        )

    @property
    def cache(self) -> CachePrecision:
        """As the worker chooses it where it is not told."""
        if self.config.kv_dtype != "auto":
            return self.config.kv_dtype
        return "float32" if self.config.dtype == "float32" else "bfloat16"


def subject_config(model: str, dtype: str, device: str, shape: ModelShape, max_len: int = MAX_LEN) -> EngineConfig:
    """An engine that is large enough for the points, and no larger."""
    max_len = min(max_len, shape.max_len)
    per_element = 4 if dtype == "float32" else 2
    tokens = CACHE_TOKENS + 16 * MAX_SEQUENCES
    return msgspec.convert(
        {
            "model": model,
            "dtype": dtype,
            "device": device,
            "max_len": max_len,
            "max_sequences": MAX_SEQUENCES,
            "max_batch_tokens": MAX_BATCH_TOKENS,
            "kv_cache_bytes": int(shape.kv_bytes_per_token(per_element) * tokens),
            # On a machine that is busy with something else a rank may be silent for long; it is not dead.
            "launch": {"silence_seconds": 120.0, "collective_seconds": 120.0},
        },
        EngineConfig,
    )


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """A step that nothing was fitted to."""

    step: TimedStep
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.step.seconds - 1


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    calibration: Calibration
    fitted: dict[str, float]
    fit_errors: list[float]
    """Predicted / measured - 1, of the points that constants were fitted to."""
    steps: list[TimedStep]
    checked: list[Checked]
    foreign_cores: float
    """Median over all timings."""
    disturbed: float
    """Share of visits beside which something else ran."""


def time_engine(
    subject: Subject,
    tp: int,
    open_engine: OpenEngine,
    points_of: Callable[[Limits], Sequence[StepPoint]],
    rounds: int,
    seconds: float,
    report: Report,
) -> list[TimedStep]:
    """Steps of one engine at the points that its limits allow. `seconds`: most, of rounds beyond the first.

    Raises what opening it raises, and TimingError.
    """
    config = subject.engine_config(tp)
    name = f"tp {tp}"
    report(f"{name}: starting", 0.0)
    executor, info = open_engine(config)
    try:
        held = info.num_blocks * config.block_size - config.block_size * config.max_sequences
        limits = Limits(
            max_len=info.max_len,
            max_sequences=config.max_sequences,
            max_batch_tokens=config.max_batch_tokens,
            cache_tokens=min(held, CACHE_TOKENS),
        )
        points = list(points_of(limits))
        timing = StepTiming(
            executor,
            points,
            block_tokens=config.block_size,
            vocab_size=subject.vocab_size,
            max_batch_tokens=config.max_batch_tokens,
        )
        timing.fill(lambda share: report(f"{name}: filling the KV cache", 0.15 * share))
        return time_steps(
            timing,
            points,
            tp,
            rounds=rounds,
            seconds=seconds,
            report=lambda share: report(f"{name}: steps", 0.15 + 0.85 * share),
        )
    finally:
        executor.stop()


def calibrate(
    subject: Subject,
    open_engine: OpenEngine,
    made: dict[str, str],
    report: Report,
    *,
    rounds: int = 5,
    checks: int = 6,
    seconds: float = 240.0,
    quick: bool = False,
    seed: int = 0,
) -> Outcome:
    """`checks` points of each number of ranks are kept out of the fit. `seconds`: most for the steps of one engine.

    Raises TimingError.
    """
    fitted_to: list[TimedStep] = []
    kept: list[TimedStep] = []
    for place, tp in enumerate(subject.ranks):

        def points_of(limits: Limits, tp: int = tp) -> list[StepPoint]:
            known = grid(limits, quick=quick)
            return known + held_out(limits, checks, seed + tp, known)

        def reported(what: str, share: float, place: int = place) -> None:
            report(what, (place + share) / len(subject.ranks))

        steps = time_engine(subject, tp, open_engine, points_of, rounds, seconds, reported)
        fitted_to += steps[: len(steps) - checks]
        kept += steps[len(steps) - checks :]
    return concluded(subject, fitted_to, kept, made)


def concluded(subject: Subject, steps: list[TimedStep], kept: list[TimedStep], made: dict[str, str]) -> Outcome:
    """The fit, the check, and the intervals."""
    base = Calibration(device=subject.machine.device.name, provenance="calibrated")
    fitted: Fitted = fit(subject.engine_shape, base, steps, subject.config.dtype)
    checked = check(subject, fitted.calibration, kept)
    errors = [one.error for one in checked] + fitted.errors
    everything = steps + kept
    calibration = msgspec.structs.replace(
        fitted.calibration,
        residuals={"step": residual(errors)},
        made=made | {"rows": f"{len(steps)} steps fitted, {len(kept)} checked"},
    )
    visits = sum(step.visits for step in everything)
    return Outcome(
        calibration=calibration,
        fitted=fitted.values,
        fit_errors=fitted.errors,
        steps=everything,
        checked=checked,
        foreign_cores=statistics.median(step.foreign_cores for step in everything),
        disturbed=sum(step.disturbed for step in everything) / visits,
    )


def check(subject: Subject, calibration: Calibration, steps: Sequence[TimedStep]) -> list[Checked]:
    models = {tp: CostModel(subject.engine_shape(tp), calibration) for tp in {step.tp: None for step in steps}}
    return [Checked(step=step, predicted=models[step.tp].seconds(step.point.shape())) for step in steps]
