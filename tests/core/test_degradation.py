"""Degradation: enters and leaves when it should, cannot flap, always returns, is the same for the same history."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.degradation import BadDegradation, DegradationPolicy, Degrader, check_policies

POLICY = DegradationPolicy(
    fallback="small", down_seconds=2, over_limit_seconds=5, leave_seconds=10, max_leave_seconds=40, relapse_seconds=100
)
MODELS = ["big", "small"]


def degrader(**changes: object) -> Degrader:
    return Degrader({"big": msgspec.structs.replace(POLICY, **changes)}, MODELS)


def drive(subject: Degrader, ready: int, wait: float, start: float, end: float) -> list[tuple[float, str]]:
    """Observe every half second; returns when the phase changed."""
    changes = []
    for half in range(round(start * 2), round(end * 2)):
        change = subject.observe("big", ready, wait, half / 2)
        subject.check()
        if change is not None:
            changes.append((half / 2, change.phase))
    return changes


def test_a_model_that_is_down_is_served_by_its_fallback_and_comes_back_by_shares() -> None:
    subject = degrader()
    assert drive(subject, 1, 0, 0, 5) == []
    assert subject.serve_by("big", False, "r", 5) == "big"
    assert drive(subject, 0, 0, 5, 8) == [(7, "degraded")]
    assert subject.serve_by("big", False, "r", 8) == "small"
    assert subject.served_by("big") == "small"
    assert drive(subject, 1, 0, 8, 20) == [(18, "returning")]
    back = [sum(subject.serve_by("big", False, f"r{i}", now) == "big" for i in range(1000)) for now in (18, 20.5, 25.5)]
    assert back[0] == 0 and 200 < back[1] < 300 and 700 < back[2] < 800
    assert drive(subject, 1, 0, 20, 30) == [(28, "own")]
    assert subject.serve_by("big", False, "r", 30) == "big" and subject.served_by("big") == ""


def test_a_key_that_has_gone_back_stays_back() -> None:
    subject = degrader()
    drive(subject, 0, 0, 0, 5)
    drive(subject, 1, 0, 5, 15.5)
    assert subject.phase("big") == "returning"
    back: set[str] = set()
    for now in range(15, 26):
        served = {key for key in map(str, range(200)) if subject.serve_by("big", False, key, now) == "big"}
        assert back <= served
        back = served
    assert len(back) == 200


def test_short_trouble_is_waited_out() -> None:
    subject = degrader()
    assert drive(subject, 0, 0, 0, 2) == []
    assert drive(subject, 1, 99, 2, 7) == []
    assert drive(subject, 1, 0, 7, 60) == []


def test_a_full_queue_or_a_long_wait_is_over_the_limit_only_where_the_policy_says_so() -> None:
    assert drive(degrader(), 1, math.inf, 0, 8) == [(5, "degraded")]
    assert drive(degrader(), 1, 10.5, 0, 8) == [(5, "degraded")]
    assert drive(degrader(), 1, 10.0, 0, 8) == []
    assert drive(degrader(when=("down",)), 1, math.inf, 0, 60) == []
    assert drive(degrader(when=("over_limit",)), 0, 0, 0, 60) == []


def test_each_relapse_doubles_the_wait_up_to_the_cap_and_a_late_one_starts_anew() -> None:
    subject = degrader(ramp_seconds=0)
    now, waits = 0.0, []
    for _ in range(5):
        assert drive(subject, 0, 0, now, now + 3)[0][1] == "degraded"
        left = drive(subject, 1, 0, now + 3, now + 60)
        waits.append(left[0][0] - (now + 3))
        now += 60
    assert waits == [10, 20, 40, 40, 40]
    assert drive(subject, 1, 0, now, now + 200) == []
    drive(subject, 0, 0, now + 200, now + 203)
    assert drive(subject, 1, 0, now + 203, now + 220)[0][0] == now + 213


def test_requests_may_opt_out() -> None:
    subject = degrader()
    drive(subject, 0, 0, 0, 5)
    assert subject.serve_by("big", True, "r", 5) == "big"
    assert subject.serve_by("other", False, "r", 5) == "other"


def test_chains_go_to_the_first_that_can_and_never_to_one_that_is_down() -> None:
    policies = {"a": DegradationPolicy(fallback="b"), "b": DegradationPolicy(fallback="c")}
    subject = Degrader(policies, ["a", "b", "c"])

    def say(**ready: int) -> str:
        for now in (0.0, 3.0):
            for model, count in ready.items():
                subject.observe(model, count, 0, now)
        return subject.serve_by("a", False, "r", 3)

    assert say(a=0, b=1, c=1) == "b"
    assert say(a=0, b=0, c=1) == "c"
    assert subject.served_by("a") == "c"
    assert say(a=0, b=0, c=0) == "a"
    assert subject.served_by("a") == ""


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ({"big": "big"}, "models.big.fallback makes a circle: big -> big"),
        ({"big": "small", "small": "big"}, "models.small.fallback makes a circle: big -> small -> big"),
        ({"big": "smal"}, "models.big.fallback names 'smal', which is no model; the nearest model is 'small'"),
    ],
)
def test_bad_chains_are_named(policies: dict[str, str], message: str) -> None:
    with pytest.raises(BadDegradation) as error:
        check_policies({name: DegradationPolicy(fallback=to) for name, to in policies.items()}, MODELS)
    assert str(error.value) == message


def test_negative_and_not_a_number_seconds_are_refused() -> None:
    for value in (-1.0, math.nan):
        with pytest.raises(BadDegradation, match="models.big.leave_seconds is"):
            degrader(leave_seconds=value)


HISTORY = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([0.0, 9.0, 11.0, math.inf]), st.floats(0.05, 20)), max_size=150
)


@given(HISTORY)
def test_whatever_happens_it_does_not_flap_and_it_returns(history: list[tuple[int, float, float]]) -> None:
    subject, twin = degrader(), degrader()
    now, last = 0.0, {"degraded": -math.inf, "returning": -math.inf}
    for ready, wait, passed in history:
        now += passed
        change = subject.observe("big", ready, wait, now)
        assert twin.observe("big", ready, wait, now) == change
        assert twin.serve_by("big", False, "r", now) == subject.serve_by("big", False, "r", now)
        subject.check()
        if change is not None and change.phase == "degraded":
            assert now - last["degraded"] >= POLICY.leave_seconds
            assert ready == 0 or wait > POLICY.max_wait
        if change is not None and change.phase == "returning":
            assert now - last["degraded"] >= POLICY.leave_seconds and ready and wait <= POLICY.max_wait
        if change is not None:
            last[change.phase] = now
    clear = now
    while now < clear + POLICY.max_leave_seconds + POLICY.ramp_seconds + 2:
        now += 0.5
        subject.observe("big", 1, 0, now)
    assert subject.phase("big") == "own"
    assert subject.serve_by("big", False, "r", now) == "big"
