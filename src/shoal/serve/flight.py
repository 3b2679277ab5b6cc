"""One accepted request on its way: over one endpoint, or over several, one after the other.

It keeps what was delivered of each sequence, and that is all it takes: to go on elsewhere is to ask another endpoint
for the same request from there. A retry, a move, a hedge, a request that waited out a restart and one whose client came
back are that one thing, and differ in why it was done and how much had been delivered.

What an attempt says is heard only as long as it is the flight's own: an endpoint that wakes up after its work was given
to another talks to nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import msgspec

from shoal.core.engine_core import sequences_of
from shoal.core.failover import Trials
from shoal.core.fleet_types import EndpointFailure, RouteRequest
from shoal.core.types import Output, Rejected, Request
from shoal.serve.errors import ApiError

if TYPE_CHECKING:
    from shoal.serve.member import Member

    Ended = Callable[["Flight", "FlightAttempt", EndpointFailure | Rejected], None]


class Receiver(Protocol):
    """Who a request is generated for. Called on the event loop."""

    def output(self, output: Output) -> None:
        """Of one sequence, in order and each token once, its last one with `finish`; never `lost`."""

    def failed(self, error: ApiError) -> None:
        """Nothing more will come."""


class FlightObserver(Protocol):
    """What metrics, audit and traces hear of a flight."""

    def dispatched(self, flight: Flight, member: Member) -> None:
        """An endpoint was asked."""

    def heard(self, flight: Flight, member: Member) -> None:
        """The first token of an attempt came."""

    def left(self, flight: Flight, member: Member, reason: EndpointFailure | Rejected) -> None:
        """An attempt ended before the request did."""


class FlightAttempt:
    """One try at one endpoint."""

    __slots__ = ("began", "flight", "heard", "member", "num_tokens", "request")

    def __init__(self, flight: Flight, member: Member, request: Request, now: float) -> None:
        self.flight = flight
        self.member = member
        self.request = request
        self.began = now
        self.heard = False
        """Whether it has brought a token."""
        self.num_tokens = 0

    def output(self, output: Output) -> None:
        self.flight.output(self, output)

    def ended(self, reason: EndpointFailure | Rejected) -> None:
        self.flight.attempt_ended(self, reason)


class Flight:
    def __init__(
        self,
        request: Request,
        receiver: Receiver,
        *,
        attempt_numbers: Iterator[int],
        observer: FlightObserver | None,
        on_end: Callable[[Flight, FlightAttempt], None],
        on_failure: Ended,
        on_over: Callable[[Flight, ApiError | None], None],
        route: RouteRequest,
        arrived: float,
    ) -> None:
        self.request = request
        self.receiver = receiver
        self.route = route
        """As it was when it came; `route_now` is what is left of it."""
        self.arrived = arrived
        self.generated = {index: list(tokens) for index, tokens in sequences_of(request).items()}
        """Of each sequence that has not ended."""
        self.attempts: list[FlightAttempt] = []
        """Under way: none while it waits, two while the first token is hedged."""
        self.num_attempts = 0
        self.num_moves = 0
        """Attempts that others went on from after they had brought a token."""
        self.num_hedges = 0
        self.trials = Trials()
        self.num_delivered = 0
        self.num_cached = 0
        """As the first endpoint said: what later ones find in their caches is not the client's prompt alone."""
        self.first_token_at: float | None = None
        self.waiting_since = arrived
        self.is_over = False
        self._attempt_numbers = attempt_numbers
        self._observer = observer
        self._on_end = on_end
        self._on_failure = on_failure
        self._on_over = on_over

    @property
    def is_placed(self) -> bool:
        return bool(self.attempts)

    @property
    def was_placed(self) -> bool:
        return self.num_attempts > 0

    # --- towards endpoints ------------------------------------------------------------------------------------------

    def dispatch(self, member: Member, now: float) -> None:
        """Ask an endpoint for what is missing, beside the attempts that are under way."""
        self.num_attempts += 1
        # Also of a flight that takes up a request that was here before: what an engine says late is of another attempt.
        attempt_id = f"{self.request.id}.{next(self._attempt_numbers)}"
        whole = self.request.resume is None and len(self.generated) == self.request.n
        fresh = whole and not any(self.generated.values())
        request = msgspec.structs.replace(
            self.request,
            id=attempt_id,
            resume=None if fresh else {index: list(tokens) for index, tokens in self.generated.items()},
        )
        attempt = FlightAttempt(self, member, request, now)
        self.attempts.append(attempt)
        if self._observer is not None:
            self._observer.dispatched(self, member)
        member.submit(attempt, now)

    def route_now(self) -> RouteRequest:
        """What a router is to know of what is left."""
        longest = max((len(tokens) for tokens in self.generated.values()), default=0)
        left = sum(self.request.max_tokens - len(tokens) for tokens in self.generated.values())
        return msgspec.structs.replace(
            self.route, num_prompt=len(self.request.prompt) + longest, num_output=left, avoid=self.trials.avoid
        )

    def output(self, attempt: FlightAttempt, output: Output) -> None:
        if attempt not in self.attempts:
            return  # it was given up: another has its work
        if output.finish == "lost":
            # Its endpoint lives and starts new workers; the other sequences of this attempt were lost with it.
            message = output.error or "the workers were lost"
            self.attempt_ended(attempt, EndpointFailure(kind="lost", message=message), gone=False)
            return
        tokens = self.generated.get(output.index)
        if tokens is None:
            return  # stopped by the client's stop string a step ago
        now = 0.0
        if not attempt.heard and output.token_ids:
            now = time.monotonic()
            self._first_of(attempt, now)
        num_new = len(output.token_ids)
        tokens += output.token_ids
        attempt.num_tokens += num_new
        attempt.member.tokens += num_new
        self.num_delivered += num_new
        if self.num_moves == 0:
            self.num_cached = max(self.num_cached, output.num_cached)
        elif output.num_cached != self.num_cached:
            output = msgspec.structs.replace(output, num_cached=self.num_cached)
        if output.finish is not None:
            del self.generated[output.index]
            if not self.generated:
                self._end(attempt, None)  # first: the receiver may find that it has all and say so
        self.receiver.output(output)

    def _first_of(self, attempt: FlightAttempt, now: float) -> None:
        """The first token of an attempt: where two were under way, this one has it."""
        attempt.heard = True
        self.trials.barren = 0
        for other in [one for one in self.attempts if one is not attempt]:
            self._give_up(other)
        attempt.member.heard(attempt, now)
        if self.first_token_at is None:
            self.first_token_at = now
        if self._observer is not None:
            self._observer.heard(self, attempt.member)

    def attempt_ended(self, attempt: FlightAttempt, reason: EndpointFailure | Rejected, *, gone: bool = True) -> None:
        """`gone` is False where the endpoint still knows of the attempt."""
        if attempt not in self.attempts:
            return
        self.attempts.remove(attempt)
        if not gone:
            attempt.member.endpoint.abort(attempt.request.id)
        if attempt.heard:
            self.num_moves += 1
        if isinstance(reason, EndpointFailure):
            self.trials.failed_at(attempt.member.name, reason.kind, time.monotonic())
        else:
            self.trials.shun(attempt.member.name)
        if self._observer is not None:
            self._observer.left(self, attempt.member, reason)
        self._on_failure(self, attempt, reason)

    def finish_what_is_complete(self) -> None:
        """End sequences that had their last token before their endpoint could say so."""
        stops = self.request.stop_token_ids
        for index, tokens in list(self.generated.items()):
            stopped = bool(tokens) and len(tokens) > self.request.min_tokens and tokens[-1] in stops
            if stopped or len(tokens) >= self.request.max_tokens:
                del self.generated[index]
                self.receiver.output(
                    Output(
                        self.request.id,
                        index,
                        [],
                        finish="stop" if stopped else "length",
                        stop_token=tokens[-1] if stopped else None,
                        num_cached=self.num_cached,
                    )
                )

    # --- towards the client -----------------------------------------------------------------------------------------

    def abort(self, index: int | None = None) -> None:
        """End it, or one of its sequences: the client has what it wants, or has left."""
        if index is not None:
            self.generated.pop(index, None)
            if self.generated:
                for attempt in self.attempts:
                    attempt.member.endpoint.abort(attempt.request.id, index)
                return
        self.generated.clear()
        self._end(None, None)

    def fail(self, error: ApiError) -> None:
        if not self.is_over:
            self._end(None, error)
            self.receiver.failed(error)

    def end_overdue(self) -> None:
        """Its deadline has come while no endpoint had it: it ends with what it has."""
        left, self.generated = self.generated, {}
        for index in left:
            self.receiver.output(Output(self.request.id, index, [], finish="deadline", num_cached=self.num_cached))
        self._end(None, None)

    def _give_up(self, attempt: FlightAttempt) -> None:
        self.attempts.remove(attempt)
        attempt.member.endpoint.abort(attempt.request.id)
        attempt.member.ended(attempt, None)
        self._on_end(self, attempt)

    def _end(self, finished: FlightAttempt | None, error: ApiError | None) -> None:
        """Once. `finished` is the attempt whose endpoint knows already."""
        if self.is_over:
            return
        self.is_over = True
        if finished is not None:
            self.attempts.remove(finished)
            finished.member.completed_one(finished)
            self._on_end(self, finished)
        for attempt in list(self.attempts):
            self._give_up(attempt)
        self._on_over(self, error)
