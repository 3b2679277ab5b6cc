"""One endpoint of a fleet, and what the fleet knows of it: state, epoch, what it has to do, how it moves."""

from __future__ import annotations

import time

from shoal.core.endpoint_condition import EndpointCondition
from shoal.core.engine_core import sequences_of
from shoal.core.fleet_types import EndpointFailure, EndpointReport, EndpointState, EndpointStatus
from shoal.core.health import HealthConfig
from shoal.core.router import Router
from shoal.core.types import Rejected
from shoal.serve.endpoint import Endpoint, EndpointInfo
from shoal.serve.flight import FlightAttempt

DEFAULT_SEQUENCES = 256
"""At once, at an endpoint that does not say how many: what other engines run by default."""


class Member(EndpointCondition):
    def __init__(self, endpoint: Endpoint, router: Router, health: HealthConfig, *, spare: bool = False) -> None:
        super().__init__(endpoint.name, health, time.monotonic(), spare=spare)
        self.endpoint = endpoint
        self.router = router
        self.info: EndpointInfo | None = None
        """Once it was started for the first time."""
        self.restarts = 0
        self.attempts: dict[str, FlightAttempt] = {}
        self.report: EndpointReport | None = None
        self.completed = 0
        self.failures = 0
        self.tokens = 0
        """That came from it, of whichever requests."""
        self.tokens_seen = 0
        """Of these, how many the router was told of."""

    def become(self, state: EndpointState, reason: str | None = None) -> None:
        self.enter(state, time.monotonic(), reason)

    def started(self, now: float) -> None:
        """The endpoint is of use, for the first time or anew."""
        self.info = info = self.endpoint.info
        self.router.add(
            self.name,
            max_sequences=info.max_sequences,
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            now=now,
        )
        self.tokens_seen = self.tokens
        self.report = None
        self.renewed(now)

    @property
    def most_sequences(self) -> int:
        return (self.info and self.info.max_sequences) or DEFAULT_SEQUENCES

    # --- attempts ---------------------------------------------------------------------------------------------------

    def submit(self, attempt: FlightAttempt, now: float) -> None:
        self.attempts[attempt.request.id] = attempt
        self.num_sequences += len(sequences_of(attempt.request))
        self.watch.working(True, now)
        self.breaker.sent(attempt.request.id)
        self.router.dispatched(attempt.flight.route_now(), self.name, now)
        self.endpoint.submit(attempt)

    def heard(self, attempt: FlightAttempt, now: float) -> None:
        """Its first token."""
        self.breaker.worked(attempt.request.id)
        self.router.first_token(attempt.flight.request.id, self.name, now)

    def completed_one(self, attempt: FlightAttempt) -> None:
        """It brought a request to its end."""
        self.completed += 1
        self.ended(attempt, None, whole=True)

    def ended(self, attempt: FlightAttempt, reason: EndpointFailure | Rejected | None, *, whole: bool = False) -> None:
        """Whatever the reason; None if the endpoint is not to blame."""
        if self.attempts.pop(attempt.request.id, None) is None:
            return
        now = time.monotonic()
        self.num_sequences -= len(sequences_of(attempt.request))
        self.watch.working(bool(self.attempts), now)
        self.router.finished(attempt.flight.request.id, self.name, attempt.num_tokens, now, ok=whole)
        if isinstance(reason, EndpointFailure):
            self.failures += reason.kind != "drained"
            self.breaker.failed(attempt.request.id, reason.kind, now, reason.retry_after)
        elif isinstance(reason, Rejected):
            self.breaker.worked(attempt.request.id)
        else:
            self.breaker.ended(attempt.request.id)

    def reported(self, report: EndpointReport) -> bool:
        """Whether it shows that the endpoint moves."""
        before, self.report = self.report, report
        stepped = report.steps is not None and (before is None or before.steps is None or report.steps > before.steps)
        if stepped:
            self.watch.stepped(report.at)
        else:
            self.watch.alive(report.at)
        if self.tokens > self.tokens_seen:
            self.router.progressed(self.name, self.tokens - self.tokens_seen, report.at)
            self.tokens_seen = self.tokens
        self.router.reported(self.name, report, report.at)
        return stepped or not self.attempts

    def status(self, now: float) -> EndpointStatus:
        report = self.report
        speed = self.router.speed(self.name, now)
        if speed is not None and not speed.known:
            speed = None
        return EndpointStatus(
            name=self.name,
            kind=self.endpoint.kind,
            address=self.endpoint.address,
            state="draining" if self.draining and self.state != "down" else self.state,
            reason=self.reason,
            layout="" if self.info is None else self.info.layout,
            dtype="" if self.info is None else self.info.dtype,
            epoch=self.epoch,
            restarts=self.restarts,
            spare=self.spare,
            requests=len(self.attempts),
            tokens=int(self.router.outstanding(self.name)),
            prefill_speed=None if speed is None else speed.prefill,
            decode_seconds=None if speed is None else speed.decode_seconds,
            num_running=None if report is None else report.num_running,
            num_waiting=None if report is None else report.num_waiting,
            kv_usage=None if report is None else report.kv_usage,
            step_age=self.watch.silence(now),
            median_step=self.watch.median_step,
            breaker=self.breaker.state,
            completed=self.completed,
            failures=self.failures,
        )
