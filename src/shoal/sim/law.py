"""What a step takes, in seconds: a cost model's `seconds`, or a law made up for the purpose."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from shoal.core.cost.types import StepShape

StepLaw = Callable[[StepShape], float]


class Laws(msgspec.Struct, frozen=True):
    """Of one engine's steps."""

    step: StepLaw
    stage: StepLaw | None = None
    """Of a pipeline, how long a step keeps its slowest stage: the next can follow after so long."""


class StepTime(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a step as a sum: fixed, for each token prefilled, for each sequence that decodes, for each KV token
    that the step reads. The defaults are of the order of a 70B model on four large GPUs."""

    base: float = 0.012
    prefill_token: float = 8e-5
    sequence: float = 1e-4
    kv_token: float = 3e-8

    def __call__(self, shape: StepShape) -> float:
        kv = shape.prefill_context + shape.decode_context
        return (
            self.base
            + self.prefill_token * shape.prefill_tokens
            + self.sequence * shape.decode_rows
            + self.kv_token * kv
        )


_FEW_ROWS = 4
_REMEMBERED = 1 << 18


def remembered(law: StepLaw) -> StepLaw:
    """The same law, which must be a function of the shape alone; steps that decode a few sequences are looked up. In a
    fleet with little to do these are most, and their shapes come again and again."""
    known: dict[tuple[int, int, int], float] = {}

    def seconds(shape: StepShape) -> float:
        rows = shape.decode_rows
        if shape.prefill_rows or rows > _FEW_ROWS:
            return law(shape)
        key = rows, shape.decode_context, shape.sampled
        found = known.get(key)
        if found is None:
            found = law(shape)
            if len(known) < _REMEMBERED:
                known[key] = found
        return found

    return seconds
