"""A request on its way through a simulated fleet, and an endpoint as the gateway knows it."""

from __future__ import annotations

import msgspec

from shoal.core.endpoint_condition import EndpointCondition
from shoal.core.failover import Trials
from shoal.core.fleet_types import EndpointState, RouteRequest
from shoal.core.health import HealthConfig
from shoal.core.types import Request, Sampling
from shoal.sim.replica import TOKEN, Replica
from shoal.sim.requests import Arrival, Outcome

GREEDY = Sampling(temperature=0.0)


class Flight:
    """Keeps how much of a request was delivered; that is all it takes to go on elsewhere (`Request.resume`)."""

    __slots__ = (
        "arrival",
        "attempt",
        "attempts",
        "began",
        "delivered",
        "heard",
        "last_token",
        "member",
        "outcome",
        "prompt",
        "route",
        "trials",
        "waiting_since",
    )

    def __init__(self, arrival: Arrival, outcome: Outcome, prompt: list[int], route: RouteRequest, now: float) -> None:
        self.arrival = arrival
        self.outcome = outcome
        self.prompt = prompt
        self.route = route
        self.member: Member | None = None
        """Where it is."""
        self.attempt = ""
        """Its id there."""
        self.attempts = 0
        self.began = 0
        """Tokens that had been delivered when the attempt was made."""
        self.heard = False
        """Whether the attempt has brought a token."""
        self.delivered = 0
        self.last_token = -1.0
        self.trials = Trials()
        self.waiting_since = now

    @property
    def is_over(self) -> bool:
        return self.outcome.status != "waiting"

    @property
    def is_placed(self) -> bool:
        return self.member is not None

    @property
    def was_placed(self) -> bool:
        return self.attempts > 0

    def route_now(self) -> RouteRequest:
        """What a router is to know of what is left."""
        if not self.attempts:
            return self.route
        return msgspec.structs.replace(
            self.route,
            num_prompt=self.route.num_prompt + self.delivered,
            num_output=max(self.route.num_output - self.delivered, 1),
            avoid=self.trials.avoid,
        )

    def request_now(self) -> Request:
        """What the next endpoint is asked for, under a new id."""
        self.attempts += 1
        self.attempt = f"{self.arrival.id}.{self.attempts}"
        self.began = self.delivered
        self.heard = False
        return Request(
            id=self.attempt,
            prompt=self.prompt,
            max_tokens=self.arrival.num_output,
            sampling=GREEDY,
            resume={0: [TOKEN] * self.delivered} if self.delivered else None,
        )


class Member(EndpointCondition):
    """An endpoint: its engine, and what it was sent."""

    def __init__(
        self, replica: Replica, health: HealthConfig, now: float, *, queue: bool = True, spare: bool = False
    ) -> None:
        super().__init__(replica.name, health, now, spare=spare)
        self.replica = replica
        self.attempts: dict[str, Flight] = {}
        self.ready_seconds = 0.0
        """Until `since`."""
        self.stepped_at = -1.0
        self.tokens_unsaid = 0
        """Of its last step: the router hears of them with the next."""
        self.reported_at = float("-inf")
        self._most = replica.config.max_sequences if queue else 1 << 60

    @property
    def most_sequences(self) -> int:
        return self._most

    def enter(self, state: EndpointState, now: float, reason: str | None = None) -> None:
        self.ready_seconds = self.up_seconds(now)
        super().enter(state, now, reason)

    @property
    def is_up(self) -> bool:
        """There to work, also while it is suspect or fenced."""
        return self.state not in ("starting", "down")

    def up_seconds(self, now: float) -> float:
        """For how long it was up."""
        return self.ready_seconds + (now - self.since if self.is_up else 0.0)
