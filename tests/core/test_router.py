"""Router: any order of calls, and what each policy promises."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.core.fleet_types import EndpointReport, RouteRequest
from shoal.core.hashing import chain
from shoal.core.router import PolicyName, Router, RoutingConfig
from shoal.core.types import EngineLoad

POLICIES: list[PolicyName] = [
    "predicted_completion",
    "least_tokens",
    "prefix_affinity",
    "session_affinity",
    "round_robin",
]
NAMES = [f"e{i}" for i in range(4)]


def make(policy: PolicyName = "predicted_completion", names: list[str] = NAMES, sequences: int | None = 16) -> Router:
    router = Router(RoutingConfig(policy=policy, block_size=16))
    for name in names:
        router.add(name, sequences, 4096, 16, 0.0)
    return router


def ask(number: int, num_prompt: int = 100, **fields: object) -> RouteRequest:
    return RouteRequest(id=str(number), num_prompt=num_prompt, num_output=1000, **fields)  # type: ignore[arg-type]


def send(router: Router, request: RouteRequest, now: float, names: list[str] = NAMES) -> str:
    name = router.route(request, names, now)
    assert name is not None
    router.dispatched(request, name, now)
    return name


def load(running: int, waiting: int, tokens: int, steps: int) -> EngineLoad:
    return EngineLoad(
        num_waiting=waiting,
        num_running=running,
        num_blocks=4096,
        num_free_blocks=2048,
        num_live_tokens=running * 100,
        num_waiting_tokens=tokens,
        steps=steps,
        prompt_tokens=0,
        cached_tokens=0,
        generated_tokens=0,
        preemptions=0,
        in_flight=1,
        failures=0,
    )


class Model:
    """Endpoints that serve one request after the other and decode all of them in steps, each at its own pace."""

    def __init__(self, router: Router, names: list[str]) -> None:
        self.router = router
        self.pace = dict.fromkeys(names, 1.0)
        self.busy_until = dict.fromkeys(names, 0.0)
        self.prefilling: dict[str, list[tuple[float, str]]] = {name: [] for name in names}
        self.decoding: dict[str, dict[str, int]] = {name: {} for name in names}
        self.stepped = dict.fromkeys(names, 0.0)
        self.sent: list[tuple[float, str]] = []

    def send(self, request: RouteRequest, now: float) -> str:
        name = send(self.router, request, now, list(self.pace))
        begin = max(now, self.busy_until[name])
        self.busy_until[name] = begin + (0.01 + request.num_prompt * 1e-4) * self.pace[name]
        self.prefilling[name].append((self.busy_until[name], request.id))
        self.sent.append((now, name))
        return name

    def advance(self, now: float) -> None:
        for name, pace in self.pace.items():
            while self.prefilling[name] and self.prefilling[name][0][0] <= now:
                at, request_id = self.prefilling[name].pop(0)
                self.router.first_token(request_id, name, at)
                self.decoding[name][request_id] = 20
            if now - self.stepped[name] >= 0.02 * pace:
                self.stepped[name] = now
                going = self.decoding[name]
                if going:
                    self.router.progressed(name, len(going), now)
                for request_id in list(going):
                    going[request_id] -= 1
                    if not going[request_id]:
                        del going[request_id]
                        self.router.finished(request_id, name, 20, now, True)

    def run(self, seconds: float, rate: float, start: float) -> Counter[str]:
        """Requests at a rate; how many each endpoint got."""
        before, now, due = len(self.sent), start, start
        while now < start + seconds:
            while due <= now:
                self.send(ask(len(self.sent)), now)
                due += 1 / rate
            now += 0.005
            self.advance(now)
        return Counter(name for _, name in self.sent[before:])


# --- any calls ------------------------------------------------------------------------------------------------------

names = st.sampled_from([*NAMES, "unknown"])
ids = st.integers(0, 6)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("dispatched"), names, ids, st.integers(0, 5000)),
        st.tuples(st.just("first_token"), names, ids, st.just(0)),
        st.tuples(st.just("progressed"), names, ids, st.integers(0, 40)),
        st.tuples(st.just("finished"), names, ids, st.integers(0, 3000)),
        st.tuples(st.just("failed"), names, ids, st.integers(0, 3000)),
        st.tuples(st.just("reported"), names, ids, st.integers(0, 10_000)),
        st.tuples(st.just("blind"), names, ids, st.integers(0, 3)),
        st.tuples(st.just("remove"), names, ids, st.just(0)),
        st.tuples(st.just("add"), st.sampled_from(NAMES), ids, st.integers(0, 9)),
        st.tuples(st.just("wait"), names, ids, st.integers(0, 3000)),
    ),
    max_size=60,
)


def apply(router: Router, calls: list[tuple[str, str, int, int]]) -> list[str | None]:
    """Every call, in whatever order, and where a request would have gone after each of them."""
    now, chosen = 0.0, []
    for call, name, number, value in calls:
        shared = tuple(chain([number] * min(value, 320), 16))
        request = ask(number, value, blocks=shared, session=str(number % 3), avoid=("e0",) if value % 2 else ())
        if call == "dispatched":
            router.dispatched(request, name, now)
        elif call == "first_token":
            router.first_token(str(number), name, now)
        elif call == "progressed":
            router.progressed(name, value, now)
        elif call in ("finished", "failed"):
            router.finished(str(number), name, value, now, call == "finished")
        elif call == "reported":
            report = EndpointReport(at=now - number, load=load(number, value % 7, value, value))
            router.reported(name, report, now)
        elif call == "blind":
            fields = ({}, {"num_running": 3}, {"num_waiting": 2}, {"kv_usage": 1.0, "steps": 5})[value]
            router.reported(name, EndpointReport(at=now, **fields), now)
        elif call == "remove":
            router.remove(name)
        elif call == "add":
            router.add(name, number or None, value or None, 16, now)
        else:
            now += value / 1000
        router.check()
        chosen.append(router.route(request, NAMES, now))
        for prediction in router.predict(request, NAMES, now):
            assert prediction.completion >= prediction.first_token
            assert prediction.first_token >= 0
        for known in NAMES:
            assert router.outstanding(known) >= -1e-6
    return chosen


@settings(max_examples=60)
@given(st.sampled_from(POLICIES), steps)
def test_any_order_of_calls_keeps_the_books_and_finds_a_candidate(
    policy: PolicyName, calls: list[tuple[str, str, int, int]]
) -> None:
    router = make(policy)
    chosen = apply(router, calls)
    assert len(chosen) == len(calls)
    assert (router.route(ask(99), NAMES, 1e6) is None) == (not router.views)


@settings(max_examples=30)
@given(st.sampled_from(POLICIES), steps)
def test_equal_calls_give_equal_choices(policy: PolicyName, calls: list[tuple[str, str, int, int]]) -> None:
    assert apply(make(policy), calls) == apply(make(policy), calls)


@pytest.mark.parametrize("policy", POLICIES)
def test_route_changes_nothing(policy: PolicyName) -> None:
    router = make(policy)
    send(router, ask(0), 0.0)
    assert len({router.route(ask(1, session="s"), NAMES, 1.0) for _ in range(5)}) == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_only_candidates_and_what_failed_before_only_alone(policy: PolicyName) -> None:
    router = make(policy)
    assert router.route(ask(0), [], 0.0) is None
    assert router.route(ask(0), ["unknown"], 0.0) is None
    for number in range(8):
        assert router.route(ask(number, avoid=("e1",)), ["e1", "e2"], 0.0) == "e2"
        assert router.route(ask(number, avoid=("e1",)), ["e1"], 0.0) == "e1"


def test_a_clock_that_stands_still_spreads_requests_evenly() -> None:
    for policy in POLICIES:
        router = make(policy)
        counts = Counter(send(router, ask(number, session=str(number)), 5.0) for number in range(40))
        assert set(counts) == set(NAMES)
        if policy != "session_affinity":
            assert set(counts.values()) == {10}, policy


# --- what each promises ---------------------------------------------------------------------------------------------


def test_round_robin_takes_turns_and_a_newcomer_joins_in() -> None:
    router = make("round_robin", NAMES[:2])
    assert [send(router, ask(i), 0.0, NAMES[:2]) for i in range(4)] == ["e0", "e1", "e0", "e1"]
    router.add("e2", None, None, 16, 0.0)
    assert Counter(send(router, ask(i), 0.0, NAMES[:3]) for i in range(10, 19)) == {"e0": 3, "e1": 3, "e2": 3}


def test_least_tokens_avoids_the_long_prompt_that_round_robin_queues_behind() -> None:
    for policy, expected in (("least_tokens", False), ("round_robin", True)):
        router = make(policy)
        long = send(router, ask(0, 32_000), 0.0)
        later = [send(router, ask(i), 0.0) for i in range(1, 30)]
        assert (long in later) == expected


def test_sessions_stay_where_they_are_and_only_those_of_a_lost_endpoint_move() -> None:
    router = make("session_affinity")
    requests = [ask(i, session=f"session {i}") for i in range(200)]
    first = {r.session: router.route(r, NAMES, 0.0) for r in requests}
    assert min(Counter(first.values()).values()) > 25
    again = {r.session: make("session_affinity").route(r, list(reversed(NAMES)), 9.0) for r in requests}
    assert again == first
    left = {r.session: router.route(r, NAMES[1:], 0.0) for r in requests}
    assert all(left[session] == name for session, name in first.items() if name != "e0")


@pytest.mark.parametrize("policy", ["session_affinity", "prefix_affinity"])
def test_affinity_ends_at_the_load_limit(policy: PolicyName) -> None:
    router = make(policy)
    blocks = tuple(chain(list(range(96)), 16))
    chosen = [send(router, ask(i, session="s", blocks=blocks), 0.0) for i in range(400)]
    counts = Counter(chosen)
    assert chosen[0] == chosen[1]
    assert max(counts.values()) <= 1.25 * 100 + 6
    assert len(counts) == 4


def test_prefix_affinity_goes_where_most_of_the_prompt_is() -> None:
    router = make("prefix_affinity")
    one, other = tuple(chain([1] * 96, 16)), tuple(chain([2] * 96, 16))
    places = [send(router, ask(i, blocks=blocks), 0.0) for i, blocks in enumerate((one, other))]
    assert places[0] != places[1]
    for number, place in enumerate(places):
        router.finished(str(number), place, 5, 1.0, True)
    assert router.route(ask(9, blocks=other), NAMES, 1.0) == places[1]
    assert router.route(ask(9, blocks=one), NAMES, 1.0) == places[0]


def test_predicted_completion_weighs_a_hit_against_a_queue() -> None:
    router = make()
    shared = tuple(chain([7] * 1600, 16))
    home = send(router, ask(0, 1600, blocks=shared), 0.0)
    router.first_token("0", home, 0.2)
    router.finished("0", home, 20, 0.5, True)
    for other in (name for name in NAMES if name != home):  # so that ties do not decide
        router.dispatched(ask(1), other, 0.5)
        router.finished("1", other, 0, 0.5, False)
    assert router.route(ask(2, 1650, blocks=shared), NAMES, 0.6) == home
    router.dispatched(ask(3, 30_000), home, 0.6)
    assert router.route(ask(4, 1650, blocks=shared), NAMES, 0.6) != home


@pytest.mark.parametrize(("asked", "stays"), [(2, True), (10, False)])
def test_what_everybody_asks_for_is_copied_before_its_home_is_overloaded(asked: int, stays: bool) -> None:
    router = make()
    shared = tuple(chain([7] * 1600, 16))
    home = NAMES[0]
    for number in range(asked):
        router.dispatched(ask(number, 1650, blocks=shared), home, 0.0)
        router.finished(str(number), home, 0, 0.0, False)
    router.dispatched(ask(98, 800), home, 0.0)  # it would be shorter to wait for this than to compute the prompt anew
    home_first, other_first = (p.first_token for p in router.predict(ask(99, 1650, blocks=shared), NAMES[:2], 0.0))
    assert home_first < other_first
    assert (router.route(ask(99, 1650, blocks=shared), NAMES, 0.0) == home) is stays


def test_a_shared_system_prompt_is_no_hot_spot() -> None:
    busiest = {}
    for policy, limit in (("predicted_completion", 1.25), ("prefix_affinity", 1.25), ("prefix_affinity", 1e9)):
        router = Router(RoutingConfig(policy=policy, load_limit=limit, block_size=16))  # type: ignore[arg-type]
        for name in NAMES:
            router.add(name, 16, 4096, 16, 0.0)
        model = Model(router, NAMES)
        shared = tuple(chain([7] * 480, 16))
        now = 0.0
        for number in range(400):
            model.send(ask(number, 500, blocks=shared), now)
            now += 0.02
            model.advance(now)
        counts = Counter(name for _, name in model.sent)
        busiest[policy, limit] = max(counts.values())
        assert limit > 2 or len(counts) >= 3
    assert busiest["predicted_completion", 1.25] < 1.5 * 100
    assert busiest["prefix_affinity", 1.25] < 2 * 100
    assert busiest["prefix_affinity", 1e9] == 400  # without the limit there is one


def test_a_slow_endpoint_loses_traffic_gradually_is_probed_and_comes_back() -> None:
    router = make()
    model = Model(router, NAMES)
    even = model.run(10, 20, 0.0)
    assert min(even.values()) > 30
    model.pace["e2"] = 8.0
    model.run(4, 20, 10.0)
    slow = model.run(30, 20, 14.0)
    assert 1 <= slow["e2"] < 0.4 * 150
    model.pace["e2"] = 1.0
    model.run(40, 20, 44.0)
    back = model.run(20, 20, 84.0)
    assert back["e2"] > 0.6 * 100


def test_a_hang_is_seen_before_anything_is_measured() -> None:
    router = make()
    model = Model(router, NAMES)
    model.run(5, 20, 0.0)
    before = router.predict(ask(1000), ["e0"], 5.0)[0].first_token
    model.pace["e0"] = 1e6
    hung = model.run(5, 20, 5.0)
    assert router.requests("e0") >= 1
    assert hung["e0"] < 0.3 * 25
    after = [router.predict(ask(1001), ["e0"], 10.0 + more)[0].first_token for more in (0.0, 1.0, 2.0)]
    assert before < after[0] < after[1] < after[2]


def test_others_requests_count_while_their_report_is_fresh() -> None:
    router = make()
    for number in range(4):
        router.reported("e0", EndpointReport(at=0.1 * number, load=load(12, 6, 9000, number)), 0.1 * number)
    assert all(router.route(ask(i), NAMES, 0.4) != "e0" for i in range(4))
    fresh = router.predict(ask(9), ["e0", "e1"], 0.4)
    assert fresh[0].first_token > 2 * fresh[1].first_token
    stale = router.predict(ask(9), ["e0", "e1"], 60.0)
    assert stale[0].first_token == pytest.approx(stale[1].first_token)


def test_a_report_that_was_overtaken_is_dropped() -> None:
    router = make()
    router.reported("e0", EndpointReport(at=2.0, load=load(0, 0, 0, 9)), 2.0)
    router.reported("e0", EndpointReport(at=1.0, load=load(16, 30, 90_000, 5)), 2.1)
    both = router.predict(ask(0), ["e0", "e1"], 2.2)
    assert both[0].first_token == both[1].first_token


def test_a_full_endpoint_is_one_whose_sequences_must_end_first() -> None:
    router = make(names=["e0", "e1"], sequences=2)
    for number in range(2):
        router.dispatched(ask(number), "e0", 0.0)
        router.first_token(str(number), "e0", 0.1)
    full, empty = router.predict(ask(9), ["e0", "e1"], 0.2)
    assert full.first_token > empty.first_token + 0.5


def test_a_newcomer_is_supposed_to_be_as_fast_as_the_median() -> None:
    router = make()
    Model(router, NAMES).run(10, 20, 0.0)
    router.add("new", 16, 4096, 16, 10.0)
    new, old = router.speed("new", 10.0), router.speed("e0", 10.0)
    assert new is not None and old is not None
    assert old.known and not new.known
    assert new.prefill == pytest.approx(old.prefill, rel=0.5)
    assert new.decode_base == pytest.approx(old.decode_base, rel=0.5)


def test_a_removed_endpoint_comes_back_with_an_empty_cache() -> None:
    router = make("prefix_affinity")
    blocks = tuple(chain([1] * 96, 16))
    home = send(router, ask(0, blocks=blocks), 0.0)
    router.remove(home)
    assert router.route(ask(1, blocks=blocks), [home], 0.0) is None
    router.add(home, 16, 4096, 16, 1.0)
    assert router.requests(home) == 0
    assert router.prefixes.depth(home, blocks) == 0


def test_what_cannot_be_configured() -> None:
    with pytest.raises(ValueError, match="load_limit must be at least 1, got 0.5"):
        RoutingConfig(load_limit=0.5)
    with pytest.raises(ValueError, match="'fastest' is not known; the policies are"):
        Router(RoutingConfig(policy="fastest"))  # type: ignore[arg-type]
