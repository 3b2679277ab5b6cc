"""Calibration: what measurements of a device say beyond its data sheet, and how far predictions were off. A file.

Every field is a correction with a physical meaning; what is absent leaves the device's and the profile's own value.
"""

from __future__ import annotations

import msgspec

from shoal.core.hardware import Provenance


class Residual(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Measured divided by predicted, over `rows` measurements."""

    low: float
    """One in twenty is below."""
    median: float
    high: float
    """One in twenty is above."""
    rows: int


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    device: str = ""
    """Name of the DeviceSpec that this was measured on; empty: of any."""
    provenance: Provenance = "calibrated"
    fractions: dict[str, float] = {}
    """Take the place of the device's: matmul.bfloat16, stream.float8, attention.decode, attention.prefill, copy, ..."""
    factors: dict[str, float] = {}
    """What a part's seconds are multiplied by: linear, experts, attention, collectives, pipeline, head, host."""
    sharpness: float | None = None
    """Of the corner between reading weights and computing with them: 1 where neither hides the other, large where the
    smaller is hidden wholly."""
    kernel_seconds: float | None = None
    step_seconds: float | None = None
    """Of the host, every step."""
    row_seconds: float | None = None
    """Of the host, for every sequence in a step."""
    token_seconds: float | None = None
    """Of the host, for every token in a step."""
    layer_kernels: float | None = None
    """Kernels of a layer besides its matrix products, each of which takes kernel_seconds at least."""
    front_seconds: float | None = None
    """Of a request before it is queued and after its first token: HTTP, tokens, text."""
    link_latency: float | None = None
    """Of the link between the devices of a node."""
    link_bandwidth: float | None = None
    """Reached by large messages, between the devices of a node."""
    residuals: dict[str, Residual] = {}
    """By metric (step, tpot, ttft, throughput), the engine's profile, and whether the model is dense or a mixture,
    joined by slashes; a name may be cut short at any slash."""
    made: dict[str, str] = {}
    """How: date, command, machine, versions, rows."""

    def residual(self, metric: str, *qualifiers: str) -> Residual | None:
        """The most particular that there is."""
        for count in range(len(qualifiers), -1, -1):
            found = self.residuals.get("/".join((metric, *qualifiers[:count])))
            if found is not None:
                return found
        return None


def decode(data: bytes) -> Calibration:
    """Raises ValueError with the field's name where it is not one."""
    try:
        found = msgspec.json.decode(data, type=Calibration)
    except msgspec.DecodeError as error:
        raise ValueError(f"not a calibration file: {error}") from error
    for name in ("fractions", "factors"):
        for key, value in getattr(found, name).items():
            if not 0 < value < 1e3:
                raise ValueError(f"{name}.{key} must be above 0, got {value}")
    return found


def encode(calibration: Calibration) -> bytes:
    return msgspec.json.format(msgspec.json.encode(calibration), indent=2)


def weakest(*of: Provenance) -> Provenance:
    """What a prediction that rests on all of them may claim."""
    order: tuple[Provenance, ...] = ("measured", "calibrated", "datasheet", "assumed")
    return order[max(order.index(each) for each in of)]
