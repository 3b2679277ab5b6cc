"""Which request goes to which endpoint next: those that lost theirs first, then the queue, wherever there is room.

The gateway that serves and the simulated one hold one of these for each model. It decides; they send.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from shoal.core.admission import AdmissionConfig, AdmissionQueue, QueuedRequest, Refused
from shoal.core.endpoint_condition import EndpointCondition
from shoal.core.failover import FailoverConfig, GivenUp, Trials
from shoal.core.fleet_types import EndpointFailure, RouteRequest
from shoal.core.retry_budget import RetryBudget


class Dispatched(Protocol):
    """A request that was accepted and has not ended."""

    trials: Trials
    waiting_since: float
    """When it came, or lost the endpoint that it had."""

    @property
    def is_over(self) -> bool: ...

    @property
    def is_placed(self) -> bool:
        """Whether an endpoint has it."""

    @property
    def was_placed(self) -> bool:
        """Whether one ever had it."""

    def route_now(self) -> RouteRequest:
        """What a router is to know of what is left."""


class Chooser(Protocol):
    """Of `core.router.Router` what is needed here."""

    def route(self, request: RouteRequest, candidates: Sequence[str], now: float) -> str | None: ...


Flight = TypeVar("Flight", bound=Dispatched)
Member = TypeVar("Member", bound=EndpointCondition)


class Dispatch(Generic[Flight, Member]):
    def __init__(
        self,
        router: Chooser,
        admission: AdmissionConfig,
        failover: FailoverConfig,
        budget: RetryBudget,
        send: Callable[[Flight, Member, float], None],
    ) -> None:
        """`send` is called for each request that has found an endpoint; it may fail at once, by `failed`."""
        self.router = router
        self.failover = failover
        self.budget = budget
        self.queue = AdmissionQueue(admission)
        self.members: dict[str, Member] = {}
        self.flights: dict[str, Flight] = {}
        """All that have not ended."""
        self.moving: deque[Flight] = deque()
        """Lost the endpoint that they had: they go first."""
        self._send = send

    # --- in and out -------------------------------------------------------------------------------------------------

    def offer(self, flight: Flight, item: QueuedRequest, now: float) -> Refused | None:
        """Accept a request, or say why not."""
        answer = self.queue.offer(item, now)
        if isinstance(answer, Refused):
            return answer
        self.flights[item.id] = flight
        self.budget.request(now)
        return None

    def failed(self, flight: Flight, reason: EndpointFailure, *, heard: bool, now: float) -> GivenUp | None:
        """Its endpoint failed it. None if it goes on: it waits for another one."""
        error = flight.trials.verdict(reason, self.failover, self.budget, heard=heard, now=now)
        if error is None:
            flight.waiting_since = now
            self.moving.append(flight)
        return error

    def over(self, request_id: str) -> None:
        """It has ended, however."""
        self.flights.pop(request_id, None)
        self.queue.remove(request_id)

    @property
    def num_waiting(self) -> int:
        return len(self.queue) + len(self.moving)

    def abandoned(self, now: float) -> list[Flight]:
        """Those that have waited too long for an endpoint: there is none, or theirs was lost."""
        nobody = not any(member.state == "ready" for member in self.members.values())
        waiting = self.flights.values() if nobody else self.moving
        longest = self.failover.wait_seconds
        return [
            flight
            for flight in waiting
            if now - flight.waiting_since > longest
            and not (flight.is_placed or flight.is_over)
            and (nobody or flight.was_placed)
        ]

    # --- places -----------------------------------------------------------------------------------------------------

    def pump(self, now: float) -> None:
        """Place what waits, as far as there is room."""
        if not self._place_moving(now):
            return
        place: list[Member] = []

        def can_place(item: QueuedRequest) -> bool:
            member = self.choose(self.flights[item.id], now)
            if member is not None:
                place.append(member)
            return member is not None

        while (item := self.queue.take(can_place, now)) is not None:
            self._send(self.flights[item.id], place.pop(), now)

    def _place_moving(self, now: float) -> bool:
        """False if there is no room for all of them."""
        later = []
        while self.moving and self.candidates(now):
            flight = self.moving.popleft()
            if flight.is_over:
                continue
            member = self.choose(flight, now)
            if member is None:
                later.append(flight)
            else:
                self._send(flight, member, now)
        has_room = not self.moving
        self.moving.extendleft(reversed(later))
        return has_room

    def choose(self, flight: Flight, now: float) -> Member | None:
        able = flight.trials.open_to(self.candidates(now), self.failover, now)
        name = self.router.route(flight.route_now(), able, now) if able else None
        return None if name is None else self.members[name]

    def candidates(self, now: float) -> list[str]:
        """Those with room. Spares, only while another endpoint is not well."""
        members = self.members.values()
        needed = any(not member.spare and not member.is_well for member in members)
        return [member.name for member in members if member.takes(now, spares=needed)]
