"""A request on its way through a simulated fleet, and an endpoint as the gateway knows it."""

from __future__ import annotations

import msgspec

from shoal.core.fleet_types import EndpointState, RouteRequest
from shoal.core.health import CircuitBreaker, HealthConfig, ProgressWatch
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
        "avoid",
        "barren",
        "began",
        "delivered",
        "heard",
        "last_token",
        "lost_at",
        "member",
        "outcome",
        "prompt",
        "retries",
        "route",
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
        self.barren = 0
        """Endpoints lost in a row without a token of it."""
        self.retries = 0
        self.avoid: tuple[str, ...] = ()
        self.lost_at: dict[str, float] = {}
        self.waiting_since = now

    def route_now(self) -> RouteRequest:
        """What a router is to know of what is left."""
        if not self.attempts and not self.avoid:
            return self.route
        return msgspec.structs.replace(
            self.route,
            num_prompt=self.route.num_prompt + self.delivered,
            num_output=max(self.route.num_output - self.delivered, 1),
            avoid=self.avoid,
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


class Member:
    """An endpoint: its state, what it was sent, and how it moves."""

    def __init__(self, replica: Replica, health: HealthConfig | None, now: float, *, spare: bool = False) -> None:
        self.replica = replica
        self.name = replica.name
        self.state: EndpointState = "starting"
        self.since = now
        self.spare = spare
        self.draining = False
        self.attempts: dict[str, Flight] = {}
        self.most = replica.config.max_sequences + max(1, replica.config.max_sequences // 8)
        """That it is sent at once: what waits beyond waits in the gateway, but for a few that fill free slots."""
        self.health = health or HealthConfig()
        self.watch = ProgressWatch(self.health, now)
        self.breaker = CircuitBreaker(self.health)
        self.ready_seconds = 0.0
        """Until `since`."""
        self.stepped_at = -1.0
        self.tokens_unsaid = 0
        """Of its last step: the router hears of them with the next."""
        self.reported_at = float("-inf")

    def become(self, state: EndpointState, now: float) -> None:
        if self.state != "starting" and self.state != "down":
            self.ready_seconds += now - self.since
        self.state, self.since = state, now

    def up_seconds(self, now: float) -> float:
        """For how long it has been there to work, also while it was suspect or hung."""
        return self.ready_seconds + (0.0 if self.state in ("starting", "down") else now - self.since)
