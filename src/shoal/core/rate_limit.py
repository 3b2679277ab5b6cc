"""What one tenant may use: requests and tokens a minute, and requests at once.

A request reserves its prompt and the output that is expected of it, and settles for what it used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

_MINUTE = 60.0
_CONCURRENCY_RETRY_AFTER = 1.0
"""When one of the tenant's requests ends is not known."""

LimitReason = Literal["requests_per_minute", "tokens_per_minute", "concurrent_requests"]


class TenantLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """None is no limit."""

    requests_per_minute: Annotated[float, Meta(gt=0.0)] | None = None
    tokens_per_minute: Annotated[float, Meta(gt=0.0)] | None = None
    concurrent_requests: Annotated[int, Meta(ge=1)] | None = None
    weight: Annotated[float, Meta(ge=0.01, le=100.0)] = 1.0
    """Share of a model's capacity under contention, beside the other tenants' weights."""
    top_priority: int = 0
    """The most urgent (lowest) priority that its requests may have; one that asks for more gets this. Without such a
    bound a tenant could go before all others."""

    def priority(self, asked: int) -> int:
        return max(asked, self.top_priority)


class Refusal(msgspec.Struct, frozen=True):
    """Nothing was reserved."""

    reason: LimitReason
    message: str
    retry_after: float
    """Seconds after which the same request would pass, if the tenant sends nothing else."""


class _Bucket:
    """Holds at most what flows in within a minute. May be overdrawn: by a request larger than the bucket, which passes
    when it is full, and by one that used more than it had reserved."""

    __slots__ = ("_rate", "_seen", "level")

    def __init__(self, per_minute: float, now: float) -> None:
        self._rate = per_minute / _MINUTE
        self._seen = now
        self.level = per_minute

    @property
    def size(self) -> float:
        return self._rate * _MINUTE

    def wait(self, amount: float, now: float) -> float:
        """Seconds until it holds `amount`, or is full."""
        self.fill(now)
        # A bucket is full, and an amount there, to within a rounding error of what flowed in.
        missing = min(amount, self.size) - self.level
        return missing / self._rate if missing > 1e-9 * self.size else 0.0

    def add(self, amount: float) -> None:
        self.level = min(self.size, self.level + amount)

    def fill(self, now: float) -> None:
        if now > self._seen:
            self.add((now - self._seen) * self._rate)
            self._seen = now


class _Usage:
    """Of one tenant."""

    __slots__ = ("limits", "requests", "running", "tokens")

    def __init__(self, limits: TenantLimits, now: float) -> None:
        self.limits = limits
        self.running = 0
        requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
        self.requests = None if requests is None else _Bucket(requests, now)
        self.tokens = None if tokens is None else _Bucket(tokens, now)


class RateLimiter:
    """Over all tenants of a gateway. Every request that passes `check` must be settled once, however it ends."""

    def __init__(self, limits: Mapping[str, TenantLimits], default: TenantLimits) -> None:
        self._limits = limits
        self._default = default
        self._usage: dict[str, _Usage] = {}

    def limits(self, tenant: str) -> TenantLimits:
        return self._limits.get(tenant, self._default)

    def running(self, tenant: str) -> int:
        """Requests that have passed and are not settled."""
        usage = self._usage.get(tenant)
        return usage.running if usage is not None else 0

    def check(self, tenant: str, tokens: int, now: float) -> Refusal | None:
        """Reserve one request and `tokens`, or nothing and say why not."""
        usage = self._usage.get(tenant)
        if usage is None:
            usage = self._usage[tenant] = _Usage(self.limits(tenant), now)
        limits = usage.limits
        if limits.concurrent_requests is not None and usage.running >= limits.concurrent_requests:
            message = f"{usage.running} requests of this tenant run already, and that is its limit"
            return Refusal("concurrent_requests", message, _CONCURRENCY_RETRY_AFTER)
        for_request = usage.requests.wait(1.0, now) if usage.requests is not None else 0.0
        for_tokens = usage.tokens.wait(tokens, now) if usage.tokens is not None else 0.0
        if for_tokens > for_request:
            message = f"{tokens} tokens exceed what is left of this tenant's {limits.tokens_per_minute:g} a minute"
            return Refusal("tokens_per_minute", message, for_tokens)
        if for_request > 0.0:
            message = f"this tenant's limit of {limits.requests_per_minute:g} requests a minute is used up"
            return Refusal("requests_per_minute", message, for_request)
        if usage.requests is not None:
            usage.requests.level -= 1.0
        if usage.tokens is not None:
            usage.tokens.level -= tokens
        usage.running += 1
        return None

    def settle(self, tenant: str, reserved: int, used: int, now: float) -> None:
        """The request has ended, or was refused after it had passed here (`used` 0): it stays counted as a request, or
        those who retry at once would not be held back."""
        usage = self._usage[tenant]
        usage.running -= 1
        if usage.tokens is not None:
            usage.tokens.fill(now)
            usage.tokens.add(reserved - used)
