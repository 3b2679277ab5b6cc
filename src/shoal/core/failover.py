"""What becomes of a request that its endpoint failed: it goes on elsewhere, or it has failed too often."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import msgspec

from shoal.core.fleet_types import EndpointFailure, FailureKind
from shoal.core.retry_budget import RetryBudget


class FailoverConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    wait_seconds: float = 60.0
    """How long a request waits for an endpoint after it lost the one it had."""
    most_retries: int = 5
    """Of one request, after answers that say that an endpoint is in trouble."""
    most_lost: int = 3
    """Endpoints that may die in a row with a request before it had a token there: it may be what they die of."""
    again_seconds: float = 0.5
    """Until a request goes again to an endpoint that it has found dead: the fleet notices faster that one is."""
    hedge_seconds: float | None = None
    """Ask a second endpoint where the first token is not there after so long. None is never."""


class GivenUp(msgspec.Struct, frozen=True):
    """Why a request ends without an answer, as its client is told."""

    status: int
    code: str
    message: str


class Trials:
    """What one request has met: which endpoints failed it, and how often in a row."""

    __slots__ = ("avoid", "barren", "lost_at", "retries")

    def __init__(self) -> None:
        self.avoid: tuple[str, ...] = ()
        """Endpoints that failed it: taken only where there is no other."""
        self.lost_at: dict[str, float] = {}
        """When it last found an endpoint dead, by name."""
        self.barren = 0
        """Endpoints that were lost in a row without a single token of it: it may be what they die of."""
        self.retries = 0

    def shun(self, endpoint: str) -> None:
        if endpoint not in self.avoid:
            self.avoid = (*self.avoid, endpoint)

    def failed_at(self, endpoint: str, kind: FailureKind, now: float) -> None:
        if kind in ("lost", "refused"):
            self.lost_at[endpoint] = now
        self.shun(endpoint)

    def open_to(self, endpoints: Sequence[str], config: FailoverConfig, now: float) -> Sequence[str]:
        """Of these, where it may go. It would find an endpoint that is dead and not yet known to be as it has just
        found it."""
        if not self.lost_at:
            return endpoints
        return [name for name in endpoints if self.lost_at.get(name, -inf) + config.again_seconds <= now]

    def verdict(
        self, reason: EndpointFailure, config: FailoverConfig, budget: RetryBudget, *, heard: bool, now: float
    ) -> GivenUp | None:
        """None if it is to go on. `heard`: whether the attempt that failed had brought a token."""
        if reason.kind in ("lost", "hung"):
            self.barren = 0 if heard else self.barren + 1
            if self.barren < config.most_lost:
                return None
            return GivenUp(500, "endpoints_lost", f"{self.barren} endpoints in a row were lost with this request")
        if reason.kind == "drained":
            return None
        self.retries += 1
        if self.retries <= config.most_retries and budget.retry(now):
            return None
        return GivenUp(503, "endpoint_failed", f"no endpoint could answer: {reason.message}")
