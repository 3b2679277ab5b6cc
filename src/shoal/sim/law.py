"""What a step takes, in seconds: a cost model's `seconds`, or a law made up for the purpose."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from shoal.core.cost.types import StepShape

StepLaw = Callable[[StepShape], float]


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
