"""Three times what a server can do, in virtual time: goodput does not collapse, and a queue without admission does."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Protocol

import pytest

from shoal.core.admission import Accepted, AdmissionConfig, AdmissionQueue, QueuedRequest
from shoal.core.rate_limit import RateLimiter, TenantLimits

SLOTS = 16
TOKENS_PER_SECOND = 1000
"""Of each slot."""
MEAN_TOKENS = 1000
CAPACITY = SLOTS * TOKENS_PER_SECOND / MEAN_TOKENS
"""Requests a second."""
SLACK = 8.0
"""Seconds from arrival to deadline."""
CALM, OVERLOAD, AFTER = 20.0, 60.0, 40.0


class Discipline(Protocol):
    def offer(self, item: QueuedRequest, now: float) -> bool: ...
    def take(self, can_place: Callable[[QueuedRequest], bool], now: float) -> QueuedRequest | None: ...


class Fifo:
    """The control: a queue that takes all that comes."""

    def __init__(self) -> None:
        self._items: deque[QueuedRequest] = deque()

    def offer(self, item: QueuedRequest, now: float) -> bool:
        self._items.append(item)
        return True

    def take(self, can_place: Callable[[QueuedRequest], bool], now: float) -> QueuedRequest | None:
        return self._items.popleft() if self._items and can_place(self._items[0]) else None


class Admission:
    def __init__(self, **changes: float) -> None:
        self.queue = AdmissionQueue(AdmissionConfig(**changes))  # type: ignore[arg-type]
        self.ended_in_queue = 0

    def offer(self, item: QueuedRequest, now: float) -> bool:
        return isinstance(self.queue.offer(item, now), Accepted)

    def take(self, can_place: Callable[[QueuedRequest], bool], now: float) -> QueuedRequest | None:
        item = self.queue.take(can_place, now)
        self.ended_in_queue += len(self.queue.expire(now))
        return item


Load = list[tuple[float, str]]


def arrivals(random: Random, tenant: str, rate: Callable[[float], float], until: float) -> Load:
    """(time, tenant), open loop: nobody waits for an answer before sending the next."""
    now, found = 0.0, []
    while (now := now + random.expovariate(rate(now))) < until:
        found.append((now, tenant))
    return found


class Outcome:
    def __init__(self) -> None:
        self.good: list[tuple[float, str, float]] = []
        """When a request ended in time, whose it was, and its seconds in a slot: in requests, a discipline that serves
        only the small ones would look good."""
        self.offered: list[tuple[float, str, float]] = []
        self.waits: dict[str, list[float]] = {}

    def goodput(self, start: float, end: float, tenant: str = "") -> float:
        """Of the capacity, what went into requests that ended in time."""
        return _work(self.good, start, end, tenant)

    def load(self, start: float, end: float, tenant: str = "") -> float:
        """Offered, in the same unit."""
        return _work(self.offered, start, end, tenant)


def _work(events: list[tuple[float, str, float]], start: float, end: float, tenant: str) -> float:
    done = sum(seconds for at, whose, seconds in events if start <= at < end and whose.startswith(tenant))
    return done / (end - start) / SLOTS


def simulate(load: Load, discipline: Discipline, seed: int, *, knows_service: bool = True) -> Outcome:
    """A server of SLOTS that each run one request. What is predicted of a request is wrong by up to 30%."""
    random = Random(seed)
    outcome = Outcome()
    ends: list[tuple[float, float, str, float]] = []
    seconds_of: dict[str, float] = {}

    def dispatch(now: float) -> None:
        while (item := discipline.take(lambda _: len(ends) < SLOTS, now)) is not None:
            outcome.waits.setdefault(item.tenant, []).append(now - item.arrived)
            assert item.deadline is not None
            seconds = seconds_of.pop(item.id)
            heapq.heappush(ends, (now + seconds, item.deadline, item.tenant, seconds))

    def advance(until: float) -> None:
        while ends and ends[0][0] <= until:
            now, deadline, tenant, seconds = heapq.heappop(ends)
            if now <= deadline:
                outcome.good.append((now, tenant, seconds))
            dispatch(now)

    for number, (now, tenant) in enumerate(sorted(load)):
        advance(now)
        tokens = max(50, min(5000, int(random.expovariate(1 / MEAN_TOKENS))))
        seconds = tokens / TOKENS_PER_SECOND
        predicted = seconds * random.uniform(1.0, 1.3) if knows_service else 0.0
        item = QueuedRequest(
            id=f"{number}",
            tenant=tenant,
            tokens=int(tokens * random.uniform(0.7, 1.3)),
            arrived=now,
            deadline=now + SLACK,
            service_seconds=predicted,
        )
        outcome.offered.append((now, tenant, seconds))
        seconds_of[item.id] = seconds
        if discipline.offer(item, now):
            dispatch(now)
    advance(CALM + OVERLOAD + AFTER)
    return outcome


def overload(seed: int) -> Load:
    def rate(now: float) -> float:
        return (3.0 if CALM <= now < CALM + OVERLOAD else 0.7) * CAPACITY

    return arrivals(Random(seed), "all", rate, CALM + OVERLOAD + AFTER)


def during(outcome: Outcome) -> float:
    return outcome.goodput(CALM, CALM + OVERLOAD)


def after(outcome: Outcome) -> float:
    """From 10 s after the overload: what ends in time of what is then offered."""
    start, end = CALM + OVERLOAD + 10.0, CALM + OVERLOAD + AFTER - SLACK
    return outcome.goodput(start, end) / outcome.load(start, end)


@pytest.mark.parametrize("seed", range(3))
def test_goodput_holds_at_three_times_the_capacity_and_recovers(seed: int) -> None:
    admission = Admission(max_wait_seconds=30.0)
    outcome = simulate(overload(seed), admission, seed)
    assert outcome.load(CALM, CALM + OVERLOAD) > 2.5, "the fault did happen"
    assert during(outcome) >= 0.9
    assert after(outcome) >= 0.9
    assert admission.ended_in_queue < 0.1 * len(outcome.offered), "refusals come at once, not after waiting"


def test_the_control_collapses() -> None:
    outcome = simulate(overload(0), Fifo(), 0)
    assert during(outcome) < 0.3
    assert after(outcome) < 0.5


def test_a_bound_on_waiting_is_enough_where_service_times_are_unknown() -> None:
    """Those that start near their deadline are lost then, so the bound has to leave time for service."""
    outcome = simulate(overload(1), Admission(max_wait_seconds=2.0), 1, knows_service=False)
    assert during(outcome) >= 0.9
    assert after(outcome) >= 0.9
    control = simulate(overload(1), Admission(max_wait_seconds=30.0), 1, knows_service=False)
    assert during(control) < during(outcome)


def noisy_neighbour(seed: int) -> Load:
    end = CALM + OVERLOAD
    flood = arrivals(Random(seed), "noisy", lambda now: (2.7 if now >= CALM else 0.2) * CAPACITY, end)
    return flood + arrivals(Random(seed + 1), "quiet", lambda now: 0.3 * CAPACITY, end)


def test_a_noisy_tenant_takes_nothing_from_a_quiet_one() -> None:
    outcome = simulate(noisy_neighbour(5), Admission(max_wait_seconds=30.0), 5)
    start, end = CALM, CALM + OVERLOAD
    assert outcome.load(start, end, "noisy") > 2.2, "the fault did happen"
    assert outcome.goodput(start, end, "quiet") >= 0.95 * outcome.load(start, end, "quiet")
    assert outcome.goodput(start, end) >= 0.9
    waits = sorted(outcome.waits["quiet"])
    assert waits[int(0.99 * len(waits))] < 0.1 * SLACK
    control = simulate(noisy_neighbour(5), Fifo(), 5)
    assert control.goodput(start, end, "quiet") < 0.5 * control.load(start, end, "quiet")


def test_limits_hold_a_noisy_tenant_back_before_the_queue_does() -> None:
    """The same flood, with a limit on the noisy tenant: the model is never overloaded."""
    limiter = RateLimiter({"noisy": TenantLimits(requests_per_minute=0.3 * CAPACITY * 60)}, TenantLimits())
    let_in = [(at, whose) for at, whose in sorted(noisy_neighbour(5)) if limiter.check(whose, 1, at) is None]
    assert len(let_in) < 0.5 * len(noisy_neighbour(5))
    outcome = simulate(let_in, Admission(), 5)
    start, end = 2 * CALM, CALM + OVERLOAD
    assert outcome.goodput(start, end, "quiet") >= 0.95 * outcome.load(start, end, "quiet")
    assert outcome.load(start, end) < 0.9, "the limit is what keeps the load below the capacity"
