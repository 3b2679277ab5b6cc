"""Limits of tenants: nothing above the rate, nothing lost, and Retry-After tells the truth."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.core.rate_limit import RateLimiter, Refusal, TenantLimits


def limiter(**limits: object) -> RateLimiter:
    return RateLimiter({"acme": msgspec.convert(limits, TenantLimits)}, TenantLimits())


def refusal(answer: Refusal | None) -> Refusal:
    assert answer is not None
    return answer


def test_without_limits_everything_passes() -> None:
    limits = limiter()
    assert all(limits.check("acme", 10**9, 0.0) is None for _ in range(100))
    assert limits.running("acme") == 100


def test_requests_per_minute() -> None:
    limits = limiter(requests_per_minute=60)
    assert [limits.check("acme", 1, 0.0) is None for _ in range(61)] == [True] * 60 + [False]
    refused = refusal(limits.check("acme", 1, 0.0))
    assert (refused.reason, refused.retry_after) == ("requests_per_minute", pytest.approx(1.0))
    assert limits.check("other", 1, 0.0) is None
    assert limits.check("acme", 1, 1.0) is None
    assert limits.check("acme", 1, 1.0) is not None


def test_tokens_are_reserved_and_settled() -> None:
    limits = limiter(tokens_per_minute=600)
    assert limits.check("acme", 500, 0.0) is None
    refused = refusal(limits.check("acme", 200, 0.0))
    assert (refused.reason, refused.retry_after) == ("tokens_per_minute", pytest.approx(10.0))
    limits.settle("acme", 500, 100, 0.0)
    assert limits.check("acme", 500, 0.0) is None
    # One that used more than it had reserved is paid for by the next.
    limits.settle("acme", 500, 560, 0.0)
    assert refusal(limits.check("acme", 1, 0.0)).retry_after == pytest.approx(6.1)


def test_a_request_larger_than_the_minute_passes_once_the_bucket_is_full_and_is_paid_off() -> None:
    limits = limiter(tokens_per_minute=600)
    assert limits.check("acme", 1200, 0.0) is None
    assert refusal(limits.check("acme", 1200, 0.0)).retry_after == pytest.approx(120.0)
    assert limits.check("acme", 1200, 119.0) is not None
    assert limits.check("acme", 1200, 120.0) is None


def test_concurrent_requests() -> None:
    limits = limiter(concurrent_requests=2)
    assert [limits.check("acme", 1, 0.0) is None for _ in range(3)] == [True, True, False]
    assert refusal(limits.check("acme", 1, 0.0)).reason == "concurrent_requests"
    limits.settle("acme", 1, 1, 0.0)
    assert limits.check("acme", 1, 0.0) is None
    assert limits.running("acme") == 2


def test_a_refusal_reserves_nothing() -> None:
    """One limit has room and the other has not: the first must not be charged."""
    limits = limiter(requests_per_minute=2, tokens_per_minute=100)
    assert limits.check("acme", 100, 0.0) is None
    for _ in range(10):
        assert refusal(limits.check("acme", 100, 0.0)).reason == "tokens_per_minute"
    limits.settle("acme", 100, 0, 0.0)
    assert limits.check("acme", 100, 0.0) is None


def test_priority_is_bounded_by_the_tenants_own() -> None:
    assert [TenantLimits().priority(asked) for asked in (-5, 0, 5)] == [0, 0, 5]
    assert [TenantLimits(top_priority=-2).priority(asked) for asked in (-5, 0)] == [-2, 0]


@pytest.mark.parametrize("wrong", [{"requests_per_minute": 0}, {"concurrent_requests": 0}, {"weight": 0}])
def test_a_limit_that_lets_nothing_through_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, TenantLimits)


@given(
    per_minute=st.floats(0.5, 1e6),
    costs=st.lists(st.integers(1, 10**6), min_size=1, max_size=20),
    later=st.floats(0.0, 1e6),
)
def test_after_retry_after_it_passes(per_minute: float, costs: list[int], later: float) -> None:
    limits = limiter(tokens_per_minute=per_minute, requests_per_minute=per_minute)
    now = later
    for cost in costs:
        refused = limits.check("acme", cost, now)
        if refused is not None:
            now += refused.retry_after
            again = limits.check("acme", cost, now)
            # The other limit may still hold it back, once; and a moment of 1e6 s is exact to a nanosecond only.
            if again is not None:
                now += again.retry_after + 1e-6
                assert limits.check("acme", cost, now) is None


class Tenant(RuleBasedStateMachine):
    LIMITS = TenantLimits(requests_per_minute=30, tokens_per_minute=600, concurrent_requests=4)
    LARGEST = 900

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.limiter = RateLimiter({}, self.LIMITS)
        self.running: list[int] = []
        self.passed: list[float] = []
        self.used = 0

    @rule(tokens=st.integers(1, LARGEST), seconds=st.floats(0.0, 30.0))
    def check(self, tokens: int, seconds: float) -> None:
        self.now += seconds
        if self.limiter.check("t", tokens, self.now) is None:
            self.running.append(tokens)
            self.passed.append(self.now)
            self.used += tokens

    @precondition(lambda self: self.running)
    @rule(data=st.data(), part=st.floats(0.0, 1.0))
    def settle(self, data: st.DataObject, part: float) -> None:
        reserved = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        used = int(reserved * part)
        self.limiter.settle("t", reserved, used, self.now)
        self.used += used - reserved

    @invariant()
    def limits_hold(self) -> None:
        assert self.limiter.running("t") == len(self.running) <= 4
        for start in self.passed:
            inside = [at for at in self.passed if at >= start]
            assert len(inside) <= 30 + (self.now - start) * 0.5 + 1 + 1e-6
        # Reservations of what runs count as used: at most a minute's tokens at once, the flow, and one large request.
        assert self.used <= 600 + self.now * 10 + self.LARGEST


Tenant.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestTenant = Tenant.TestCase
