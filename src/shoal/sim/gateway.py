"""The gateway over simulated engines: the admission queue, router, health and retry budget that serve live.

What `serve.pool` and `serve.fleet` do with sockets and tasks happens here with calls and events: requests are admitted,
routed and watched; those of an endpoint that is lost or hung go on elsewhere with what was delivered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from typing import Protocol

import msgspec

from shoal.core.admission import AdmissionConfig, AdmissionQueue, QueuedRequest, Refused
from shoal.core.fleet_types import EndpointReport, FailureKind, RouteRequest
from shoal.core.health import HealthConfig
from shoal.core.retry_budget import RetryBudget
from shoal.core.types import Output
from shoal.sim.clock import Clock
from shoal.sim.flight import Flight, Member
from shoal.sim.replica import Replica

TICK_SECONDS = 0.1


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """How a gateway treats requests and endpoints: what a deployment says of it."""

    admission: AdmissionConfig = AdmissionConfig()
    health: HealthConfig = HealthConfig()
    retry_ratio: float = 0.2
    most_retries: int = 5
    most_lost: int = 3
    again_seconds: float = 0.5
    wait_seconds: float = 60.0
    hung_seconds: float = 30.0
    """An engine that was fenced for so long is started anew."""
    queue: bool = True
    """Requests beyond what endpoints run wait in the gateway. Else all are sent at once."""
    watch: bool = True
    """Endpoints that make no step are fenced, and what they have goes on elsewhere."""


OPEN = Rules(
    admission=AdmissionConfig(max_requests=1 << 60, max_tokens=1 << 60, max_wait_seconds=inf), queue=False, watch=False
)
"""Nothing is held back, refused or watched: for the study of routing alone."""


class Chooser(Protocol):
    """The part of `core.router.Router` that a fleet talks to, so that others can be put in its place."""

    def add(
        self, name: str, max_sequences: int | None, num_blocks: int | None, block_size: int, now: float
    ) -> None: ...

    def remove(self, name: str) -> None: ...

    def route(self, request: RouteRequest, candidates: Sequence[str], now: float) -> str | None: ...

    def dispatched(self, request: RouteRequest, name: str, now: float) -> None: ...

    def first_token(self, request_id: str, name: str, now: float) -> None: ...

    def progressed(self, name: str, tokens: int, now: float) -> None: ...

    def finished(self, request_id: str, name: str, num_generated: int, now: float, ok: bool) -> None: ...

    def reported(self, name: str, report: EndpointReport, now: float) -> None: ...


class Gateway:
    def __init__(
        self,
        chooser: Chooser,
        rules: Rules,
        clock: Clock,
        *,
        report_interval: float | None,
        report_delay: float,
        on_gap: Callable[[float, int], None],
        on_event: Callable[[str, str, str], None],
    ) -> None:
        """`on_gap` hears of the seconds between two tokens of a sequence, and of how many sequences; `on_event` of
        what happens to endpoints: kind, endpoint, message. Reports come with steps, at most one an interval."""
        self.chooser = chooser
        self.rules = rules
        self.clock = clock
        self.members: dict[str, Member] = {}
        self.queue = AdmissionQueue(rules.admission)
        self.budget = RetryBudget(ratio=rules.retry_ratio)
        self.flights: dict[str, Flight] = {}
        """All that have not ended."""
        self.moving: deque[Flight] = deque()
        """Lost the endpoint that they had: they go first."""
        self.generated_tokens = 0
        self.restart: Callable[[Member], None] = lambda member: None
        """Of an engine that hangs for too long."""
        self._interval = report_interval
        self._delay = report_delay
        self._on_gap = on_gap
        self._on_event = on_event

    # --- endpoints --------------------------------------------------------------------------------------------------

    def started(self, member: Member) -> None:
        """The endpoint is of use, for the first time or anew."""
        now, config = self.clock.now, member.replica.config
        self.members[member.name] = member
        self.chooser.add(member.name, config.max_sequences, config.num_blocks, config.block_size, now)
        member.watch = type(member.watch)(member.health, now)
        member.breaker.reset()
        member.tokens_unsaid = 0
        member.become("ready", now)
        self.pump()

    def gone(self, member: Member, reason: str) -> None:
        """Its process died."""
        member.become("down", self.clock.now)
        self._on_event("endpoint_lost", member.name, reason)
        self.move_all(member, "lost", reason)
        self.pump()

    def remove(self, member: Member, reason: str) -> None:
        """At once: what it has is moved."""
        member.become("down", self.clock.now)
        del self.members[member.name]
        self.move_all(member, "drained", reason)
        self.chooser.remove(member.name)
        self._on_event("removed", member.name, reason)
        self.pump()

    def move_all(self, member: Member, kind: FailureKind, message: str) -> None:
        for flight in list(member.attempts.values()):
            member.replica.abort(flight.attempt)
            self._attempt_failed(flight, kind, message)

    def lost_sequences(self, member: Member, outputs: list[Output]) -> None:
        """Its workers failed, and with them what ran; it lives and starts new ones."""
        for output in outputs:
            self._attempt_failed(member.attempts[output.request_id], "lost", output.error or "")
        self.pump()

    def takes(self, member: Member, now: float) -> bool:
        if member.state != "ready" or member.draining:
            return False
        if self.rules.queue and len(member.attempts) >= member.most:
            return False
        return member.breaker.allows(now)

    def candidates(self, now: float) -> list[str]:
        """Those with room. Spares, only while another endpoint is not well."""
        takes = self.takes
        able = [name for name, member in self.members.items() if takes(member, now)]
        if not any(member.spare for member in self.members.values()):
            return able
        if any(member.state != "ready" or member.draining for member in self.members.values() if not member.spare):
            return able
        return [name for name in able if not self.members[name].spare]

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(self, flight: Flight) -> None:
        now, route = self.clock.now, flight.route
        tokens = max(1, route.num_prompt + route.num_output)
        answer = self.queue.offer(QueuedRequest(id=route.id, tokens=tokens, arrived=now), now)
        if isinstance(answer, Refused):
            flight.outcome.status, flight.outcome.reason = "rejected", answer.message
            return
        self.flights[route.id] = flight
        self.budget.request(now)
        self.pump()

    def pump(self) -> None:
        """Place what waits, as far as there is room."""
        if not self.moving and not len(self.queue):
            return
        now = self.clock.now
        if not self._place_moving(now):
            return
        chosen: list[Member] = []

        def can_place(item: QueuedRequest) -> bool:
            member = self._choose(self.flights[item.id], now)
            if member is not None:
                chosen.append(member)
            return member is not None

        while (item := self.queue.take(can_place, now)) is not None:
            self._send(self.flights[item.id], chosen.pop(), now)

    def _place_moving(self, now: float) -> bool:
        """False if there is no room for all of them."""
        later = []
        while self.moving:
            flight = self.moving.popleft()
            member = self._choose(flight, now) if flight.outcome.status == "waiting" else None
            if member is not None:
                self._send(flight, member, now)
            elif flight.outcome.status == "waiting":
                later.append(flight)
        self.moving.extend(later)
        return not self.moving

    def _choose(self, flight: Flight, now: float) -> Member | None:
        able = self.candidates(now)
        if flight.lost_at:
            # It would find an endpoint that is dead and not yet known to be as it has just found it.
            again = self.rules.again_seconds
            able = [name for name in able if flight.lost_at.get(name, -inf) + again <= now]
        name = self.chooser.route(flight.route_now(), able, now) if able else None
        return None if name is None else self.members[name]

    def _send(self, flight: Flight, member: Member, now: float) -> None:
        question = flight.route_now()
        request = flight.request_now()
        flight.member, flight.outcome.endpoint = member, member.name
        member.attempts[request.id] = flight
        member.watch.working(True, now)
        member.breaker.sent(request.id)
        self.chooser.dispatched(question, member.name, now)
        rejected = member.replica.add(request)
        if rejected is None:
            return
        if rejected.retryable:
            self._attempt_failed(flight, "overloaded", rejected.reason)
            return
        self._leave(flight, member)
        member.breaker.worked(request.id)
        self._end(flight, "rejected", rejected.reason)

    def _leave(self, flight: Flight, member: Member, *, whole: bool = False) -> None:
        del member.attempts[flight.attempt]
        now = self.clock.now
        member.watch.working(bool(member.attempts), now)
        self.chooser.finished(flight.route.id, member.name, flight.delivered - flight.began, now, whole)
        flight.member = None

    def _end(self, flight: Flight, status: str, reason: str = "") -> None:
        outcome = flight.outcome
        outcome.status, outcome.reason = status, reason  # type: ignore[assignment]
        self.queue.remove(flight.route.id)
        self.flights.pop(flight.route.id, None)

    def _attempt_failed(self, flight: Flight, kind: FailureKind, message: str) -> None:
        """It goes on elsewhere, unless it has failed too often."""
        member, now = flight.member, self.clock.now
        if member is None:
            return
        attempt, heard = flight.attempt, flight.heard
        self._leave(flight, member)
        member.breaker.failed(attempt, kind, now)
        if kind in ("lost", "refused"):
            flight.lost_at[member.name] = now
        if member.name not in flight.avoid:
            flight.avoid = (*flight.avoid, member.name)
        if (error := self._verdict(flight, kind, message, heard=heard, now=now)) is not None:
            self._end(flight, "failed", error)
            return
        if heard:
            flight.outcome.moves += 1
        else:
            flight.outcome.retries += 1
        flight.waiting_since = now
        self.moving.append(flight)

    def _verdict(self, flight: Flight, kind: FailureKind, message: str, *, heard: bool, now: float) -> str | None:
        """Why it ends here; None if it is to go on."""
        if kind in ("lost", "hung"):
            flight.barren = 0 if heard else flight.barren + 1
            if flight.barren < self.rules.most_lost:
                return None
            return f"{flight.barren} endpoints in a row were lost with this request"
        if kind == "drained":
            return None
        flight.retries += 1
        if flight.retries <= self.rules.most_retries and self.budget.retry(now):
            return None
        return f"no endpoint could answer: {message}"

    # --- steps ------------------------------------------------------------------------------------------------------

    def stepped(self, replica: Replica, outputs: list[Output]) -> None:
        """As an engine's message of a step is taken in: first the report, then the outputs."""
        member, now = self.members.get(replica.name), self.clock.now
        if member is None:
            return
        member.watch.stepped(now)
        self._report(member, now)
        attempts, before = member.attempts, member.stepped_at
        member.stepped_at = now
        usual = tokens = 0
        for output in outputs:
            flight = attempts[output.request_id]
            tokens += 1
            flight.delivered += 1
            last, flight.last_token = flight.last_token, now
            if not flight.heard:
                self._first_of(flight, member, output, now)
                if last >= 0.0:
                    self._on_gap(now - last, 1)
            elif last == before:
                usual += 1
            else:
                self._on_gap(now - last, 1)
            if output.finish is not None:
                self._leave(flight, member, whole=True)
                flight.outcome.end = now
                self._end(flight, "done")
        if usual:
            self._on_gap(now - before, usual)
        self.generated_tokens += tokens
        member.tokens_unsaid = tokens
        if self.moving or len(self.queue):
            self.pump()

    def _first_of(self, flight: Flight, member: Member, output: Output, now: float) -> None:
        """The first token of an attempt."""
        flight.heard = True
        flight.barren = 0
        member.breaker.worked(flight.attempt)
        self.chooser.first_token(flight.route.id, member.name, now)
        outcome = flight.outcome
        if outcome.first_token is None:
            outcome.first_token = now
            outcome.num_cached = output.num_cached

    def _report(self, member: Member, now: float) -> None:
        if member.state in ("suspect", "fenced"):
            self._on_event("endpoint_ready", member.name, f"moves again after {now - member.since:.1f} s")
            member.become("ready", now)
        if member.tokens_unsaid:
            self.chooser.progressed(member.name, member.tokens_unsaid, now)
            member.tokens_unsaid = 0
        if self._interval is None or now - member.reported_at < self._interval:
            return
        member.reported_at = now
        load = member.replica.core.load()
        report = EndpointReport(at=now, load=load, steps=load.steps)
        if self._delay:
            self.clock.at(now + self._delay, lambda: self.chooser.reported(member.name, report, self.clock.now))
        else:
            self.chooser.reported(member.name, report, now)

    # --- watching ---------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Several times a second."""
        now = self.clock.now
        stall = self.rules.health.stall_seconds
        for member in list(self.members.values()):
            # The least that an endpoint with work is given; how patient one is takes longer to compute.
            if self.rules.watch and member.attempts and now - member.watch.progress_at > stall:
                self._watch(member, now)
            elif member.state == "fenced" and now - member.since > self.rules.hung_seconds:
                self.restart(member)
        self._expire(now)
        self.pump()

    def _watch(self, member: Member, now: float) -> None:
        silence = member.watch.silence(now)
        if member.state not in ("ready", "suspect"):
            return
        others = any(other.state == "ready" and other is not member for other in self.members.values())
        if member.watch.is_hung(now) and others:
            member.become("fenced", now)
            message = f"no step for {silence:.1f} s; others go on with its work"
            self._on_event("endpoint_hung", member.name, message)
            self.move_all(member, "hung", f"no step for {silence:.1f} s")
        elif silence > self.rules.hung_seconds:
            self.restart(member)
        elif member.state == "ready" and member.watch.is_suspect(now):
            member.become("suspect", now)

    def _expire(self, now: float) -> None:
        """End what has waited too long for an endpoint."""
        waiting = list(self.moving)
        if not any(member.state == "ready" for member in self.members.values()):
            waiting = [flight for flight in self.flights.values() if flight.member is None]
        for flight in waiting:
            if self.rules.watch and now - flight.waiting_since > self.rules.wait_seconds:
                self._end(flight, "failed", "no endpoint was available")
