"""The retry budget, against a driver that retries whenever it may."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.core.retry_budget import RetryBudget


def test_a_storm_of_failures_is_amplified_by_a_fifth_at_most() -> None:
    budget = RetryBudget(ratio=0.2, floor=3.0, window_seconds=10.0)
    sent, asked = 0, 0
    for number in range(60_000):
        now = number / 1000
        budget.request(now)
        for _ in range(5):  # every attempt fails, and each is tried five times more
            asked += 1
            if not budget.retry(now):
                break
            sent += 1
    assert asked > 60_000, "the storm did happen"
    assert 0.19 * 60_000 <= sent <= 0.2 * 60_000 + 3.0 * 7


def test_few_requests_may_retry() -> None:
    budget = RetryBudget(floor=3.0)
    budget.request(0.0)
    assert [budget.retry(0.0) for _ in range(4)] == [True, True, True, False]


def test_a_quiet_hour_saves_up_nothing() -> None:
    budget = RetryBudget(floor=1.0)
    for second in range(1000):
        budget.request(float(second))
    assert sum(budget.retry(5000.0) for _ in range(100)) == 1


@given(st.lists(st.tuples(st.floats(0.0, 5.0), st.booleans()), max_size=200))
def test_retries_never_exceed_the_floor_and_the_share_within_a_window(events: list[tuple[float, bool]]) -> None:
    budget = RetryBudget(ratio=0.2, floor=2.0, window_seconds=10.0)
    now, requests, granted = 0.0, 0, [0.0][:0]
    for seconds, is_request in events:
        now += seconds
        if is_request:
            requests += 1
            budget.request(now)
        elif budget.retry(now):
            granted.append(now)
        # Within a tenth of the window hardly anything fades.
        recent = sum(at > now - 1.0 for at in granted)
        assert recent <= (2.0 + 0.2 * requests) * 1.11 + 1e-9
