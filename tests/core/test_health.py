"""Progress and breakers, with a clock that the test turns."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.core.health import CircuitBreaker, HealthConfig, ProgressWatch

CONFIG = HealthConfig(stall_seconds=2.0, stall_steps=20.0, fence_seconds=0.5, breaker_failures=3, breaker_seconds=2.0)
NEW = 30.0
"""Patience with one of which nothing is known."""


def test_with_work_and_no_step_it_becomes_suspect_and_then_hung() -> None:
    watch = ProgressWatch(CONFIG, 100.0)
    watch.working(True, 100.0)
    for step in range(10):
        watch.stepped(100.0 + 0.01 * step)
    assert not watch.is_suspect(102.0)
    assert watch.is_suspect(102.2) and not watch.is_hung(102.5)
    assert watch.is_hung(102.7)
    watch.stepped(102.8)
    assert not watch.is_suspect(102.9)


def test_long_steps_are_given_longer() -> None:
    watch = ProgressWatch(CONFIG, 0.0)
    watch.working(True, 0.0)
    for step in range(1, 6):
        watch.stepped(0.5 * step)
    assert watch.median_step == 0.5
    assert not watch.is_suspect(2.5 + 9.9)
    assert watch.is_suspect(2.5 + 10.1)


def test_a_long_step_among_short_ones_is_not_a_hang() -> None:
    watch = ProgressWatch(CONFIG, 0.0)
    watch.working(True, 0.0)
    watch.stepped(1.5)  # a chunk of a prompt
    for step in range(1, 20):
        watch.stepped(1.5 + 0.01 * step)
    last = watch.progress_at
    assert not watch.is_suspect(last + 4.4)
    assert watch.is_suspect(last + 4.6)


def test_of_a_new_one_nothing_is_known() -> None:
    watch = ProgressWatch(CONFIG, 0.0)
    watch.working(True, 0.0)
    assert not watch.is_suspect(NEW - 0.1)
    assert watch.is_suspect(NEW + 0.1)


def test_signs_of_life_do_not_hide_a_hang() -> None:
    """A process whose steps hang may still send heartbeats."""
    watch = ProgressWatch(CONFIG, 0.0)
    watch.working(True, 0.0)
    watch.stepped(0.01)
    for tenth in range(30):
        watch.alive(tenth / 10)
    assert watch.is_suspect(2.9)
    idle = ProgressWatch(CONFIG, 0.0)
    for tenth in range(30):
        idle.alive(tenth / 10)
    assert not idle.is_suspect(7.8)
    assert idle.is_suspect(8.0)


def test_time_without_work_is_not_counted() -> None:
    watch = ProgressWatch(CONFIG, 0.0)
    watch.working(True, 0.0)
    watch.stepped(0.1)
    watch.working(False, 0.1)
    watch.working(True, 4.0)
    assert not watch.is_suspect(5.9)
    watch.stepped(4.1)
    assert watch.median_step is not None and watch.median_step < 0.2


def test_a_breaker_opens_after_failures_in_a_row_and_tries_one_request() -> None:
    breaker = CircuitBreaker(CONFIG)
    for number in range(2):
        breaker.failed(f"a{number}", "error", 0.0)
    breaker.worked("b")
    for number in range(3):
        assert breaker.allows(1.0)
        breaker.failed(f"c{number}", "error", 1.0)
    assert not breaker.allows(2.9)
    assert breaker.allows(3.0)
    breaker.sent("try")
    assert not breaker.allows(3.0), "one at a time"
    breaker.failed("try", "error", 3.5)
    assert not breaker.allows(7.4), "twice as long"
    assert breaker.allows(7.5)
    breaker.sent("again")
    breaker.worked("again")
    assert breaker.state == "closed" and breaker.allows(7.6)


def test_a_try_that_the_client_gave_up_lets_another_be_made() -> None:
    breaker = CircuitBreaker(CONFIG)
    for number in range(3):
        breaker.failed(f"a{number}", "refused", 0.0)
    assert breaker.allows(2.0)
    breaker.sent("left")
    breaker.ended("left")
    assert breaker.allows(2.0)


def test_what_an_endpoint_asks_for_is_honoured() -> None:
    breaker = CircuitBreaker(CONFIG)
    breaker.failed("a", "overloaded", 0.0, retry_after=5.0)
    assert not breaker.allows(4.9)
    assert breaker.allows(5.0)


def test_a_lost_process_is_not_the_breakers_business() -> None:
    breaker = CircuitBreaker(CONFIG)
    for number in range(50):
        breaker.failed(f"a{number}", "lost", 0.0)
    assert breaker.allows(0.0)


@given(st.lists(st.tuples(st.sampled_from(["failed", "worked", "sent", "ended", "wait"]), st.integers(0, 3))))
def test_whatever_happens_a_breaker_lets_something_through_in_the_end(calls: list[tuple[str, int]]) -> None:
    breaker, now = CircuitBreaker(CONFIG), 0.0
    sent: list[str] = []
    for call, which in calls:
        name = f"r{which}"
        if call == "failed":
            breaker.failed(name, "error", now)
            sent = [one for one in sent if one != name]
        elif call == "sent" and breaker.allows(now):
            breaker.sent(name)
            sent.append(name)
        elif call == "worked":
            breaker.worked(name)
        elif call == "ended":
            breaker.ended(name)
        else:
            now += 1.0
    for name in sent:
        breaker.ended(name)
    for which in range(4):
        breaker.ended(f"r{which}")
    assert breaker.allows(now + CONFIG.breaker_most_seconds)
