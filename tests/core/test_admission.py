"""The admission queue: order, fairness, bounds and deadlines, against adversaries that hypothesis makes up."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.core.admission import Accepted, AdmissionConfig, AdmissionQueue, QueuedRequest, Refused

WEIGHTS = {"a": 1.0, "b": 1.0, "c": 3.0, "d": 0.5}
LARGEST = 50


def request(name: str, tenant: str = "a", tokens: int = 10, arrived: float = 0.0, **fields: object) -> QueuedRequest:
    weight = WEIGHTS.get(tenant, 1.0)
    return QueuedRequest(id=name, tenant=tenant, tokens=tokens, arrived=arrived, weight=weight, **fields)  # type: ignore[arg-type]


def any_room(_: QueuedRequest) -> bool:
    return True


def no_room(_: QueuedRequest) -> bool:
    return False


def queue(**changes: object) -> AdmissionQueue:
    return AdmissionQueue(msgspec.convert(changes, AdmissionConfig))


def taken(admission: AdmissionQueue, count: int, now: float = 0.0) -> list[str]:
    found = [admission.take(any_room, now) for _ in range(count)]
    return [item.id for item in found if item is not None]


def with_rate(admission: AdmissionQueue, *, tokens_per_second: int) -> float:
    """Make the queue see such a rate; it is empty afterwards. Returns the time."""
    for number in range(50):
        admission.offer(request(f"warm-{number}", tokens=tokens_per_second), 0.0)
    for now in range(50):
        assert admission.take(any_room, now) is not None
        admission.take(no_room, now)
    assert len(admission) == 0
    assert admission.rate.value == pytest.approx(tokens_per_second, rel=0.1)
    return 50.0


# --- order ------------------------------------------------------------------------------------------------------------


def test_an_empty_queue_lets_a_request_straight_through() -> None:
    admission = queue()
    assert admission.offer(request("r"), 0.0) == Accepted(0.0)
    assert taken(admission, 2) == ["r"]


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    admission = queue()
    for i in range(5):
        admission.offer(request(f"{i}"), float(i))
    assert taken(admission, 9) == ["0", "1", "2", "3", "4"]


def test_a_flood_does_not_delay_another_tenant_by_more_than_a_request() -> None:
    admission = queue()
    for i in range(100):
        admission.offer(request(f"a{i}", "a"), 0.0)
    assert taken(admission, 10) == [f"a{i}" for i in range(10)]
    admission.offer(request("b0", "b"), 0.0)
    assert "b0" in taken(admission, 2)


def test_a_tenant_that_paused_has_saved_up_nothing() -> None:
    admission = queue()
    for i in range(40):
        admission.offer(request(f"a{i}", "a"), 0.0)
    taken(admission, 20)
    for i in range(20):
        admission.offer(request(f"b{i}", "b"), 0.0)
    assert sum(name.startswith("a") for name in taken(admission, 20)) in (9, 10, 11)


def test_one_request_at_a_time_is_no_way_around_fairness() -> None:
    """b never has two in the queue, and brings the next as soon as its last one is taken."""
    admission = queue()
    for i in range(60):
        admission.offer(request(f"a{i}", "a", tokens=10), 0.0)
    given = {"a": 0, "b": 0}
    for i in range(40):
        if not any(name.startswith("b") for name in admission._flow_of):
            admission.offer(request(f"b{i}", "b", tokens=40), 0.0)
        item = admission.take(any_room, 0.0)
        assert item is not None
        given[item.tenant] += item.tokens
    assert abs(given["a"] - given["b"]) <= 50


def test_twice_the_weight_is_twice_the_tokens() -> None:
    admission = queue()
    for i in range(60):
        for tenant in ("a", "c"):
            admission.offer(request(f"{tenant}{i}", tenant), 0.0)
    first = taken(admission, 40)
    assert sum(name.startswith("c") for name in first) in (29, 30, 31)


def test_the_more_urgent_goes_first_until_the_other_has_aged() -> None:
    admission = queue(priority_aging=10.0)
    admission.offer(request("later", priority=1, arrived=0.0), 0.0)
    admission.offer(request("sooner", priority=0, arrived=9.0), 9.0)
    assert taken(admission, 2, 9.0) == ["sooner", "later"]
    admission.offer(request("later", priority=1, arrived=0.0), 0.0)
    admission.offer(request("sooner", priority=0, arrived=11.0), 11.0)
    assert taken(admission, 2, 11.0) == ["later", "sooner"]


def test_a_stream_of_urgent_requests_does_not_starve_the_others() -> None:
    admission = queue(priority_aging=10.0)
    admission.offer(request("low", "a", priority=2, arrived=0.0), 0.0)
    for second in range(1, 30):
        admission.offer(request(f"high{second}", "b", priority=0, arrived=float(second)), float(second))
        item = admission.take(any_room, float(second))
        if item is not None and item.id == "low":
            assert second > 1, "the control: at first the urgent ones do go before"
            return
    raise AssertionError("starved")


def test_nothing_is_taken_past_a_head_that_has_no_room() -> None:
    admission = queue()
    admission.offer(request("large", "a", tokens=40), 0.0)
    admission.offer(request("small", "b", tokens=1), 0.0)
    assert admission.take(lambda item: item.tokens <= 20, 0.0) is None
    assert taken(admission, 2) == ["large", "small"]


def test_what_lost_its_endpoint_goes_first_of_its_tenant_and_is_never_refused() -> None:
    admission = queue(max_requests=2, max_tokens=20)
    admission.offer(request("lost"), 0.0)
    lost = admission.take(any_room, 0.0)
    assert lost is not None
    assert isinstance(admission.offer(request("next"), 0.0), Accepted)
    assert isinstance(admission.offer(request("refused", tokens=11), 0.0), Refused)
    admission.put_back(lost)
    assert taken(admission, 3) == ["lost", "next"]


def test_an_id_cannot_be_queued_twice() -> None:
    admission = queue()
    admission.offer(request("r"), 0.0)
    with pytest.raises(ValueError, match="r is queued already"):
        admission.offer(request("r"), 0.0)


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_a_tenant_alone_gets_half_of_the_queue_and_another_finds_room() -> None:
    admission = queue(max_requests=100, max_tokens=1000)
    answers = [admission.offer(request(f"a{i}", "a"), 0.0) for i in range(200)]
    assert sum(isinstance(answer, Accepted) for answer in answers) == 50
    refused = answers[-1]
    assert isinstance(refused, Refused)
    assert (refused.status, refused.reason) == (429, "tenant_share")
    assert refused.retry_after is not None
    assert isinstance(admission.offer(request("b", "b"), 0.0), Accepted)


def test_a_full_queue_refuses_everybody() -> None:
    admission = queue(max_tokens=100)
    for i in range(200):
        admission.offer(request(f"{i}", f"tenant{i}"), 0.0)
    refused = admission.offer(request("last", "late"), 0.0)
    assert isinstance(refused, Refused)
    assert (refused.status, refused.reason) == (503, "queue_full")
    assert admission.tokens <= 100


def test_an_empty_queue_takes_a_request_larger_than_itself() -> None:
    admission = queue(max_tokens=100)
    assert isinstance(admission.offer(request("huge", tokens=101), 0.0), Accepted)
    assert isinstance(admission.offer(request("small", "b"), 0.0), Refused)


# --- time -------------------------------------------------------------------------------------------------------------


def test_what_would_wait_too_long_is_refused_with_the_time_to_come_back() -> None:
    admission = queue(max_wait_seconds=5.0)
    now = with_rate(admission, tokens_per_second=100)
    answers = [admission.offer(request(f"{i}", "a", tokens=100), now) for i in range(12)]
    admission.take(no_room, now)
    accepted = [answer for answer in answers if isinstance(answer, Accepted)]
    assert len(accepted) in (5, 6, 7)
    waits = [answer.expected_wait for answer in accepted]
    assert waits == sorted(waits, key=float) and waits[-1] == pytest.approx(len(accepted) - 1, rel=0.15)
    refused = answers[-1]
    assert isinstance(refused, Refused)
    assert (refused.status, refused.reason) == (503, "wait")
    assert refused.retry_after is not None and refused.retry_after >= 1.0
    # It is that tenant's own queue that is long: another goes before most of it.
    assert isinstance(admission.offer(request("b", "b"), now), Accepted)


def test_a_request_that_cannot_meet_its_deadline_is_refused_now() -> None:
    admission = queue()
    now = with_rate(admission, tokens_per_second=100)
    for i in range(5):
        admission.offer(request(f"{i}", "a", tokens=100), now)
    impossible = request("late", "a", deadline=now + 6.0, service_seconds=3.0)
    refused = admission.offer(impossible, now)
    assert isinstance(refused, Refused)
    assert (refused.status, refused.reason) == (503, "deadline")
    # After so long it would be accepted with as much time left.
    assert refused.retry_after == pytest.approx(2.0, rel=0.3)
    possible = msgspec.structs.replace(impossible, deadline=now + 12.0)
    assert isinstance(admission.offer(possible, now), Accepted)
    urgent = msgspec.structs.replace(impossible, id="urgent", priority=-1)
    assert isinstance(admission.offer(urgent, now), Accepted)


def test_a_deadline_that_no_waiting_makes_possible_has_no_retry_after() -> None:
    refused = queue().offer(request("r", deadline=1.0, service_seconds=2.0), 0.0)
    assert isinstance(refused, Refused)
    assert refused.retry_after is None


def test_without_a_rate_nothing_is_refused_for_its_wait() -> None:
    admission = queue(max_wait_seconds=0.1)
    admission.offer(request("first"), 0.0)
    admission.take(no_room, 0.0)
    assert admission.offer(request("second", "b", deadline=100.0), 99.0) == Accepted(None) or len(admission) == 2


def test_one_that_becomes_too_late_is_not_given_out_but_told_of_once() -> None:
    admission = queue()
    admission.offer(request("late", "a", deadline=10.0, service_seconds=4.0), 0.0)
    admission.offer(request("free", "a"), 0.0)
    assert admission.next_expiry() == 6.0
    assert admission.expire(6.0) == []
    item = admission.take(any_room, 6.5)
    assert item is not None and item.id == "free"
    assert [item.id for item in admission.expire(6.5)] == ["late"]
    assert admission.expire(6.5) == []
    assert admission.next_expiry() is None


def test_clients_that_leave_free_their_place_and_leave_nothing_behind() -> None:
    """The head cannot be placed, and clients with far deadlines come and go behind it."""
    admission = queue()
    admission.offer(request("head"), 0.0)
    for i in range(5000):
        admission.offer(request(f"{i}", f"tenant{i % 7}", deadline=1e6), 0.0)
        assert admission.remove(f"{i}") is not None
        assert admission.remove(f"{i}") is None
    admission.check()
    assert len(admission._latest_starts) < 100
    assert (len(admission), admission.tokens) == (1, 10)


def test_the_rate_falls_while_nothing_leaves_and_recovers() -> None:
    admission = queue(max_wait_seconds=5.0)
    now = with_rate(admission, tokens_per_second=100)
    admission.offer(request("x", tokens=100), now)
    admission.take(no_room, now)
    now += 100.0
    refused = admission.offer(request("y", "a", tokens=100), now)
    assert isinstance(refused, Refused) and refused.reason == "wait"
    # The queue empties: the next request finds nothing ahead of it, whatever the rate.
    assert taken(admission, 2, now) == ["x"]
    assert isinstance(admission.offer(request("y", "a", tokens=100), now), Accepted)


def test_the_rate_is_of_times_with_a_queue_alone() -> None:
    """At a hundredth of its capacity a model must not be taken for a hundred times slower than it is."""
    admission = queue()
    now = with_rate(admission, tokens_per_second=100)
    for second in range(1000):
        admission.offer(request(f"{second}", tokens=1), now + second)
        assert admission.take(any_room, now + second) is not None
        assert admission.take(any_room, now + second) is None
    assert admission.rate.value == pytest.approx(100, rel=0.1)


# --- adversaries ------------------------------------------------------------------------------------------------------


class Adversary(RuleBasedStateMachine):
    """Any order of calls: nothing is lost, bounds hold, tenants get their shares, and the order is as documented."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.count = 0
        self.config = AdmissionConfig(max_requests=12, max_tokens=300, priority_aging=5.0, max_wait_seconds=1e9)
        self.admission = AdmissionQueue(self.config)
        self.waiting: dict[str, QueuedRequest] = {}
        self.given: list[QueuedRequest] = []
        self.served: dict[tuple[str, int], float] = {}
        """Tokens by weight that a tenant was given in a level."""
        self.since: dict[tuple[str, str, int], float] = {}
        """By how much one led the other when both of them began to wait."""

    @rule(
        tenant=st.sampled_from(sorted(WEIGHTS)),
        tokens=st.integers(1, LARGEST),
        priority=st.sampled_from([0, 0, 0, 1, -1, 99]),
        slack=st.none() | st.floats(0.0, 20.0),
        service=st.sampled_from([0.0, 1.0]),
    )
    def offer(self, tenant: str, tokens: int, priority: int, slack: float | None, service: float) -> None:
        self.count += 1
        deadline = None if slack is None else self.now + slack
        item = request(
            f"{self.count}",
            tenant,
            tokens,
            self.now,
            priority=max(-10, min(10, priority)),
            deadline=deadline,
            service_seconds=service,
        )
        before, held = self.admission.tokens, sum(i.tokens for i in self.waiting.values() if i.tenant == tenant)
        answer = self.admission.offer(item, self.now)
        if isinstance(answer, Accepted):
            assert item.latest_start >= self.now
            assert not self.waiting or before + held + tokens <= self.config.max_tokens
            self.waiting[item.id] = item
        else:
            assert answer.reason != "wait"
            if answer.reason == "tenant_share":
                assert held > 0, "a tenant with nothing in the queue is refused only where there is no room"

    @rule(room=st.integers(0, LARGEST), seconds=st.floats(0.0, 3.0))
    def take(self, room: int, seconds: float) -> None:
        self.now += seconds
        asked: list[QueuedRequest] = []

        def can_place(item: QueuedRequest) -> bool:
            asked.append(item)
            return item.tokens <= room

        item = self.admission.take(can_place, self.now)
        self.end_late()
        assert bool(asked) == bool(self.waiting), "somebody waits, so somebody is next"
        if item is None:
            assert all(head.tokens > room for head in asked)
            return
        assert asked == [item]
        assert item.latest_start >= self.now
        self.check_order(item)
        del self.waiting[item.id]
        self.given.append(item)
        key = (item.tenant, item.priority)
        self.served[key] = self.served.get(key, 0.0) + item.tokens / item.weight

    def check_order(self, item: QueuedRequest) -> None:
        same = [other for other in self.waiting.values() if other.tenant == item.tenant]
        first = min((o for o in same if o.priority == item.priority), key=lambda o: list(self.waiting).index(o.id))
        assert item.id == first.id, "a tenant's requests of one level are served in order"
        for priority in {other.priority for other in self.waiting.values()} - {item.priority}:
            level = [other for other in self.waiting.values() if other.priority == priority]
            newest = max(other.arrived + priority * self.config.priority_aging for other in level)
            key = item.arrived + item.priority * self.config.priority_aging
            assert key <= newest, "every request of another level had the better claim"

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.admission.remove(name) == self.waiting.pop(name)

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        item = self.given.pop(data.draw(st.integers(0, len(self.given) - 1)))
        self.admission.put_back(item)
        self.waiting = {item.id: item, **self.waiting}

    @rule(seconds=st.floats(0.0, 10.0))
    def expire(self, seconds: float) -> None:
        self.now += seconds
        self.end_late()
        assert all(item.latest_start >= self.now for item in self.waiting.values())

    def end_late(self) -> None:
        for item in self.admission.expire(self.now):
            assert item.latest_start < self.now
            del self.waiting[item.id]

    @invariant()
    def nothing_is_lost(self) -> None:
        self.admission.check()
        assert len(self.admission) == len(self.waiting)
        assert self.admission.tokens == sum(item.tokens for item in self.waiting.values())

    @invariant()
    def tenants_that_wait_get_their_shares(self) -> None:
        waits = {(item.tenant, item.priority) for item in self.waiting.values()}
        for one, level in sorted(waits):
            for other, other_level in sorted(waits):
                if one >= other or level != other_level:
                    continue
                lead = self.served.get((one, level), 0.0) - self.served.get((other, level), 0.0)
                start = self.since.setdefault((one, other, level), lead)
                bound = LARGEST / WEIGHTS[one] + LARGEST / WEIGHTS[other]
                assert abs(lead - start) <= bound + 1e-6
        both = {(a, b, level) for a, level in waits for b, other in waits if level == other}
        self.since = {key: lead for key, lead in self.since.items() if key in both}

    def teardown(self) -> None:
        """Whatever happened before: all that wait come out."""
        out = []
        while (item := self.admission.take(any_room, self.now)) is not None:
            out.append(item.id)
        late = [item.id for item in self.admission.expire(self.now)]
        assert sorted(out + late) == sorted(self.waiting)


Adversary.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAdversary = Adversary.TestCase
