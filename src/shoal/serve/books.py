"""What is kept of a request beside its answer: latencies and counts, its trace, its records in the audit log."""

from __future__ import annotations

import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from shoal.core.fleet_types import EndpointFailure, FleetEvent
from shoal.core.types import Rejected
from shoal.serve.audit.events import (
    AdminAction,
    AuthenticationFailed,
    EndpointLost,
    EndpointRestored,
    LimitHit,
    RequestAccepted,
    RequestCompleted,
)
from shoal.serve.audit.log import AuditLog
from shoal.serve.errors import ApiError
from shoal.serve.fleet_metrics import FleetMetrics
from shoal.serve.flight import Flight
from shoal.serve.generation import Job, Piece
from shoal.serve.member import Member
from shoal.serve.metrics import ServerMetrics
from shoal.serve.openai_format import Usage
from shoal.serve.tenants import Principal
from shoal.serve.tracing import RequestTrace, Tracer

LIMITS = (
    "requests_per_minute",
    "tokens_per_minute",
    "concurrent_requests",
    "queue_full",
    "tenant_share",
    "wait",
    "deadline",
)
"""Codes of refusals that are a limit's."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A request as it was accepted."""

    request_id: str
    route: str
    model: str
    """What the client asked for."""
    served_model: str
    address: str
    who: Principal
    stream: bool
    session: str = ""
    """Of one conversation, where the client says so."""
    arrived: float
    """Monotonic second."""
    traceparent: str = ""
    tracestate: str = ""


class Books:
    """Of one gateway."""

    def __init__(
        self, metrics: ServerMetrics, fleet: FleetMetrics, tracer: Tracer, audit: AuditLog | None, config_digest: str
    ) -> None:
        self.metrics = metrics
        self.fleet = fleet
        self.tracer = tracer
        self.audit = audit
        self.config_digest = config_digest
        self.weights_digests: dict[str, str] = {}
        """By model; of those that are known so far."""

    def open(self, asked: Asked, jobs: list[Job], usage: Usage) -> Book:
        return Book(self, asked, jobs, usage)

    def require_audit(self) -> None:
        """Raises ApiError where nothing may be done that is not written down."""
        if self.audit is not None and not self.audit.ready:
            raise ApiError(503, "the audit log cannot be written", code="audit_failed", retry_after=5.0)

    def refused(self, model: str, who: Principal | None, error: ApiError, request_id: str, route: str) -> None:
        """Before it was accepted."""
        tenant = "" if who is None else who.tenant
        key_id = "" if who is None else who.key_id
        self.fleet.refused(model, tenant, error.code or f"{error.status}")
        if self.audit is None:
            return
        if error.code in LIMITS:
            retry = int(1000 * (error.retry_after or 0.0))
            self.audit.record(
                LimitHit(
                    request_id=request_id,
                    tenant=tenant,
                    key_id=key_id,
                    limit=error.code or "",
                    model=model,
                    status=error.status,
                    retry_after_ms=retry,
                )
            )
        self.audit.record(
            RequestCompleted(
                request_id=request_id,
                tenant=tenant,
                key_id=key_id,
                model=model,
                route=route,
                status=error.status,
                refusal=error.code or "",
                config_digest=self.config_digest,
            )
        )

    def denied(self, error: Any, method: str, route: str, address: str) -> None:
        """Nobody, or not this one, may ask so."""
        if self.audit is not None and error.status in (401, 403):
            self.audit.record(
                AuthenticationFailed(
                    reason=error.reason,
                    key_id=error.key_id,
                    address=address,
                    method=method,
                    route=route,
                    status=error.status,
                )
            )

    def happened(self, event: FleetEvent) -> None:
        """In the fleet."""
        if self.audit is None or not event.endpoint:
            return
        if event.kind in ("endpoint_lost", "endpoint_hung"):
            self.audit.record(EndpointLost(endpoint=event.endpoint, reason=event.message))
        elif event.kind == "endpoint_ready":
            self.audit.record(EndpointRestored(endpoint=event.endpoint))

    def operated(self, who: Principal, action: str, target: str, status: int, detail: str = "") -> None:
        if self.audit is not None:
            self.audit.record(
                AdminAction(
                    tenant=who.tenant, key_id=who.key_id, action=action, target=target, status=status, detail=detail
                )
            )


