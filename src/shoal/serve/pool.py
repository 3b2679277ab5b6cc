"""The endpoints of one model and the requests for it: admission, routing, and what becomes of a request that fails.

To those who generate text a pool looks like an engine that cannot break.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from math import inf

from shoal.core.admission import AdmissionConfig, QueuedRequest
from shoal.core.dispatch import Dispatch
from shoal.core.failover import FailoverConfig
from shoal.core.fleet_types import EndpointFailure, ModelStatus, RouteRequest, SpareCapacity
from shoal.core.hashing import chain
from shoal.core.retry_budget import RetryBudget
from shoal.core.router import Router, RoutingConfig
from shoal.core.spare_capacity import EndpointCapacity, LoadMeter, spare_capacity
from shoal.core.types import Rejected, Request
from shoal.serve.errors import ApiError
from shoal.serve.flight import Flight, FlightAttempt, FlightObserver, Receiver
from shoal.serve.member import Member

_DEADLINE_GRACE = 0.2
"""Seconds."""
_CAUTION = 1.2
"""A request that begins and has nothing by its deadline has wasted what it was given."""


class Pool:
    def __init__(
        self,
        name: str,
        routing: RoutingConfig,
        failover: FailoverConfig,
        admission: AdmissionConfig,
        budget: RetryBudget,
        on_event: Callable[[str, str], None],
    ) -> None:
        self.name = name
        self.failover = failover
        self.router = Router(routing)
        self.dispatch: Dispatch[Flight, Member] = Dispatch(self.router, admission, failover, budget, self._send)
        self.members = self.dispatch.members
        self.flights = self.dispatch.flights
        """All that have not ended."""
        self._on_event = on_event
        self._attempt_numbers = itertools.count(1)
        self._meter = LoadMeter(time.monotonic())
        self._tokens_of_removed = 0
        self.generated_tokens = 0
        self.degradations = 0
        self._pump_is_due = False
        self.accepted = self.completed = self.failed = self.refused = 0
        self.migrations = self.retries = self.hedges = 0

    # --- requests ---------------------------------------------------------------------------------------------------

    @property
    def max_len(self) -> int:
        """Of the endpoint that takes the least: a request must fit each, or it could not move. Raises ApiError."""
        known = [member.info.max_len for member in self.members.values() if member.info is not None]
        if not known:
            raise ApiError(503, f"no endpoint of {self.name!r} has been started yet", code="no_endpoint")
        return min(known)

    @property
    def is_known(self) -> bool:
        """Whether an endpoint has said what it is."""
        return any(member.info is not None for member in self.members.values())

    def submit(
        self,
        request: Request,
        receiver: Receiver,
        *,
        tenant: str = "",
        weight: float = 1.0,
        session: str = "",
        observer: FlightObserver | None = None,
    ) -> Flight:
        """Accept a request, whose receiver then hears of its end whatever happens. Raises ApiError if it is refused."""
        now = time.monotonic()
        flight = Flight(
            request,
            receiver,
            attempt_numbers=self._attempt_numbers,
            observer=observer,
            on_end=self._attempt_over,
            on_failure=self._attempt_failed,
            on_over=self._over,
            route=RouteRequest(
                id=request.id,
                num_prompt=len(request.prompt),
                num_output=request.max_tokens * request.n,
                blocks=tuple(chain(request.prompt, self.router.config.block_size, request.cache_salt)),
                session=session,
                tenant=tenant,
                priority=request.priority,
                deadline=request.deadline,
            ),
            arrived=now,
        )
        refused = self.dispatch.offer(
            flight,
            QueuedRequest(
                id=request.id,
                tokens=max(1, flight.route.num_prompt + flight.route.num_output),
                arrived=now,
                tenant=tenant,
                weight=weight,
                priority=request.priority,
                deadline=request.deadline,
                service_seconds=self._service_seconds(flight.route, now),
            ),
            now,
        )
        if refused is not None:
            self.refused += 1
            raise ApiError(refused.status, refused.message, code=refused.reason, retry_after=refused.retry_after)
        self.accepted += 1
        self._pump()
        return flight

    def _service_seconds(self, route: RouteRequest, now: float) -> float:
        """From its dispatch to when it has been of use, as predicted where that is soonest; 0 without a deadline.

        At its deadline a request ends with what it has, so a first token is enough as long as nobody waits. While
        others do it is the end: what is cut off would have been room for one that is not.
        """
        if route.deadline is None:
            return 0.0
        ready = [
            name for name, member in self.members.items() if member.state == "ready" and self._is_learned(name, now)
        ]
        whole = len(self.dispatch.queue) > 0
        predictions = self.router.predict(route, ready, now)
        predicted = [prediction.completion if whole else prediction.first_token for prediction in predictions]
        return _CAUTION * min(predicted, default=0.0)

    def _is_learned(self, name: str, now: float) -> bool:
        """Whether it has been seen how fast an endpoint is: nobody is refused for a guess."""
        speed = self.router.speed(name, now)
        return speed is not None and speed.known

    def pump_soon(self) -> None:
        """Once what happens now was taken in: an engine that is lost says so for each request before it is gone."""
        if not self._pump_is_due:
            self._pump_is_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_is_due = False
        self.dispatch.pump(time.monotonic())

    def _send(self, flight: Flight, member: Member, now: float) -> None:
        flight.dispatch(member, now)
        if self.failover.hedge_seconds is not None and flight.num_delivered == 0:
            asyncio.get_running_loop().call_later(self.failover.hedge_seconds, self._hedge, flight)

    def _hedge(self, flight: Flight) -> None:
        """A second endpoint for a request whose first token is late. Whoever is first goes on."""
        now = time.monotonic()
        if flight.is_over or flight.first_token_at is not None or len(flight.attempts) != 1:
            return
        flight.trials.shun(flight.attempts[0].member.name)
        member = self.dispatch.choose(flight, now)
        if member is not None and member is not flight.attempts[0].member and self.dispatch.budget.retry(now):
            self.hedges += 1
            flight.num_hedges += 1
            flight.dispatch(member, now)

    # --- what becomes of attempts -----------------------------------------------------------------------------------

    def _attempt_over(self, flight: Flight, attempt: FlightAttempt) -> None:
        """There is room again."""
        if self.dispatch.num_waiting:
            self.pump_soon()

    def _attempt_failed(self, flight: Flight, attempt: FlightAttempt, reason: EndpointFailure | Rejected) -> None:
        member = attempt.member
        member.ended(attempt, reason)
        self._attempt_over(flight, attempt)
        if isinstance(reason, Rejected):
            if not reason.retryable:
                flight.fail(ApiError(400, reason.reason, param=reason.field))
                return
            reason = EndpointFailure(kind="overloaded", message=reason.reason)
        flight.finish_what_is_complete()
        if not flight.generated:
            flight.abort()
            return
        if flight.attempts:
            return  # another is under way
        given_up = self.dispatch.failed(flight, reason, heard=attempt.heard, now=time.monotonic())
        if given_up is not None:
            flight.fail(ApiError(given_up.status, given_up.message, code=given_up.code))
            return
        if attempt.heard:
            self.migrations += 1
            self._on_event("migrated", f"{flight.request.id} leaves {member.name}: {reason.message}")
        else:
            self.retries += 1
        self.pump_soon()

    def move_all(self, member: Member, failure: EndpointFailure) -> None:
        """Take from an endpoint what it has. It is told to drop it, and is not listened to any more."""
        for attempt in list(member.attempts.values()):
            attempt.flight.attempt_ended(attempt, failure, gone=False)

    def expire(self, now: float) -> None:
        """End what has waited too long for an endpoint."""
        for item in self.dispatch.queue.expire(now):
            if item.id in self.flights:
                self.flights[item.id].end_overdue()
        for flight in list(self.flights.values()):
            deadline = flight.request.deadline
            # An endpoint that keeps deadlines itself is a little sooner, and knows its last token.
            if deadline is not None and deadline + (_DEADLINE_GRACE if flight.attempts else 0.0) <= now:
                flight.end_overdue()
        for flight in self.dispatch.abandoned(now):
            flight.fail(ApiError(503, f"no endpoint of {self.name!r} is available", code="no_endpoint"))

    def _over(self, flight: Flight, error: ApiError | None) -> None:
        self.dispatch.over(flight.request.id)
        if error is None:
            self.completed += 1
        else:
            self.failed += 1

    # --- how it is --------------------------------------------------------------------------------------------------

    def measure(self, now: float) -> None:
        """Take in what was generated since the last call: several times a second."""
        tokens = sum(member.tokens for member in self.members.values()) + self._tokens_of_removed
        self._meter.add(tokens - self.generated_tokens, now)
        self.generated_tokens = tokens

    def removed(self, member: Member) -> None:
        self._tokens_of_removed += member.tokens

    @property
    def num_ready(self) -> int:
        return sum(member.state == "ready" and not member.draining for member in self.members.values())

    @property
    def is_starting(self) -> bool:
        """For the first time: it is neither up nor down."""
        return all(member.state == "starting" and not member.epoch for member in self.members.values())

    def expected_wait(self, now: float) -> float:
        """Seconds that a request like those that wait would wait; infinite: it would be refused."""
        queue = self.dispatch.queue
        if not len(queue):
            return 0.0
        usual = QueuedRequest(id="", tokens=queue.tokens // len(queue) or 1, arrived=now)
        if queue.tokens >= queue.config.max_tokens or len(queue) >= queue.config.max_requests:
            return inf
        return queue.expected_wait(usual, now) or 0.0

    def spare_capacity(self, now: float) -> SpareCapacity:
        """Whether the rest would carry the load if the largest endpoint were lost."""
        capacities = []
        for member in self.members.values():
            speed = self.router.speed(member.name, now)
            sequences = member.most_sequences
            rate = None
            if speed is not None and speed.known:
                rate = sequences / max(speed.decode_base + speed.decode_each * sequences, 1e-9)
            ready = member.state == "ready" and not member.draining
            capacities.append(EndpointCapacity(name=member.name, speed=rate, ready=ready, spare=member.spare))
        return spare_capacity(capacities, self._meter.load(now))

    def status(self, now: float) -> ModelStatus:
        waiting = [flight for flight in self.flights.values() if not flight.attempts]
        return ModelStatus(
            name=self.name,
            policy=self.router.config.policy,
            endpoints=[member.status(now) for member in self.members.values()],
            running=len(self.flights) - len(waiting),
            waiting=len(waiting),
            waiting_tokens=sum(flight.route.num_prompt for flight in waiting),
            accepted=self.accepted,
            completed=self.completed,
            failed=self.failed,
            refused=self.refused,
            migrations=self.migrations,
            retries=self.retries,
            hedges=self.hedges,
            degradations=self.degradations,
            generated_tokens=self.generated_tokens,
            tokens_per_second=self._meter.rates(now)[0],
            n_plus_one=self.spare_capacity(now),
        )
