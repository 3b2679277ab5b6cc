"""A profile beside the work of its step: what each part took, moved and computed, and how near that is to the limit."""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal.bench.profile.trace import KernelTime, PartTime, Profile
from shoal.core.cost.calibration import Calibration
from shoal.core.cost.kernels import PartWork, by_part, step_kernels
from shoal.core.cost.model import CostModel
from shoal.core.cost.types import EngineShape, StepShape
from shoal.core.hardware import Provenance

WITHIN = "gaps within"
BETWEEN = "gaps between"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    part: str
    seconds: float
    """A step."""
    share: float
    """Of the sum of all rows."""
    calls: float | None = None
    """Kernels a step; on a CPU calls. None: a gap."""
    bytes: float | None = None
    """That it must move at the least. None: not counted."""
    operations: float | None = None
    limit_seconds: float | None = None
    """In which the device could do that. None where the device is not known, or the part has no work of its own."""
    bound: Literal["", "bandwidth", "compute"] = ""
    """What the limit is made of, for the most part."""
    of_limit: float | None = None
    """limit_seconds / seconds: 1 is as fast as the device can."""
    kernels: tuple[KernelTime, ...] = ()


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What the cost model says of the step."""

    seconds: float
    low: float
    high: float
    provenance: Provenance


class ProfileReport(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    step: str
    """Its shape, for people."""
    device: str
    made: dict[str, str]
    """Date, versions, precision, kernels."""
    limits: str
    """Whose bandwidth and rates the limits are of; why there are none."""
    profile: Profile
    plain: tuple[float, float, float]
    """Seconds of a step without the profiler: median, least, most."""
    rows: tuple[Row, ...]
    limit_seconds: float | None
    """Of the step: the sum of its parts', one after another."""
    prediction: Prediction | None = None
    trace: str = ""

    @property
    def of_limit(self) -> float | None:
        return None if self.limit_seconds is None else self.limit_seconds / self.plain[0]


def rows_of(profile: Profile, work: dict[str, PartWork], *, has_limits: bool) -> tuple[Row, ...]:
    """Parts by time, then the gaps. Without limits there are still bytes and operations."""
    total = sum(part.seconds for part in profile.parts) + profile.gap_within + profile.gap_between
    whole = max(total, 1e-12)
    rows = [_row(part, work.get(part.name), part.seconds / whole, has_limits=has_limits) for part in profile.parts]
    for name, seconds in ((WITHIN, profile.gap_within), (BETWEEN, profile.gap_between)):
        rows.append(Row(part=name, seconds=seconds, share=seconds / whole))
    return tuple(rows)


def _row(part: PartTime, work: PartWork | None, share: float, *, has_limits: bool) -> Row:
    row = Row(part=part.name, seconds=part.seconds, share=share, calls=part.calls, kernels=part.kernels)
    if work is None:
        return row
    row = msgspec.structs.replace(row, bytes=work.bytes, operations=work.operations)
    if not has_limits:
        return row
    return msgspec.structs.replace(
        row,
        limit_seconds=work.limit_seconds,
        bound="bandwidth" if work.is_streamed else "compute",
        of_limit=work.limit_seconds / max(part.seconds, 1e-12),
    )


def work_of(engine: EngineShape, step: StepShape, activation_bytes: float) -> dict[str, PartWork]:
    """By the names that profiles have for parts."""
    return by_part(step_kernels(engine, step, activation_bytes=activation_bytes), engine.cluster.device)


def prediction_of(engine: EngineShape, step: StepShape, calibration: Calibration | None) -> Prediction:
    cost = CostModel(engine, calibration).step(step)
    return Prediction(seconds=cost.seconds, low=cost.low, high=cost.high, provenance=cost.provenance)
