"""What becomes of a request that its endpoint failed."""

from __future__ import annotations

import pytest

from shoal.core.failover import FailoverConfig, Trials
from shoal.core.fleet_types import EndpointFailure, FailureKind
from shoal.core.retry_budget import RetryBudget

CONFIG = FailoverConfig(most_retries=2, most_lost=3, again_seconds=0.5)
RICH = RetryBudget(ratio=1.0, floor=100.0)


def failure(kind: FailureKind) -> EndpointFailure:
    return EndpointFailure(kind=kind, message="as told")


@pytest.mark.parametrize("kind", ["lost", "hung"])
def test_so_many_endpoints_in_a_row_without_a_token_are_the_end(kind: FailureKind) -> None:
    trials = Trials()
    heard = (False, False, True, False, False, False)
    verdicts = [trials.verdict(failure(kind), CONFIG, RICH, heard=one, now=0.0) for one in heard]
    assert verdicts[:-1] == [None] * 5
    assert verdicts[-1] is not None and (verdicts[-1].status, verdicts[-1].code) == (500, "endpoints_lost")


def test_retries_are_counted_and_paid_for() -> None:
    trials = Trials()
    verdicts = [trials.verdict(failure("overloaded"), CONFIG, RICH, heard=False, now=0.0) for _ in range(3)]
    assert verdicts[:2] == [None, None]
    assert verdicts[2] is not None and verdicts[2].message == "no endpoint could answer: as told"
    poor = RetryBudget(ratio=0.0, floor=1.0)
    first, second = (Trials().verdict(failure("error"), CONFIG, poor, heard=True, now=0.0) for _ in range(2))
    assert first is None
    assert second is not None and (second.status, second.code) == (503, "endpoint_failed")


def test_what_is_drained_costs_nothing() -> None:
    trials, empty = Trials(), RetryBudget(ratio=0.0, floor=0.0)
    assert all(trials.verdict(failure("drained"), CONFIG, empty, heard=False, now=0.0) is None for _ in range(9))


def test_a_dead_endpoint_is_left_alone_for_a_moment_and_avoided_ever_after() -> None:
    trials, names = Trials(), ["a", "b", "c"]
    assert trials.open_to(names, CONFIG, 0.0) == names
    trials.failed_at("a", "lost", 1.0)
    trials.failed_at("b", "error", 1.0)
    trials.failed_at("a", "refused", 1.2)
    assert trials.open_to(names, CONFIG, 1.6) == ["b", "c"]
    assert trials.open_to(names, CONFIG, 1.7) == names
    assert trials.avoid == ("a", "b")
