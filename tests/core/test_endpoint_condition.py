"""Which endpoints may get requests, and what becomes of one that stands still."""

from __future__ import annotations

import pytest

from shoal.core.endpoint_condition import EndpointCondition, Judgement
from shoal.core.fleet_types import EndpointState
from shoal.core.health import HealthConfig

HEALTH = HealthConfig(stall_seconds=2.0, first_seconds=2.0, fence_seconds=0.5, idle_seconds=5.0)


class Four(EndpointCondition):
    """Runs four at once."""

    @property
    def most_sequences(self) -> int:
        return 4


def working(*, spare: bool = False) -> Four:
    """Ready since second 10, with work since then."""
    endpoint = Four("e", HEALTH, 0.0, spare=spare)
    endpoint.renewed(10.0)
    endpoint.watch.working(True, 10.0)
    return endpoint


def judged(endpoint: Four, now: float, *, others: bool = True, restartable: bool = True) -> EndpointState | None:
    """What it becomes, which it then is."""
    judgement = endpoint.judge(now, others=others, hung_seconds=30.0, restartable=restartable)
    if judgement is None:
        return None
    endpoint.enter(judgement.state, now, judgement.reason)
    return judgement.state


def test_it_is_suspected_then_fenced_then_started_anew() -> None:
    endpoint = working()
    assert [judged(endpoint, now) for now in (11.9, 12.1, 12.4, 12.6, 42.5, 42.7)] == [
        None, "suspect", None, "fenced", None, "down",
    ]  # fmt: skip
    assert endpoint.reason == "it was hung for too long"


def test_with_nowhere_to_go_it_keeps_what_it_has_until_it_is_started_anew() -> None:
    endpoint = working()
    assert [judged(endpoint, now, others=False) for now in (12.1, 13.0, 39.9, 40.1)] == ["suspect", None, None, "down"]
    assert endpoint.reason == "no step for 30.1 s"


def test_what_somebody_else_runs_is_never_started_anew() -> None:
    endpoint = working()
    assert [judged(endpoint, now, restartable=False) for now in (12.1, 12.6, 1e6)] == ["suspect", "fenced", None]
    assert judged(working(), 1e6, others=False, restartable=False) == "suspect"


def test_one_that_moves_again_is_no_suspect() -> None:
    endpoint = working()
    assert judged(endpoint, 12.1) == "suspect"
    endpoint.watch.stepped(12.2)
    assert endpoint.judge(12.3, others=True, hung_seconds=30.0, restartable=True) == Judgement("ready")


@pytest.mark.parametrize("state", ["starting", "down", "draining"])
def test_of_one_that_is_not_there_nothing_is_said(state: EndpointState) -> None:
    endpoint = working()
    endpoint.enter(state, 10.0)
    assert judged(endpoint, 1e6) is None


def test_room_is_for_a_little_more_than_runs_at_once() -> None:
    endpoint = working()
    for number, takes in ((0, True), (4, True), (5, False)):
        endpoint.num_sequences = number
        assert endpoint.takes(11.0, spares=False) == takes


def test_who_gets_requests() -> None:
    assert working().takes(11.0, spares=False) and working().is_well
    assert not working(spare=True).takes(11.0, spares=False)
    assert working(spare=True).takes(11.0, spares=True)
    draining = working()
    draining.draining = True
    assert not draining.takes(11.0, spares=True) and not draining.is_well
    suspect = working()
    suspect.enter("suspect", 11.0)
    assert not suspect.takes(11.0, spares=True)
    broken = working()
    for number in range(HEALTH.breaker_failures):
        broken.breaker.failed(str(number), "error", 11.0)
    assert not broken.takes(11.0, spares=True)
    broken.renewed(11.0)
    assert broken.takes(11.0, spares=True) and broken.epoch == 2
