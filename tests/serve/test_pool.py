"""Requests over endpoints that do whatever they like: each token comes once, in order, and each request ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.core.fleet_types import EndpointReport, FailureKind
from shoal.core.retry_budget import RetryBudget
from shoal.core.types import Rejected
from tests import virtual_time
from tests.serve.scripted_fleet import LENGTH, Scene, ScriptedEndpoint, token


def play(scene: Callable[[], Any]) -> None:
    virtual_time.run(scene())


KINDS: tuple[FailureKind, ...] = ("lost", "refused", "overloaded", "hung", "error", "drained")
ACTIONS = st.one_of(
    st.tuples(st.just("ask"), st.integers(1, 3)),
    st.tuples(st.just("step"), st.integers(1, 5)),
    st.tuples(st.just("fail"), st.sampled_from(KINDS)),
    st.tuples(st.just("workers"), st.just(0)),
    st.tuples(st.just("die"), st.integers(0, 2)),
    st.tuples(st.just("late"), st.integers(0, 2)),
    st.tuples(st.just("abort"), st.integers(0, 2)),
    st.tuples(st.just("leave"), st.just(0)),
    st.tuples(st.just("drain"), st.integers(0, 2)),
    st.tuples(st.just("wait"), st.just(0)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ACTIONS, max_size=25), st.randoms(use_true_random=False))
def test_whatever_endpoints_do_each_token_comes_once_and_each_request_ends(actions: list[Any], random: Any) -> None:
    async def scene() -> None:
        async with Scene(3, most_lost=1000, most_retries=1000) as scene:
            for action, argument in actions:
                await scene.do(action, argument, random)
                for client in scene.clients.values():
                    client.check()
            for member in scene.fleet.members():
                member.draining = False
                member.breaker.reset()
            await scene.settle()
            await scene.finish()
            for endpoint in scene.endpoints:
                endpoint.speak_late()
            for client in scene.clients.values():
                client.check()
                assert client.error is None
                for index, finish in client.finish.items():
                    assert finish == "length" and len(client.tokens[index]) == LENGTH
            assert all(not member.attempts and not member.num_sequences for member in scene.fleet.members())

    virtual_time.run(scene())


def test_a_moved_request_goes_on_with_what_it_has() -> None:
    async def scene() -> None:
        async with Scene(2) as scene:
            request_id = scene.ask(n=2)
            ((endpoint, attempt_id),) = scene.running()
            endpoint.step(attempt_id, 5)
            endpoint.die()
            await scene.settle()
            ((other, moved),) = scene.running()
            assert other is not endpoint and other.attempts[moved][0].request.resume == {
                index: [token(index, position) for position in range(5)] for index in range(2)
            }
            await scene.finish()
            assert scene.pool.migrations == 1
            scene.clients[request_id].check()

    play(scene)


def test_an_endpoint_that_hangs_is_fenced_and_what_it_says_late_is_dropped() -> None:
    async def scene() -> None:
        async with Scene(2) as scene:
            request_id = scene.ask()
            ((endpoint, attempt_id),) = scene.running()
            endpoint.step(attempt_id, 2)
            scene.fleet.start_watching()
            member = scene.fleet.member(endpoint.name)
            epoch = member.epoch
            await asyncio.sleep(0.8)
            assert member.state == "fenced" and member.epoch == epoch + 1
            ((other, moved),) = scene.running()
            assert other is not endpoint
            endpoint.speak_late()
            assert scene.clients[request_id].tokens == {0: [token(0, 0), token(0, 1)]}
            other.step(moved, 3)
            endpoint.speak_late()
            await scene.finish()
            assert scene.clients[request_id].tokens[0] == [token(0, p) for p in range(LENGTH)]
            endpoint.listener.reported(
                endpoint.name, EndpointReport(at=asyncio.get_running_loop().time(), steps=endpoint.steps + 1)
            )
            assert member.state == "ready"

    play(scene)


def test_with_nowhere_to_go_a_hung_endpoint_keeps_what_it_has() -> None:
    async def scene() -> None:
        async with Scene(1) as scene:
            scene.ask()
            scene.fleet.start_watching()
            await asyncio.sleep(0.8)
            assert scene.fleet.member("e0").state == "suspect" and len(list(scene.running())) == 1
            await scene.finish()

    play(scene)


def test_a_request_that_endpoints_die_of_is_given_up() -> None:
    async def scene() -> None:
        async with Scene(3, most_lost=3) as scene:
            poison, other = scene.ask(), scene.ask()
            for _ in range(3):
                endpoint = next(e for e in scene.endpoints if any(a.startswith(f"{poison}.") for a in e.attempts))
                for attempt_id in list(endpoint.attempts):
                    if attempt_id.startswith(f"{other}."):
                        endpoint.step(attempt_id)  # the other one gets on between the deaths
                endpoint.die()
                await scene.settle()
            error = scene.clients[poison].error
            assert error is not None and error.code == "endpoints_lost"
            await scene.finish()
            assert scene.clients[other].error is None and len(scene.clients[other].tokens[0]) == LENGTH

    play(scene)


def test_the_first_token_is_hedged_and_the_later_one_is_dropped() -> None:
    async def scene() -> None:
        async with Scene(2, hedge_seconds=0.05) as scene:
            request_id = scene.ask()
            assert len(list(scene.running())) == 1
            await asyncio.sleep(0.1)
            (slow, first), (quick, second) = scene.running()
            quick.step(second)
            assert not slow.attempts and scene.pool.hedges == 1
            slow.speak_late()
            await scene.finish()
            assert scene.clients[request_id].tokens[0] == [token(0, p) for p in range(LENGTH)]
            assert first != second

    play(scene)


def test_what_the_client_did_wrong_is_the_answer_and_no_failure() -> None:
    async def scene() -> None:
        async with Scene(2) as scene:
            request_id = scene.ask()
            ((endpoint, attempt_id),) = scene.running()
            attempt, _ = endpoint.attempts.pop(attempt_id)
            attempt.ended(Rejected(attempt_id, "that cannot be", "prompt"))
            error = scene.clients[request_id].error
            assert error is not None and error.status == 400 and error.param == "prompt"
            member = scene.fleet.member(endpoint.name)
            assert member.breaker.state == "closed" and member.failures == 0

    play(scene)


def test_room_is_kept_in_the_gateway() -> None:
    """What an endpoint cannot run at once waits here, where its turn is decided."""

    async def scene() -> None:
        async with Scene(0) as scene:
            endpoint = ScriptedEndpoint("small", max_sequences=2)
            scene.endpoints.append(endpoint)
            await scene.fleet.add(endpoint, scene.pool)
            for _ in range(5):
                scene.ask()
            assert len(endpoint.attempts) == 3 and scene.pool.status(0.0).waiting == 2
            await scene.finish()
            assert all(len(client.tokens[0]) == LENGTH for client in scene.clients.values())

    play(scene)


def test_a_deadline_ends_a_request_wherever_it_is() -> None:
    async def scene() -> None:
        async with Scene(1) as scene:
            scene.fleet.start_watching()
            request_id = scene.ask(deadline=asyncio.get_running_loop().time() + 0.2)
            ((endpoint, attempt_id),) = scene.running()
            endpoint.step(attempt_id, 2)
            await asyncio.sleep(0.8)
            client = scene.clients[request_id]
            assert client.finish == {0: "deadline"} and len(client.tokens[0]) == 2
            assert not endpoint.attempts

    play(scene)


def test_drain_waits_for_what_runs_and_moves_it_when_it_takes_too_long() -> None:
    async def scene() -> None:
        async with Scene(2) as scene:
            request_id = scene.ask()
            ((endpoint, attempt_id),) = scene.running()
            endpoint.step(attempt_id, 2)
            draining = asyncio.create_task(scene.fleet.drain(endpoint.name, 0.2))
            await asyncio.sleep(0.1)
            assert endpoint.attempts, "control: it is waited for"
            scene.ask()
            assert len(endpoint.attempts) == 1, "nothing new"
            await draining
            assert not endpoint.attempts
            await scene.finish()
            assert len(scene.clients[request_id].tokens[0]) == LENGTH

    play(scene)


def test_a_spare_has_what_the_only_other_endpoint_had_while_that_is_drained() -> None:
    async def scene() -> None:
        async with Scene(1, wait_seconds=5.0) as scene:
            spare = ScriptedEndpoint("spare")
            await scene.fleet.add(spare, scene.pool, spare=True)
            first = scene.ask()
            scene.endpoints[0].step(f"{first}.1", 4)
            assert not spare.attempts, "the control: nothing is lost or drained"
            await scene.fleet.drain("e0", 0.02)
            await scene.settle()
            assert len(spare.attempts) == 1, "what ran was moved"
            second = scene.ask()
            assert len(spare.attempts) == 2, "what is new goes there too"
            for request_id in list(spare.attempts):
                spare.step(request_id, LENGTH)
            for client in (scene.clients[first], scene.clients[second]):
                client.check()
                assert client.finish == {0: "length"}

    play(scene)


def test_without_any_endpoint_a_request_is_refused_after_a_while() -> None:
    async def scene() -> None:
        async with Scene(1, wait_seconds=0.3) as scene:
            scene.fleet.start_watching()
            scene.fleet.member("e0").become("down", "told")
            request_id = scene.ask()
            await asyncio.sleep(0.7)
            error = scene.clients[request_id].error
            assert error is not None and error.status == 503 and error.code == "no_endpoint"

    play(scene)


@pytest.mark.parametrize("kind", ["error", "overloaded", "refused"])
def test_retries_have_a_budget(kind: FailureKind) -> None:
    async def scene() -> None:
        async with Scene(2) as scene:
            scene.pool.dispatch.budget = RetryBudget(ratio=0.0, floor=2.0)
            request_id = scene.ask()
            for _ in range(3):
                ((endpoint, attempt_id),) = scene.running()
                endpoint.fail(attempt_id, kind)
                await scene.settle()
            error = scene.clients[request_id].error
            assert error is not None and error.status == 503 and error.code == "endpoint_failed"

    play(scene)


def test_a_request_does_not_go_again_and_again_to_an_endpoint_that_is_dead_and_not_known_to_be() -> None:
    async def scene() -> None:
        async with Scene(2, again_seconds=0.2) as scene:
            dead, other = scene.endpoints
            scene.fleet.member(other.name).draining = True
            first = scene.ask()
            ((endpoint, attempt_id),) = scene.running()
            assert endpoint is dead
            dead.fail(attempt_id, "lost")
            await scene.settle()
            assert not list(scene.running()), "it waits"
            # Others have not found out, and do not wait behind it.
            second = scene.ask()
            ((endpoint, attempt_id),) = scene.running()
            assert endpoint is dead and attempt_id.startswith(second)
            scene.fleet.member(other.name).draining = False
            scene.pool.pump_soon()
            await scene.settle()
            assert [running_id for running_id in other.attempts if running_id.startswith(first)]
            await scene.finish()
            assert scene.clients[first].error is None and scene.clients[first].finish == {0: "length"}

    play(scene)


def test_a_request_may_go_again_to_the_only_endpoint_there_is() -> None:
    async def scene() -> None:
        async with Scene(1, again_seconds=0.1) as scene:
            scene.fleet.start_watching()
            request_id = scene.ask()
            ((endpoint, attempt_id),) = scene.running()
            endpoint.fail(attempt_id, "lost")
            async with asyncio.timeout(5):
                while not list(scene.running()):
                    await asyncio.sleep(0.01)
            await scene.finish()
            assert scene.clients[request_id].finish == {0: "length"}

    play(scene)
