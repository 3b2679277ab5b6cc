"""The catalogue: everything that an audit log can hold. Other fields and kinds than these are not written or read.

Times are Unix nanoseconds and durations whole milliseconds. Fields that have their default (empty, none, one sequence)
are left out of a record. A new kind is a new class here and, where it is worth a class of its own there, in `ocsf.py`.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

ContentPolicy = Literal["digest", "none", "full"]


class _Event(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="kind"
):
    pass


class _Caller(_Event, frozen=True, kw_only=True):
    request_id: str = ""
    tenant: str = ""
    key_id: str = ""
    """Which API key; the key itself is nowhere."""
    address: str = ""
    """Of the client, as the gateway's socket saw it."""


class _OfRequest(_Caller, frozen=True, kw_only=True):
    model: str
    """As the client asked for it."""
    route: str = ""
    """Path of the API."""
    prompt_tokens: int = 0
    prompt_digest: str = ""
    """SHA-256 of the prompt's token ids, 32 bits each, little-endian; hexadecimal."""
    prompt: list[int] | None = None
    """The token ids, only with `content: full`."""


class RequestAccepted(_OfRequest, frozen=True, kw_only=True, tag="request_accepted"):
    """The gateway has taken it. One without a later `request_completed` was under way when the gateway died."""

    stream: bool = False
    n: int = 1
    max_tokens: int = 0


class RequestCompleted(_OfRequest, frozen=True, kw_only=True, tag="request_completed"):
    """The end of a request, or its refusal: everything about it in one record."""

    status: int
    """HTTP status of the answer: 200, what it was refused with, or 499 where the client left."""
    refusal: str = ""
    """Why it was refused or failed."""
    served_model: str = ""
    """The model that answered: another than `model` where the request was degraded."""
    degradation: str = ""
    """Why a smaller model answered."""
    weights_digest: str = ""
    config_digest: str = ""
    """Of the deployment that it ran under."""
    endpoints: list[str] = []
    """Where it ran, in order."""
    retries: int = 0
    migrations: int = 0
    hedges: int = 0
    n: int = 1
    stream: bool = False
    parameters: dict[str, int | float | str | bool] = {}
    """Of sampling, those that the client set."""
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: list[str] = []
    """One a sequence."""
    ttft_ms: int | None = None
    duration_ms: int = 0
    outputs: list[list[int]] | None = None
    """Generated token ids of each sequence, only with `content: full`."""


class LimitHit(_Caller, frozen=True, kw_only=True, tag="limit_hit"):
    limit: str
    """Which one: requests_per_minute, tokens_per_minute, concurrency, queue, ..."""
    model: str = ""
    allowed: float = 0.0
    status: int
    retry_after_ms: int = 0


class AdminAction(_Caller, frozen=True, kw_only=True, tag="admin_action"):
    action: str
    """endpoint.add, endpoint.drain, endpoint.remove, key.create, key.rotate, key.revoke, config.reload, ..."""
    target: str = ""
    status: int
    detail: str = ""


class AuthenticationFailed(_Caller, frozen=True, kw_only=True, tag="authentication_failed"):
    """`tenant` and `key_id` are those of the key that was named, where it is known."""

    reason: str
    """As `Denied.reason` names it: missing, unknown, wrong_secret, expired, ..."""
    method: str = ""
    route: str = ""
    status: int


class EndpointLost(_Event, frozen=True, kw_only=True, tag="endpoint_lost"):
    endpoint: str
    model: str = ""
    reason: str = ""
    epoch: int = 0
    requests: int = 0
    """Under way there, and moved elsewhere."""


class EndpointRestored(_Event, frozen=True, kw_only=True, tag="endpoint_restored"):
    endpoint: str
    model: str = ""
    epoch: int = 0
    outage_ms: int = 0


class AuditGap(_Event, frozen=True, kw_only=True, tag="audit_gap"):
    """Logging failed. Written as soon as it works again."""

    reason: str
    lost: int = 0
    """Events that are in no record; 0 where all of them were written late."""
    since: int = 0
    until: int = 0


class LogStarted(_Event, frozen=True, kw_only=True, tag="log_started"):
    version: str = ""
    host: str = ""
    pid: int = 0
    config_digest: str = ""
    content: ContentPolicy
    fail_closed: bool
    chains: dict[str, int] = {}
    """The other chains of the directory, with how many records they had: that one of them is missing, or shorter by
    now, shows here."""


class LogStopped(_Event, frozen=True, kw_only=True, tag="log_stopped"):
    """An orderly end, the last record of its file: a checkpoint over it follows."""

    lost: int = 0
    """Events that this process could not record."""


Event = (
    RequestAccepted
    | RequestCompleted
    | LimitHit
    | AdminAction
    | AuthenticationFailed
    | EndpointLost
    | EndpointRestored
    | AuditGap
    | LogStarted
    | LogStopped
)


def prompt_digest(token_ids: Sequence[int]) -> str:
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return hashlib.sha256(packed.tobytes()).hexdigest()


def with_content(
    event: Event, policy: ContentPolicy, prompt: Sequence[int] | None, outputs: Sequence[Sequence[int]] | None
) -> Event:
    """The event with as much of what was said as the policy lets into the log."""
    if policy == "none" or not isinstance(event, RequestAccepted | RequestCompleted):
        return event
    fields: dict[str, Any] = {}
    if prompt is not None:
        fields["prompt_digest"] = prompt_digest(prompt)
        if policy == "full":
            fields["prompt"] = list(prompt)
    if policy == "full" and outputs is not None and isinstance(event, RequestCompleted):
        fields["outputs"] = [list(output) for output in outputs]
    return msgspec.structs.replace(event, **fields) if fields else event