class Book:
    """Of one request: hears of everything that happens to it (a FlightObserver), and closes once."""

    def __init__(self, books: Books, asked: Asked, jobs: list[Job], usage: Usage) -> None:
        self._books = books
        self._asked = asked
        self._jobs = jobs
        self._usage = usage
        self._flights: dict[str, Flight] = {}
        self._endpoints: list[str] = []
        self._ends: dict[int, str] = {}
        self._tokens: dict[int, int] = {}
        self._outputs: dict[int, list[int]] = {}
        self._ttft: float | None = None
        self._is_open = True
        num_prompt = sum(len(job.request.prompt) for job in jobs)
        self._num_choices = sum(job.request.n for job in jobs)
        self._timers = [books.metrics.timer(asked.arrived, len(job.request.prompt), job.request.n) for job in jobs]
        self._timer = books.fleet.timer(asked.model, asked.who.tenant, asked.arrived, num_prompt, self._num_choices)
        self._trace: RequestTrace = books.tracer.request(
            asked.route,
            traceparent=asked.traceparent,
            tracestate=asked.tracestate,
            model=asked.model,
            tenant=asked.who.tenant,
        )
        self._trace.queued()
        self._keeps_outputs = books.audit is not None and books.audit.config.content == "full"
        if books.audit is not None:
            books.audit.record(
                RequestAccepted(
                    **self._caller(),
                    model=asked.model,
                    route=asked.route,
                    prompt_tokens=num_prompt,
                    stream=asked.stream,
                    n=jobs[0].request.n,
                    max_tokens=jobs[0].request.max_tokens,
                ),
                prompt=jobs[0].request.prompt,
            )

    @property
    def session(self) -> str:
        return self._asked.session

    def discard(self) -> None:
        """It was refused after all, which is told elsewhere."""
        self._is_open = False
        for timer in self._timers:
            timer.abandon()
        self._timer.abandon()

    def _caller(self) -> dict[str, Any]:
        who = self._asked.who
        return {
            "request_id": self._asked.request_id,
            "tenant": who.tenant,
            "key_id": who.key_id,
            "address": self._asked.address,
        }

    # --- FlightObserver ---------------------------------------------------------------------------------------------

    def dispatched(self, flight: Flight, member: Member) -> None:
        self._flights[flight.request.id] = flight
        if not self._endpoints or self._endpoints[-1] != member.name:
            self._endpoints.append(member.name)
        self._trace.routing()
        self._trace.dispatched(member.name)

    def heard(self, flight: Flight, member: Member) -> None:
        self._trace.tokens(member.name)

    def left(self, flight: Flight, member: Member, reason: EndpointFailure | Rejected) -> None:
        why = reason.kind if isinstance(reason, EndpointFailure) else "rejected"
        self._trace.moved(member.name, why, flight.num_delivered)

    # --- what the client gets ---------------------------------------------------------------------------------------

    def piece(self, job: int, choice: int, piece: Piece) -> None:
        self._timers[job].observe(piece)
        count = len(piece.token_ids)
        before = self._tokens.get(choice, 0)
        self._tokens[choice] = before + count
        if self._keeps_outputs:
            self._outputs.setdefault(choice, []).extend(piece.token_ids)
        if not before and count:
            now = time.monotonic()
            self._timer.first_token(now, choice, count)
            if self._ttft is None:
                self._ttft = now - self._asked.arrived
        if piece.finish is not None:
            self._ends[choice] = piece.finish
            self._timer.finished(time.monotonic(), piece.finish, before + count, choice)

    def close(self, error: ApiError | None) -> None:
        """It has ended, or its client is gone."""
        if not self._is_open:
            return
        self._is_open = False
        if error is not None:
            for timer in self._timers:
                timer.abandon()
            self._timer.abandon()
        if error is None or error.status == 499:
            end = "abort" if error is not None else self._ends.get(0, "stop")
            self._trace.ended(end, self._usage.completion)  # type: ignore[arg-type]
        else:
            self._trace.refused(error.status, error.message)
        if self._books.audit is not None:
            self._record(self._books.audit, error)

    def _record(self, audit: AuditLog, error: ApiError | None) -> None:
        asked, flights = self._asked, list(self._flights.values())
        degraded = asked.served_model != asked.model
        outputs = [self._outputs.get(choice, []) for choice in range(self._num_choices)]
        request = self._jobs[0].request
        audit.record(
            RequestCompleted(
                **self._caller(),
                model=asked.model,
                served_model=asked.served_model,
                degradation=f"served by {asked.served_model}" if degraded else "",
                route=asked.route,
                prompt_tokens=self._usage.prompt,
                status=200 if error is None else error.status,
                refusal="" if error is None else error.code or "",
                weights_digest=self._books.weights_digests.get(asked.served_model, ""),
                config_digest=self._books.config_digest,
                endpoints=self._endpoints,
                retries=sum(flight.trials.retries for flight in flights),
                migrations=sum(flight.num_moves for flight in flights),
                hedges=sum(flight.num_hedges for flight in flights),
                n=request.n,
                stream=asked.stream,
                parameters={"temperature": request.sampling.temperature, "max_tokens": request.max_tokens},
                cached_tokens=self._usage.cached,
                completion_tokens=self._usage.completion,
                finish_reasons=[self._ends[choice] for choice in sorted(self._ends)],
                ttft_ms=None if self._ttft is None else int(1000 * self._ttft),
                duration_ms=int(1000 * (time.monotonic() - asked.arrived)),
            ),
            prompt=request.prompt,
            outputs=outputs if self._keeps_outputs else None,
        )


def digest_of_files(path: Path, stopped: Callable[[], bool]) -> str:
    """SHA-256 over the weights of a checkpoint, file after file in the order of their names. Takes seconds a gigabyte:
    for a thread."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.gguf"))
    digest = sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 20):
                if stopped():
                    return ""
                digest.update(chunk)
    return digest.hexdigest() if files else ""
