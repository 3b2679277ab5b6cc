"""The queue of one model in the gateway: which request goes to an endpoint next, and which is refused at once.

Inside a priority level the order is start-time fair queueing over tenants. Each tenant has a virtual counter of the
tokens that it was given, divided by its weight; the tenant whose counter is lowest goes next, and one that comes back
after a pause starts where the level stands, so that idleness saves up nothing. Two tenants that both wait never differ
by more than one request of each. Inside a tenant the order is first come, first served.

Between levels the head with the smallest `arrived + priority * priority_aging` goes next. That number never changes,
so a waiting request gains a level on later ones every `priority_aging` seconds, and nothing starves.

Nothing is taken past a head that no endpoint has room for: a stream of small requests would starve a large one.

How long a request would wait is the work ahead of it, in this order, divided by the rate at which the queue is seen to
drain while it is blocked. The rate is measured in the units of the queue itself, so it does not matter how well
`tokens` estimates what a request really costs. A request that would wait too long is refused before it has waited, one
that has become too late is never given out: what is served is of use to somebody, also under overload.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from math import exp, inf
from typing import Literal

import msgspec

PRIORITIES = 10
"""Priorities beyond -PRIORITIES and PRIORITIES count as these: the number of levels is bounded."""
_LONGEST_RETRY_AFTER = 60.0
_SHORTEST_RETRY_AFTER = 1.0
_FEWEST_SAMPLES = 4
"""A rate from fewer departures is a guess."""

RefusalReason = Literal["queue_full", "tenant_share", "wait", "deadline"]


class AdmissionConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    max_requests: int = 1024
    """Requests that may wait."""
    max_tokens: int = 1_000_000
    """Tokens, of prompt and expected output, that may wait. A tenant alone gets half of either: see `offer`."""
    max_wait_seconds: float = 30.0
    """A request that is expected to wait longer is refused."""
    priority_aging: float = 10.0
    """A waiting request gains one priority level every so many seconds."""
    rate_window_seconds: float = 20.0
    """Over which the rate of departures is averaged."""


class QueuedRequest(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    tokens: int
    """Prompt and expected output of all its sequences, >= 1: what it counts for in bounds, fairness and waiting."""
    arrived: float
    """Its seniority; kept when it is put back."""
    tenant: str = "default"
    weight: float = 1.0
    """Of the tenant, > 0: with twice the weight it gets twice the tokens."""
    priority: int = 0
    """Lower goes first."""
    deadline: float | None = None
    service_seconds: float = 0.0
    """From its dispatch to its end, as predicted; rather too long than too short: one that starts and then misses its
    deadline has wasted what it was given."""

    @property
    def latest_start(self) -> float:
        return inf if self.deadline is None else self.deadline - self.service_seconds


class Accepted(msgspec.Struct, frozen=True):
    expected_wait: float | None
    """Seconds; None while the rate of service is unknown."""


class Refused(msgspec.Struct, frozen=True):
    """Nothing was kept of the request."""

    status: int
    """429 where the tenant holds its share of the queue, 503 where the model is overloaded."""
    reason: RefusalReason
    message: str
    retry_after: float | None
    """Seconds; None where waiting would not help."""


class ServiceRate:
    """Tokens a second at which requests leave the queue, averaged over the time in which it was blocked.

    Time without a queue says nothing of what the endpoints could do and is not counted.
    """

    def __init__(self, window: float) -> None:
        self._window = window
        self._tokens = 0.0
        self._seconds = 0.0
        self._samples = 0

    def elapse(self, seconds: float) -> None:
        keep = exp(-seconds / self._window)
        self._tokens *= keep
        self._seconds = self._seconds * keep + self._window * (1.0 - keep)

    def add(self, tokens: int) -> None:
        self._tokens += tokens
        self._samples += 1

    @property
    def value(self) -> float | None:
        """None while unknown. Tends to 0 while the queue is blocked and nothing leaves."""
        if self._samples < _FEWEST_SAMPLES or self._seconds <= 0.0:
            return None
        return self._tokens / self._seconds


class _Flow:
    """One tenant in one level."""

    __slots__ = ("in_heap", "items", "level", "tag", "tokens", "weight")

    def __init__(self, level: _Level) -> None:
        self.level = level
        self.items: OrderedDict[str, QueuedRequest] = OrderedDict()
        self.tokens = 0
        self.weight = 1.0
        self.tag = 0.0
        """Virtual start of its next request: the virtual finish of its last one, or where the level stood when it came
        back. Changes only when a request is served or the flow enters the heap."""
        self.in_heap = False

    @property
    def head(self) -> QueuedRequest:
        return next(iter(self.items.values()))


class _Level:
    """Start-time fair queueing over the tenants with requests of one priority."""

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.flows: dict[str, _Flow] = {}
        self.virtual = 0.0
        """Virtual start of the request served last: tokens by weight that a waiting tenant has been given so far."""
        self.tokens = 0
        self.weight = 0.0
        """Of the tenants that wait."""
        self._heap: list[tuple[float, int, _Flow]] = []
        """One entry for each tenant that waits, and for some that did: these are dropped when they come to the top."""
        self._pushes = 0

    def add(self, item: QueuedRequest, *, front: bool) -> _Flow:
        flow = self.flows.get(item.tenant)
        if flow is None:
            flow = self.flows[item.tenant] = _Flow(self)
        self.weight += item.weight - (flow.weight if flow.items else 0.0)
        flow.weight = item.weight
        flow.items[item.id] = item
        if front:
            flow.items.move_to_end(item.id, last=False)
        flow.tokens += item.tokens
        self.tokens += item.tokens
        if not flow.in_heap:
            flow.tag = max(self.virtual, flow.tag)
            self._push(flow)
        return flow

    def remove(self, flow: _Flow, item: QueuedRequest) -> None:
        del flow.items[item.id]
        flow.tokens -= item.tokens
        self.tokens -= item.tokens
        if not flow.items:
            # To the empty level exactly 0: differences of floats would add up over days.
            self.weight = self.weight - flow.weight if self.tokens else 0.0

    def head(self) -> QueuedRequest | None:
        while self._heap:
            flow = self._heap[0][2]
            if flow.items:
                return flow.head
            heappop(self._heap)
            flow.in_heap = False
        return None

    def serve(self, item: QueuedRequest) -> None:
        """Take out `item`, which is the head."""
        tag, _, flow = heappop(self._heap)
        flow.in_heap = False
        self.virtual = tag
        flow.tag = tag + item.tokens / flow.weight
        self.remove(flow, item)
        if flow.items:
            self._push(flow)

    def ahead(self, tenant: str, weight: float) -> float:
        """Tokens that go before a new request of the tenant. The level's clock runs at the rate of service divided by
        the weights of all who wait, and the request's turn comes when the clock shows its tag."""
        flow = self.flows.get(tenant)
        if flow is None:
            return 0.0
        tag = max(self.virtual, flow.tag) + flow.tokens / weight
        weights = self.weight if flow.items else self.weight + weight
        return min(float(self.tokens), (tag - self.virtual) * weights)

    def _push(self, flow: _Flow) -> None:
        flow.in_heap = True
        self._pushes += 1
        heappush(self._heap, (flow.tag, self._pushes, flow))

    def check(self) -> None:
        waiting = [flow for flow in self.flows.values() if flow.items]
        assert self.tokens == sum(flow.tokens for flow in self.flows.values())
        assert abs(self.weight - sum(flow.weight for flow in waiting)) < 1e-6
        queued = [flow for _, _, flow in self._heap]
        for flow in self.flows.values():
            assert flow.tokens == sum(item.tokens for item in flow.items.values())
            assert queued.count(flow) == flow.in_heap
            assert flow.in_heap or not flow.items
        for tag, _, flow in self._heap:
            assert tag == flow.tag >= self.virtual


