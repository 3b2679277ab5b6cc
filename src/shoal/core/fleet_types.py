"""What router, health, admission and the fleet's driver say to each other, and what people are shown of a fleet.

Times are seconds of one monotonic clock, passed in by the driver; lengths count tokens.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal.core.types import EngineLoad

EndpointKind = Literal["shoal", "openai"]
EndpointState = Literal["starting", "ready", "suspect", "fenced", "draining", "down"]
"""starting: not yet of use · ready · suspect: has work and makes no step, gets nothing new · fenced: what it had was
moved, what it says of it is dropped; ready again once it makes a step · draining: gets nothing new, and is removed or
stopped once what it has is done or moved · down: its process or its connections are gone."""
FailureKind = Literal["lost", "refused", "overloaded", "hung", "error", "drained"]
"""lost: process or connection gone · refused: it cannot be connected to · overloaded: 429 or 503 of its own · hung: no
progress · error: it answered 5xx · drained: it is taken away. A client's mistake (4xx) is none of these: it is the
answer."""


class RouteRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a router knows of a request that needs an endpoint, for the first time or because it lost the one it had."""

    id: str
    num_prompt: int
    """Tokens to prefill: the prompt, and what was generated before a move."""
    num_output: int
    """Tokens still to come at most, over all its sequences."""
    blocks: tuple[bytes, ...] = ()
    """Chained hashes (core/hashing.py, the tenant's salt in them) of the prompt's full blocks, first block first."""
    session: str = ""
    """Requests of one conversation carry the same; empty is none."""
    tenant: str = ""
    priority: int = 0
    deadline: float | None = None
    avoid: tuple[str, ...] = ()
    """Endpoints that failed it already: taken only where there is no other."""


class EndpointReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an endpoint said of itself, or what was seen of it, at one moment. Any field may be missing or late."""

    at: float
    load: EngineLoad | None = None
    """Of a shoal engine, with every step."""
    num_running: int | None = None
    num_waiting: int | None = None
    kv_usage: float | None = None
    """Share of KV blocks in use, 0 to 1."""
    steps: int | None = None
    """Forward passes since its start: that this grows is what proves progress."""


class EndpointFailure(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt at an endpoint ended without the request's end. Arrives where an output would."""

    kind: FailureKind
    message: str
    retry_after: float | None = None
    """Seconds, where the endpoint said so."""


# --- what people see ------------------------------------------------------------------------------------------------


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of the last minutes; None while there is nothing to tell."""

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    count: int = 0


class EndpointStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    kind: EndpointKind
    address: str
    """URL of an OpenAI endpoint, "pid 123" of an engine that the fleet started."""
    state: EndpointState
    reason: str | None = None
    """Why it is not ready."""
    layout: str = ""
    dtype: str = ""
    epoch: int = 0
    """Grows with every fencing and every restart."""
    restarts: int = 0
    spare: bool = False
    """A warm spare: loaded, gets requests only once another endpoint is lost."""
    requests: int = 0
    """Of this gateway, under way there."""
    tokens: int = 0
    """Still to be prefilled or generated for them, as estimated."""
    num_running: int | None = None
    num_waiting: int | None = None
    kv_usage: float | None = None
    step_age: float | None = None
    """Seconds since its last sign of progress."""
    median_step: float | None = None
    prefill_speed: float | None = None
    """Tokens a second, as learned."""
    decode_seconds: float | None = None
    """Between two tokens of a sequence, as learned."""
    breaker: Literal["closed", "open", "half_open"] = "closed"
    completed: int = 0
    failures: int = 0


class SpareCapacity(msgspec.Struct, frozen=True, kw_only=True):
    """Whether what is left after the loss of the largest endpoint carries the present load."""

    ok: bool
    short_by: float = 0.0
    """Tokens a second that would be missing."""
    largest: str = ""
    load: float = 0.0
    """Tokens a second at present."""
    capacity: float = 0.0
    """Tokens a second without the largest endpoint."""
    known: bool = True
    """False until speeds have been learned."""

    @property
    def label(self) -> str:
        if not self.known:
            return "unknown"
        return "ok" if self.ok else f"short by {self.short_by:.0f} tokens/s"


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    policy: str
    endpoints: list[EndpointStatus]
    running: int = 0
    """Requests under way at an endpoint."""
    waiting: int = 0
    """Requests queued in the gateway."""
    waiting_tokens: int = 0
    served_by: str = ""
    """Another model's name while requests are degraded to it."""
    n_plus_one: SpareCapacity = SpareCapacity(ok=False, known=False)
    ttft: Percentiles = Percentiles()
    itl: Percentiles = Percentiles()
    e2e: Percentiles = Percentiles()
    accepted: int = 0
    completed: int = 0
    failed: int = 0
    refused: int = 0
    migrations: int = 0
    """Requests moved to another endpoint after they had begun."""
    retries: int = 0
    """Requests sent anew before their first token."""
    hedges: int = 0
    degradations: int = 0
    generated_tokens: int = 0
    tokens_per_second: float = 0.0
    """Over the last ten seconds."""


class FleetEvent(msgspec.Struct, frozen=True, kw_only=True):
    """For people: what happened of late."""

    time: float
    """Unix seconds."""
    endpoint: str = ""
    """The one that it is about, if it is about one."""
    kind: str
    """endpoint_lost, endpoint_hung, endpoint_ready, migrated, degraded, restored, drained, added, removed, ..."""
    message: str


class FleetStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /fleet`: what `shoal fleet status` and the dashboard show."""

    version: str
    uptime: float
    draining: bool
    models: list[ModelStatus]
    events: list[FleetEvent] = []
    """The last ones, newest last."""
    audit: str = "off"
    """off, ok, or what is wrong with the log."""
    journal: str = "off"
