"""Requests over endpoints: who goes first, who waits for room, and that nobody is lost on the way."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.core.admission import AdmissionConfig, QueuedRequest
from shoal.core.dispatch import Dispatch
from shoal.core.endpoint_condition import EndpointCondition
from shoal.core.failover import FailoverConfig, Trials
from shoal.core.fleet_types import EndpointFailure, FailureKind, RouteRequest
from shoal.core.health import HealthConfig
from shoal.core.retry_budget import RetryBudget
from shoal.core.router import Router, RoutingConfig

KINDS: tuple[FailureKind, ...] = ("lost", "refused", "overloaded", "hung", "error", "drained")


class Endpoint(EndpointCondition):
    @property
    def most_sequences(self) -> int:
        return 2  # and one more, for a slot that becomes free


class Flight:
    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.trials = Trials()
        self.waiting_since = now
        self.at: Endpoint | None = None
        self.times_placed = 0
        self.is_over = False

    @property
    def is_placed(self) -> bool:
        return self.at is not None

    @property
    def was_placed(self) -> bool:
        return self.times_placed > 0

    def route_now(self) -> RouteRequest:
        return RouteRequest(id=self.name, num_prompt=10, num_output=10, avoid=self.trials.avoid)


class Gateway:
    """Does what dispatch says, and remembers in what order."""

    def __init__(self, endpoints: int, spares: int = 0, **failover: float) -> None:
        self.now = 0.0
        self.router = Router(RoutingConfig(policy="least_tokens"))
        config = msgspec.convert({"again_seconds": 0.0, **failover}, FailoverConfig)
        budget = RetryBudget(ratio=1.0, floor=1000.0)
        self.dispatch: Dispatch[Flight, Endpoint] = Dispatch(self.router, AdmissionConfig(), config, budget, self.send)
        self.sent: list[tuple[str, str]] = []
        for number in range(endpoints + spares):
            self.add(f"e{number}", spare=number >= endpoints)

    def add(self, name: str, *, spare: bool = False) -> None:
        endpoint = Endpoint(name, HealthConfig(breaker_failures=1000), self.now, spare=spare)
        endpoint.renewed(self.now)
        self.dispatch.members[name] = endpoint
        self.router.add(name, 2, None, 16, self.now)

    def ask(self, name: str) -> Flight:
        flight = Flight(name, self.now)
        refused = self.dispatch.offer(flight, QueuedRequest(id=name, tokens=20, arrived=self.now), self.now)
        assert refused is None
        self.dispatch.pump(self.now)
        return flight

    def send(self, flight: Flight, endpoint: Endpoint, now: float) -> None:
        assert flight.at is None and not flight.is_over and endpoint.state == "ready"
        self.sent.append((flight.name, endpoint.name))
        flight.at, flight.times_placed = endpoint, flight.times_placed + 1
        endpoint.num_sequences += 1
        assert endpoint.num_sequences <= 3
        self.router.dispatched(flight.route_now(), endpoint.name, now)

    def leave(self, flight: Flight) -> Endpoint:
        endpoint = flight.at
        assert endpoint is not None
        flight.at = None
        endpoint.num_sequences -= 1
        self.router.finished(flight.name, endpoint.name, 10, self.now, True)
        return endpoint

    def finish(self, flight: Flight) -> None:
        self.leave(flight)
        self.end(flight)

    def end(self, flight: Flight) -> None:
        flight.is_over = True
        self.dispatch.over(flight.name)

    def fail(self, flight: Flight, kind: FailureKind) -> None:
        endpoint = self.leave(flight)
        flight.trials.failed_at(endpoint.name, kind, self.now)
        reason = EndpointFailure(kind=kind, message="as told")
        if self.dispatch.failed(flight, reason, heard=False, now=self.now) is not None:
            self.end(flight)


def test_what_has_no_room_waits_and_what_was_moved_goes_first() -> None:
    gateway = Gateway(1)
    flights = [gateway.ask(f"r{number}") for number in range(5)]
    assert [flight.is_placed for flight in flights] == [True, True, True, False, False]
    gateway.fail(flights[1], "drained")
    gateway.dispatch.pump(0.0)
    assert gateway.sent[-1] == ("r1", "e0") and gateway.dispatch.num_waiting == 2
    gateway.finish(flights[0])
    gateway.dispatch.pump(0.0)
    assert gateway.sent[-1] == ("r3", "e0")


def test_it_goes_elsewhere_while_there_is_an_elsewhere() -> None:
    gateway = Gateway(3)
    flight = gateway.ask("r")
    met = []
    for _ in range(4):
        assert flight.at is not None
        met.append(flight.at.name)
        gateway.fail(flight, "error")
        gateway.dispatch.pump(0.0)
    assert len(set(met[:3])) == 3


def test_one_that_found_an_endpoint_dead_waits_before_it_goes_there_again() -> None:
    gateway = Gateway(1, again_seconds=0.5)
    flight = gateway.ask("r")
    gateway.fail(flight, "lost")
    gateway.dispatch.pump(0.4)
    assert not flight.is_placed
    gateway.dispatch.pump(0.5)
    assert flight.is_placed


def test_spares_help_while_another_is_not_well() -> None:
    gateway = Gateway(1, spares=1)
    for number in range(4):
        gateway.ask(f"r{number}")
    assert {endpoint for _, endpoint in gateway.sent} == {"e0"}
    gateway.dispatch.members["e0"].enter("suspect", 1.0)
    gateway.dispatch.pump(1.0)
    assert gateway.sent[-1] == ("r3", "e1")


def test_who_waits_too_long() -> None:
    gateway = Gateway(1, wait_seconds=10.0)
    ours = [gateway.ask(f"r{number}") for number in range(4)]
    assert gateway.dispatch.abandoned(100.0) == []  # the last one's turn will come
    gateway.fail(ours[0], "drained")
    assert gateway.dispatch.abandoned(10.0) == []
    assert gateway.dispatch.abandoned(10.1) == [ours[0]]
    gateway.dispatch.members["e0"].enter("down", 0.0)
    assert gateway.dispatch.abandoned(10.1) == [ours[0], ours[3]]  # there is nobody


ACTIONS = st.tuples(
    st.sampled_from(["ask", "finish", "fail", "suspect", "ready", "remove", "add", "drain"]), st.integers(0, 9)
)


def act(gateway: Gateway, flights: list[Flight], action: str, number: int) -> None:
    placed = [flight for flight in flights if flight.at is not None]
    members = list(gateway.dispatch.members.values())
    if action == "ask":
        flights.append(gateway.ask(f"r{len(flights)}"))
    elif action == "add":
        gateway.add(f"at {gateway.now}")
    elif action in ("finish", "fail") and placed:
        flight = placed[number % len(placed)]
        if action == "finish":
            gateway.finish(flight)
        else:
            gateway.fail(flight, KINDS[number % len(KINDS)])
    elif members:
        member = members[number % len(members)]
        if action == "drain":
            member.draining = True
        elif action == "remove":
            del gateway.dispatch.members[member.name]
            for flight in [flight for flight in placed if flight.at is member]:
                gateway.fail(flight, "drained")
            gateway.router.remove(member.name)
        elif action in ("suspect", "ready"):
            member.enter("suspect" if action == "suspect" else "ready", gateway.now)


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTIONS, max_size=40))
def test_nobody_is_lost_and_nobody_is_in_two_places(actions: list[tuple[str, int]]) -> None:
    gateway, flights = Gateway(2), list[Flight]()
    for action, number in actions:
        gateway.now += 0.25
        act(gateway, flights, action, number)
        gateway.dispatch.pump(gateway.now)
        gateway.dispatch.queue.check()
        left = [flight for flight in flights if not flight.is_over]
        waiting = [flight for flight in left if not flight.is_placed]
        assert gateway.dispatch.flights == {flight.name: flight for flight in left}
        assert gateway.dispatch.num_waiting == len(waiting)
        # Somebody waits only where nobody has room.
        assert not waiting or not gateway.dispatch.candidates(gateway.now)
    gateway.add("last")
    while left := [flight for flight in flights if not flight.is_over]:
        gateway.now += 1.0
        gateway.dispatch.pump(gateway.now)
        assert any(flight.is_placed for flight in left)
        for flight in left:
            if flight.is_placed:
                gateway.finish(flight)
    assert not gateway.dispatch.num_waiting