class AdmissionQueue:
    """Deterministic: equal calls give equal answers."""

    def __init__(self, config: AdmissionConfig) -> None:
        self.config = config
        self.tokens = 0
        self.rate = ServiceRate(config.rate_window_seconds)
        self._levels: dict[int, _Level] = {}
        self._flow_of: dict[str, _Flow] = {}
        """By id, of every request that waits."""
        self.held: dict[str, tuple[int, int]] = {}
        """By tenant that waits: its requests and its tokens."""
        self._latest_starts: list[tuple[float, str]] = []
        """A heap; entries of requests that have left are dropped when they come to the top or outnumber the others."""
        self._late: list[QueuedRequest] = []
        """Became too late and have not been told of."""
        self._blocked = False
        """The last `take` found a request and no room for it."""
        self._seen = 0.0
        """Until when the rate has been told of the time."""

    def __len__(self) -> int:
        return len(self._flow_of)

    # --- in ---------------------------------------------------------------------------------------------------------

    def offer(self, item: QueuedRequest, now: float) -> Accepted | Refused:
        """Queue a new request, or say why not.

        A tenant may hold as much as it leaves free: one alone at most half of the queue, two a third each. So there is
        room for a tenant that comes later, and none that was accepted is ever pushed out. An empty queue takes
        whatever comes: whether an endpoint can hold it is not known here.
        """
        if item.id in self._flow_of:
            raise ValueError(f"request {item.id} is queued already")
        wait = self.expected_wait(item, now)
        refused = self._late_refusal(item, wait or 0.0, now)
        if refused is None and self.tokens:
            refused = self._full_refusal(item)
        if refused is not None:
            return refused
        self._add(item, front=False)
        return Accepted(wait)

    def put_back(self, item: QueuedRequest) -> None:
        """Queue one that `take` gave out and that lost its endpoint: first of its tenant, and never refused."""
        if item.id in self._flow_of:
            raise ValueError(f"request {item.id} is queued already")
        self._add(item, front=True)

    def _late_refusal(self, item: QueuedRequest, wait: float, now: float) -> Refused | None:
        most = self.config.max_wait_seconds
        slack = item.latest_start - now
        if wait > slack:
            # Whoever asks again later with the same time to spare succeeds once the wait has shrunk to it.
            retry_after = _retry_after(wait - slack) if slack >= 0 else None
            left, service = slack + item.service_seconds, item.service_seconds
            message = f"the deadline is in {left:.1f} s and cannot be met: {_seconds(wait)} of waiting"
            message += f" and {_seconds(service)} of service are expected" if service else " are expected"
            return Refused(503, "deadline", message, retry_after)
        if wait > most:
            message = f"overloaded: {_seconds(wait)} of waiting are expected, more than {most:g} s"
            return Refused(503, "wait", message, _retry_after(wait - most))
        return None

    def _full_refusal(self, item: QueuedRequest) -> Refused | None:
        config, rate = self.config, self.rate.value
        free_requests, free_tokens = config.max_requests - len(self), config.max_tokens - self.tokens
        held_requests, held_tokens = self.held.get(item.tenant, (0, 0))
        missing = max(0, held_tokens + item.tokens - free_tokens)
        if not missing and held_requests + 1 <= free_requests:
            return None
        retry_after = _retry_after(missing / rate if rate else 0.0)
        if free_requests < 1 or item.tokens > free_tokens:
            message = f"overloaded: {len(self)} requests with {self.tokens} tokens wait already"
            return Refused(503, "queue_full", message, retry_after)
        message = f"{held_requests} requests with {held_tokens} tokens of this tenant wait already"
        return Refused(429, "tenant_share", message, retry_after)

    def _add(self, item: QueuedRequest, *, front: bool) -> None:
        priority = _clamped(item.priority)
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = _Level(priority)
        self._flow_of[item.id] = level.add(item, front=front)
        self.tokens += item.tokens
        requests, tokens = self.held.get(item.tenant, (0, 0))
        self.held[item.tenant] = (requests + 1, tokens + item.tokens)
        if item.deadline is not None:
            heappush(self._latest_starts, (item.latest_start, item.id))
            if len(self._latest_starts) > 2 * len(self) + 64:
                self._latest_starts = [entry for entry in self._latest_starts if self._is_current(entry)]
                heapify(self._latest_starts)

    # --- out --------------------------------------------------------------------------------------------------------

    def take(self, can_place: Callable[[QueuedRequest], bool], now: float) -> QueuedRequest | None:
        """The next request, if `can_place` says that an endpoint has room for it. Call until None."""
        self._pass_time(now)
        self._drop_late(now)
        level, item = self._next()
        self._blocked, was_blocked = False, self._blocked
        if level is None or item is None:
            return None
        if not can_place(item):
            self._blocked = True
            return None
        level.serve(item)
        self._forget(item)
        if was_blocked:
            self.rate.add(item.tokens)
            self._blocked = bool(self._flow_of)
        return item

    def remove(self, request_id: str) -> QueuedRequest | None:
        """The client has left. None if it does not wait here."""
        flow = self._flow_of.get(request_id)
        if flow is None:
            return None
        item = flow.items[request_id]
        flow.level.remove(flow, item)
        self._forget(item)
        return item

    def expire(self, now: float) -> list[QueuedRequest]:
        """Those that can no longer meet their deadlines, each told once: to be ended."""
        self._drop_late(now)
        late, self._late = self._late, []
        return late

    def next_expiry(self) -> float | None:
        """When `expire` is worth calling; may be too early, never too late. None while nothing has a deadline."""
        return self._latest_starts[0][0] if self._latest_starts else None

    def _next(self) -> tuple[_Level | None, QueuedRequest | None]:
        aging = self.config.priority_aging
        best: tuple[float, int] | None = None
        found: tuple[_Level | None, QueuedRequest | None] = (None, None)
        for level in self._levels.values():
            head = level.head()
            if head is not None:
                key = (head.arrived + level.priority * aging, level.priority)
                if best is None or key < best:
                    best, found = key, (level, head)
        return found

    def _drop_late(self, now: float) -> None:
        while self._latest_starts and self._latest_starts[0][0] < now:
            entry = heappop(self._latest_starts)
            if self._is_current(entry):
                item = self.remove(entry[1])
                assert item is not None
                self._late.append(item)

    def _forget(self, item: QueuedRequest) -> None:
        del self._flow_of[item.id]
        self.tokens -= item.tokens
        requests, tokens = self.held[item.tenant]
        if requests > 1:
            self.held[item.tenant] = (requests - 1, tokens - item.tokens)
        else:
            del self.held[item.tenant]

    def _is_current(self, entry: tuple[float, str]) -> bool:
        flow = self._flow_of.get(entry[1])
        return flow is not None and flow.items[entry[1]].latest_start == entry[0]

    # --- estimates --------------------------------------------------------------------------------------------------

    def expected_wait(self, item: QueuedRequest, now: float) -> float | None:
        """Seconds until a new request would be given out; None while the rate of service is unknown."""
        self._pass_time(now)
        ahead, rate = self._ahead(item), self.rate.value
        if ahead == 0.0:
            return 0.0
        if rate is None:
            return None
        return ahead / rate if rate > 0.0 else inf

    def _ahead(self, item: QueuedRequest) -> float:
        """Tokens that go before a new request. Less urgent requests that have aged past it are not counted."""
        priority = _clamped(item.priority)
        ahead = 0.0
        for level in self._levels.values():
            if level.priority < priority:
                ahead += level.tokens
            elif level.priority == priority:
                ahead += level.ahead(item.tenant, item.weight)
        return ahead

    def _pass_time(self, now: float) -> None:
        if self._blocked and self._flow_of:
            self.rate.elapse(max(0.0, now - self._seen))
        else:
            self._blocked = False
        self._seen = now

    def check(self) -> None:
        """Every invariant; for tests."""
        for level in self._levels.values():
            level.check()
        flows = [flow for level in self._levels.values() for flow in level.flows.values()]
        items = [item for flow in flows for item in flow.items.values()]
        assert sorted(item.id for item in items) == sorted(self._flow_of)
        assert self.tokens == sum(item.tokens for item in items)
        held: dict[str, tuple[int, int]] = {}
        for item in items:
            requests, tokens = held.get(item.tenant, (0, 0))
            held[item.tenant] = (requests + 1, tokens + item.tokens)
        assert held == self.held
        for item in items:
            assert item.deadline is None or (item.latest_start, item.id) in self._latest_starts
        assert len(self._latest_starts) <= 2 * (len(items) + 1) + 64 or not items


def _clamped(priority: int) -> int:
    return max(-PRIORITIES, min(PRIORITIES, priority))


def _retry_after(seconds: float) -> float:
    return min(_LONGEST_RETRY_AFTER, max(_SHORTEST_RETRY_AFTER, seconds))


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 1000 else "many minutes"
