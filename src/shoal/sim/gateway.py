"""The gateway over simulated engines: what serves live decides, and calls and events take the place of sockets.

`core.dispatch` says which request goes where next, `core.failover` what becomes of one that lost its endpoint,
`core.endpoint_condition` which endpoints may get some: they are the objects that `serve.pool` and `serve.fleet` hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Protocol

import msgspec

from shoal.core.admission import AdmissionConfig, QueuedRequest
from shoal.core.dispatch import Dispatch
from shoal.core.failover import FailoverConfig
from shoal.core.fleet_types import EndpointFailure, EndpointReport, RouteRequest
from shoal.core.health import HealthConfig
from shoal.core.retry_budget import RetryBudget
from shoal.core.types import Output
from shoal.sim.clock import Clock
from shoal.sim.flight import Flight, Member
from shoal.sim.replica import Replica
from shoal.sim.requests import Status

TICK_SECONDS = 0.1


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """How a gateway treats requests and endpoints: what a deployment says of it."""

    admission: AdmissionConfig = AdmissionConfig()
    health: HealthConfig = HealthConfig()
    failover: FailoverConfig = FailoverConfig()
    retry_ratio: float = 0.2
    hung_seconds: float = 30.0
    """An engine that was fenced for so long is started anew."""
    queue: bool = True
    """Requests beyond what endpoints run wait in the gateway. Else all are sent at once."""
    watch: bool = True
    """Endpoints that make no step are fenced, and what they have goes on elsewhere."""


OPEN = Rules(
    admission=AdmissionConfig(max_requests=1 << 60, max_tokens=1 << 60, max_wait_seconds=inf),
    failover=FailoverConfig(wait_seconds=inf),
    queue=False,
    watch=False,
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
        restart: Callable[[Member, str], None],
    ) -> None:
        """`on_gap` hears of the seconds between two tokens of a sequence, and of how many sequences; `on_event` of
        what happens to endpoints: kind, endpoint, message. `restart` is asked for an engine that hangs for too long,
        and why. Reports come with steps, at most one an interval."""
        self.chooser = chooser
        self.rules = rules
        self.clock = clock
        self.dispatch: Dispatch[Flight, Member] = Dispatch(
            chooser, rules.admission, rules.failover, RetryBudget(ratio=rules.retry_ratio), self._send
        )
        self.members = self.dispatch.members
        self.flights = self.dispatch.flights
        """All that have not ended."""
        self.generated_tokens = 0
        self.last_end = 0.0
        """When a request last ended, in whatever way."""
        self._interval = report_interval
        self._delay = report_delay
        self._on_gap = on_gap
        self._on_event = on_event
        self._restart = restart
        self._pump_is_due = False

    # --- endpoints --------------------------------------------------------------------------------------------------

    def started(self, member: Member) -> None:
        """The endpoint is of use, for the first time or anew."""
        now, config = self.clock.now, member.replica.config
        self.members[member.name] = member
        self.chooser.add(member.name, config.max_sequences, config.num_blocks, config.block_size, now)
        member.tokens_unsaid = 0
        member.renewed(now)
        self.pump()

    def gone(self, member: Member, reason: str) -> None:
        """Its process died."""
        member.enter("down", self.clock.now, reason)
        self._on_event("endpoint_lost", member.name, reason)
        self.move_all(member, EndpointFailure(kind="lost", message=reason))

    def remove(self, member: Member, reason: str) -> None:
        """At once: what it has is moved."""
        member.enter("down", self.clock.now, reason)
        del self.members[member.name]
        self.move_all(member, EndpointFailure(kind="drained", message=reason))
        self.chooser.remove(member.name)
        self._on_event("removed", member.name, reason)

    def move_all(self, member: Member, failure: EndpointFailure) -> None:
        for flight in list(member.attempts.values()):
            member.replica.abort(flight.attempt)
            self._attempt_failed(flight, failure)

    def lost_sequences(self, member: Member, outputs: list[Output]) -> None:
        """Its workers failed, and with them what ran; it lives and starts new ones."""
        for output in outputs:
            failure = EndpointFailure(kind="lost", message=output.error or "the workers were lost")
            self._attempt_failed(member.attempts[output.request_id], failure)

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(self, flight: Flight) -> None:
        now, route = self.clock.now, flight.route
        tokens = max(1, route.num_prompt + route.num_output)
        refused = self.dispatch.offer(flight, QueuedRequest(id=route.id, tokens=tokens, arrived=now), now)
        if refused is not None:
            self._end(flight, "rejected", refused.message)
            return
        self.pump()

    def pump(self) -> None:
        """Place what waits, as far as there is room."""
        self._pump_is_due = False
        if self.dispatch.num_waiting:
            self.dispatch.pump(self.clock.now)

    def pump_soon(self) -> None:
        """Once what happens now was taken in."""
        if not self._pump_is_due:
            self._pump_is_due = True
            self.clock.at(self.clock.now, self.pump)

    def _send(self, flight: Flight, member: Member, now: float) -> None:
        question = flight.route_now()
        request = flight.request_now()
        flight.member, flight.outcome.endpoint = member, member.name
        member.attempts[request.id] = flight
        member.num_sequences += 1
        member.watch.working(True, now)
        member.breaker.sent(request.id)
        self.chooser.dispatched(question, member.name, now)
        rejected = member.replica.add(request)
        if rejected is None:
            return
        if rejected.retryable:
            self._attempt_failed(flight, EndpointFailure(kind="overloaded", message=rejected.reason))
            return
        self._leave(flight, member)
        member.breaker.worked(request.id)
        self._end(flight, "rejected", rejected.reason)

    def _leave(self, flight: Flight, member: Member, *, whole: bool = False) -> None:
        del member.attempts[flight.attempt]
        member.num_sequences -= 1
        now = self.clock.now
        member.watch.working(bool(member.attempts), now)
        self.chooser.finished(flight.route.id, member.name, flight.delivered - flight.began, now, whole)
        flight.member = None

    def _end(self, flight: Flight, status: Status, reason: str = "") -> None:
        outcome = flight.outcome
        outcome.status, outcome.reason, outcome.generated = status, reason, flight.delivered
        self.last_end = self.clock.now
        self.dispatch.over(flight.route.id)

    def _attempt_failed(self, flight: Flight, reason: EndpointFailure) -> None:
        """It goes on elsewhere, unless it has failed too often."""
        member, now = flight.member, self.clock.now
        if member is None:
            return
        attempt, heard = flight.attempt, flight.heard
        self._leave(flight, member)
        member.breaker.failed(attempt, reason.kind, now)
        flight.trials.failed_at(member.name, reason.kind, now)
        given_up = self.dispatch.failed(flight, reason, heard=heard, now=now)
        if given_up is not None:
            self._end(flight, "failed", given_up.message)
        elif heard:
            flight.outcome.moves += 1
        else:
            flight.outcome.retries += 1
        self.pump_soon()

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
        usual = ended = 0
        for output in outputs:
            flight = attempts[output.request_id]
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
                ended += 1
                self._leave(flight, member, whole=True)
                flight.outcome.end = now
                self._end(flight, "done")
        if usual:
            self._on_gap(now - before, usual)
        self.generated_tokens += len(outputs)
        member.tokens_unsaid = len(outputs)
        if ended:
            self.pump()

    def _first_of(self, flight: Flight, member: Member, output: Output, now: float) -> None:
        """The first token of an attempt."""
        flight.heard = True
        flight.trials.barren = 0
        member.breaker.worked(flight.attempt)
        self.chooser.first_token(flight.route.id, member.name, now)
        outcome = flight.outcome
        if outcome.first_token is None:
            outcome.first_token = now
            outcome.num_cached = output.num_cached

    def _report(self, member: Member, now: float) -> None:
        if member.state in ("suspect", "fenced"):
            self._on_event("endpoint_ready", member.name, f"moves again after {now - member.since:.1f} s")
            member.enter("ready", now)
            self.pump_soon()
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
        if self.rules.watch:
            # The least that an endpoint is given; how patient one is takes longer to compute. One that has nothing to
            # do says that it is there, unless it hangs.
            stall = self.rules.health.stall_seconds
            for member in list(self.members.values()):
                silent = now - member.watch.progress_at > stall and (member.attempts or member.replica.is_frozen)
                if silent or member.state == "fenced":
                    self._watch(member, now)
        for flight in self.dispatch.abandoned(now):
            self._end(flight, "failed", "no endpoint was available")
        self.pump()

    def _watch(self, member: Member, now: float) -> None:
        judgement = member.judge(
            now,
            others=any(other.state == "ready" and other is not member for other in self.members.values()),
            hung_seconds=self.rules.hung_seconds,
            restartable=True,
        )
        if judgement is None:
            return
        reason = judgement.reason or ""
        if judgement.state == "down":
            self._restart(member, reason)
            return
        member.enter(judgement.state, now, reason)
        if judgement.state == "fenced":
            self._on_event("endpoint_hung", member.name, f"{reason}; others go on with its work")
            self.move_all(member, EndpointFailure(kind="hung", message=reason))
