"""How an endpoint is, as its gateway sees it: its state, whether it gets requests, and what to do if it stands still.

Live and simulated fleets keep one of these for each endpoint, and do what it says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import msgspec

from shoal.core.fleet_types import EndpointState
from shoal.core.health import CircuitBreaker, HealthConfig, ProgressWatch


class Judgement(msgspec.Struct, frozen=True):
    """What an endpoint should become, and why. `down`: its process is to be killed and started anew."""

    state: EndpointState
    reason: str | None = None


class EndpointCondition(ABC):
    def __init__(self, name: str, health: HealthConfig, now: float, *, spare: bool = False) -> None:
        self.name = name
        self.health = health
        self.spare = spare
        self.state: EndpointState = "starting"
        self.reason: str | None = None
        """Why it is not ready."""
        self.since = now
        """When it came into its state."""
        self.epoch = 0
        self.draining = False
        self.num_sequences = 0
        """That it was sent and that have not ended."""
        self.watch = ProgressWatch(health, now)
        self.breaker = CircuitBreaker(health)

    @property
    @abstractmethod
    def most_sequences(self) -> int:
        """That it runs at once, about: what waits beyond that waits in the gateway, where its turn is decided."""

    def enter(self, state: EndpointState, now: float, reason: str | None = None) -> None:
        self.state, self.reason, self.since = state, reason, now

    def renewed(self, now: float) -> None:
        """It is of use, for the first time or anew: what was learned of it is of another process."""
        self.epoch += 1
        self.watch = ProgressWatch(self.health, now)
        self.breaker.reset()
        self.enter("ready", now)

    @property
    def is_well(self) -> bool:
        return self.state == "ready" and not self.draining

    def takes(self, now: float, *, spares: bool) -> bool:
        """Whether it may get a request now. `spares`: those that are kept back are needed."""
        if self.state != "ready" or self.draining or (self.spare and not spares):
            return False
        # A little more than runs at once: a slot that becomes free is filled without asking here first.
        most = self.most_sequences
        if self.num_sequences >= most + max(1, most // 8):
            return False
        return self.breaker.allows(now)

    def judge(self, now: float, *, others: bool, hung_seconds: float, restartable: bool) -> Judgement | None:
        """None if it stays as it is. `others`: there are endpoints that could go on with what it has. `restartable`: it
        may be started anew once it stood still for `hung_seconds`."""
        if self.state == "fenced":
            long = restartable and now - self.since > hung_seconds
            return Judgement("down", "it was hung for too long") if long else None
        if self.state not in ("ready", "suspect"):
            return None
        silence = self.watch.silence(now)
        reason = f"no step for {silence:.1f} s"
        if others and self.watch.is_hung(now):
            return Judgement("fenced", reason)
        if restartable and silence > hung_seconds:
            # With nowhere to go, what it has stayed until now: its cache is worth more than a new start.
            return Judgement("down", reason)
        if (suspect := self.watch.is_suspect(now)) == (self.state == "suspect"):
            return None
        return Judgement("suspect", reason) if suspect else Judgement("ready")
