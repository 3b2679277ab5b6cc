"""What a diagnosis is made of: findings with their evidence, what to try, and what would show them wrong."""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal.plan.diagnose.dialects import Lever

Signal = Literal["does_not_fit", "idle_compute", "batching_limit", "imbalance"]
State = Literal["present", "absent", "unknown"]
Certainty = Literal["shown", "indicated"]
"""The numbers leave no other reading; or they point there, and what was not measured could say otherwise."""

TITLES: dict[Signal, str] = {
    "does_not_fit": "1 does not fit",
    "idle_compute": "2 p99 rises while compute is idle",
    "batching_limit": "3 batching has hit its limit",
    "imbalance": "replicas are not equally loaded",
}


class Evidence(msgspec.Struct, frozen=True):
    """One number and what it says."""

    says: str
    value: float
    metric: str
    """Where it was read."""


class Action(msgspec.Struct, frozen=True):
    """Something to try: a flag of the engine if `lever` is set, else what `why` says."""

    why: str
    lever: Lever | None = None
    value: str = ""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    signal: Signal
    state: State
    certainty: Certainty = "shown"
    summary: str
    evidence: tuple[Evidence, ...] = ()
    try_first: tuple[Action, ...] = ()
    """In this order."""
    disproved_by: str = ""
    missing: tuple[str, ...] = ()
    """What would have to be known, if `unknown`."""


class Targets(msgspec.Struct, frozen=True):
    """What the user promised, and what the metrics do not say; None where neither was given."""

    ttft_p99: float | None = None
    """Seconds."""
    itl_p99: float | None = None
    """Seconds."""
    max_sequences: int | None = None
    """The engine's limit of sequences in the batch."""


def shown_seconds(seconds: float) -> str:
    """850 us, 12.3 ms, 1.25 s."""
    if seconds == float("inf"):
        return "unbounded"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
