"""The OpenAI dialect of an endpoint, against a scripted server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from shoal.core.types import Grammar, Rejected, Sampling
from shoal.serve.endpoint import EndpointStartError
from shoal.serve.openai_endpoint import OpenAIEndpoint
from tests import virtual_time
from tests.serve.openai_fleet import (
    SAMPLED,
    RecordedAttempt,
    RecordedFleet,
    endpoint_at,
    failure,
    request,
    result,
    undisturbed,
)
from tests.serve.openai_server import Fault, OpenAIServer, next_token

# --- start ----------------------------------------------------------------------------------------------------------


def test_start_learns_what_the_server_says() -> None:
    async def main() -> None:
        async with (
            OpenAIServer() as server,
            endpoint_at(server.url + "/v1/", api_key="k") as (e, _),
        ):
            assert (e.info.max_len, e.info.vocab_size, e.info.block_size, e.info.num_blocks) == (512, 997, 32, 77)
            assert not e.info.exact_resume
            assert server.headers[0]["authorization"] == "bearer k"
        async with OpenAIServer(owned_by="shoal") as server, endpoint_at(server.url) as (e, _):
            assert e.info.exact_resume

    virtual_time.run(main())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ["tiny-1", "tiny-2"]}, "it has 'tiny-1', 'tiny-2': say which one to use with `model`"),
        ({"models": ["tinny"], "model": "tiny"}, "it has no model 'tiny'; did you mean 'tinny'?"),
        ({"models": []}, "it has no model: say which one"),
        ({"dies": True}, "refuses connections"),
    ],
)
def test_what_cannot_be_started_says_why(change: dict[str, Any], message: str) -> None:
    async def main() -> None:
        async with OpenAIServer() as server:
            server.models = change.get("models", ["tiny"])
            if "dies" in change:
                await server.die()
            with pytest.raises(EndpointStartError) as caught:
                async with endpoint_at(server.url, model=change.get("model")):
                    pass
            assert message in str(caught.value)
            assert str(caught.value).startswith(f"endpoint 'e' at {server.url}: ")

    virtual_time.run(main())


def test_an_address_must_be_one() -> None:
    with pytest.raises(ValueError, match="'127.0.0.1:8000' is not an address like http"):
        OpenAIEndpoint("e", "127.0.0.1:8000", vocab_size=997)


# --- outputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [None, 1, 7, 1000])
def test_tokens_arrive_whole_however_they_are_cut(cut: int | None) -> None:
    async def main() -> None:
        wanted = request(n=3, sampling=Sampling(temperature=1.0, seed=9, logprobs=2))
        async with OpenAIServer(cut=cut) as server, endpoint_at(server.url) as (endpoint, _):
            attempt = await result(endpoint, wanted)
        assert attempt.reason is None
        for index in range(3):
            expected: list[int] = []
            for position in range(12):
                expected.append(next_token([3, 1, 4, *expected], 9 + index, position))
            assert attempt.tokens[index] == expected
            assert [entry.top_ids for entry in attempt.logprobs[index]] == [[token, 0] for token in expected]
            assert attempt.finished[index].finish == "length"
        assert attempt.outputs[-1].num_cached == 3, "the usage behind the last token belongs to it"

    virtual_time.run(main())


def test_a_stop_token_is_the_last_one_and_told() -> None:
    async def main() -> None:
        tokens = (await undisturbed(request())).tokens[0]
        attempt = await undisturbed(request(stop_token_ids=[tokens[4]], min_tokens=2))
        assert attempt.tokens[0] == tokens[: tokens.index(tokens[4]) + 1]
        assert attempt.finished[0].finish == "stop"
        assert attempt.finished[0].stop_token == tokens[4]

    virtual_time.run(main())


def test_every_field_of_a_request_is_sent() -> None:
    async def main() -> None:
        sampling = Sampling(
            temperature=0.5,
            top_k=7,
            top_p=0.9,
            min_p=0.1,
            presence_penalty=0.2,
            frequency_penalty=0.3,
            repetition_penalty=1.1,
            logit_bias={5: -2.0},
            seed=2**63 - 1,
            logprobs=0,
            grammar=Grammar("choice", '["a","b"]', ""),
        )
        wanted = request(
            sampling=sampling, n=2, min_tokens=1, stop_token_ids=[8], cache_salt="s", priority=3, deadline=1e12
        )
        async with OpenAIServer() as server, endpoint_at(server.url) as (endpoint, _):
            await result(endpoint, wanted)
            body = server.bodies[-1]
        assert body.pop("seed") in (2**62 - 1, 2**62), "one above the other, and both within 64 bits"
        assert body == {
            "model": "tiny",
            "prompt": [3, 1, 4],
            "max_tokens": 12,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "min_p": 0.1,
            "presence_penalty": 0.2,
            "frequency_penalty": 0.3,
            "repetition_penalty": 1.1,
            "min_tokens": 1,
            "stop_token_ids": [8],
            "logit_bias": {"5": -2.0},
            "logprobs": 0,
            "return_tokens_as_token_ids": True,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "cache_salt": "s",
            "priority": 3,
            "structured_outputs": {"choice": ["a", "b"]},
        }
        async with OpenAIServer(owned_by="shoal") as server, endpoint_at(server.url) as (endpoint, _):
            await result(endpoint, wanted)
            own = server.bodies[-1]
        assert own["n"] == 2 and own["seed"] == 2**63 - 1 and own["timeout"] > 0

    virtual_time.run(main())


@pytest.mark.parametrize(
    ("grammar", "vllm", "sglang"),
    [
        (Grammar("json_schema", "{}", ""), {"json": "{}"}, ("json_schema", "{}")),
        (Grammar("json_object", "", ""), {"json_object": True}, ("json_schema", '{"type": "object"}')),
        (Grammar("regex", "a+", ""), {"regex": "a+"}, ("regex", "a+")),
        (Grammar("ebnf", "root ::= 'a'", ""), {"grammar": "root ::= 'a'"}, ("ebnf", "root ::= 'a'")),
        (Grammar("choice", '["a.b","c"]', ""), {"choice": ["a.b", "c"]}, ("regex", "(a\\.b|c)")),
    ],
)  # fmt: skip
def test_a_grammar_is_sent_in_the_servers_words(
    grammar: Grammar, vllm: dict[str, Any], sglang: tuple[str, str]
) -> None:
    async def main() -> None:
        wanted = request(sampling=Sampling(temperature=0.0, grammar=grammar), stop_token_ids=[2])
        async with OpenAIServer() as server, endpoint_at(server.url) as (endpoint, _):
            await result(endpoint, wanted)
            assert server.bodies[-1]["structured_outputs"] == vllm
        async with OpenAIServer(owned_by="sglang") as server, endpoint_at(server.url) as (endpoint, _):
            await result(endpoint, wanted)
            assert server.bodies[-1][sglang[0]] == sglang[1]
            assert "ignore_eos" not in server.bodies[-1], "SGLang would ignore the stop ids with it"

    virtual_time.run(main())


def test_connections_are_kept() -> None:
    async def main() -> None:
        async with OpenAIServer() as server, endpoint_at(server.url) as (endpoint, _):
            for i in range(20):
                await result(endpoint, request(id=f"r{i}"))
            assert server.num_connections <= 4, "one for requests, one for polls, two ahead"

    virtual_time.run(main())


# --- leaving --------------------------------------------------------------------------------------------------------


def test_abort_closes_the_connection_and_nothing_is_called_any_more() -> None:
    async def main() -> None:
        async with OpenAIServer(step_seconds=0.002) as server, endpoint_at(server.url) as (endpoint, _):
            attempt = RecordedAttempt(request(max_tokens=10_000))
            endpoint.submit(attempt)
            await attempt.wait_for_tokens(2)
            assert server.running == 1
            endpoint.abort("r")
            attempt.given_up = True
            async with asyncio.timeout(5):
                while server.running:
                    await asyncio.sleep(0.005)
            assert server.closed_by_client == 1
            endpoint.abort("r")
            endpoint.abort("unknown", 3)

    virtual_time.run(main())


@pytest.mark.parametrize(("server_kind", "closed"), [("vllm", 3), ("shoal", 1)])
def test_abort_of_one_sequence_leaves_the_others(server_kind: str, closed: int) -> None:
    """A stream is closed once nothing is left to generate in it: each by itself, or one for both."""

    async def main() -> None:
        wanted = request(n=2, sampling=SAMPLED, max_tokens=30)
        whole = await undisturbed(wanted)
        async with (
            OpenAIServer(owned_by=server_kind, step_seconds=0.001) as server,
            endpoint_at(server.url) as (endpoint, _),
        ):
            attempt = RecordedAttempt(wanted)
            endpoint.submit(attempt)
            await attempt.wait_for_tokens(2)
            endpoint.abort("r", 0)
            attempt.aborted(0)
            await attempt.wait()
            assert attempt.tokens[1] == whole.tokens[1]
            both = RecordedAttempt(request(id="r2", n=2, max_tokens=10_000))
            endpoint.submit(both)
            await both.wait_for_tokens(1)
            for index in (0, 1):
                endpoint.abort("r2", index)
                both.aborted(index)
            async with asyncio.timeout(5):
                while server.running:
                    await asyncio.sleep(0.005)
            assert server.closed_by_client == closed

    virtual_time.run(main())


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [("reset", "lost"), ("eof", "lost"), ("error_event", "error"), ("abort", "error"), ("no_ids", "error")],
)
def test_a_stream_that_breaks_is_a_failure(kind: str, expected: str, after: int) -> None:
    async def main() -> None:
        async with OpenAIServer() as server, endpoint_at(server.url) as (endpoint, _):
            fault = Fault(kind=kind, after=after)
            server.faults = [fault]
            attempt = await result(endpoint, request(n=2))
            assert fault.happened
            assert failure(attempt).kind == expected
            if kind != "no_ids":
                assert len(attempt.tokens.get(0, [])) == after
            control = await result(endpoint, request(id="control", n=2))
            assert control.reason is None and len(control.finished) == 2

    virtual_time.run(main())


@pytest.mark.parametrize(
    ("status", "kind", "retry_after"),
    [(429, "overloaded", 2.5), (503, "overloaded", None), (500, "error", None), (401, "error", None)],
)
def test_statuses_of_the_server_are_failures(status: int, kind: str, retry_after: float | None) -> None:
    async def main() -> None:
        async with OpenAIServer() as server, endpoint_at(server.url) as (endpoint, _):
            headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
            server.faults = [Fault(kind="status", status=status, headers=headers, body={"error": {"message": "busy"}})]
            attempt = await result(endpoint, request())
            assert failure(attempt).kind == kind and failure(attempt).retry_after == retry_after
            assert f"{status}: busy" in failure(attempt).message
            assert (await result(endpoint, request(id="control"))).reason is None

    virtual_time.run(main())


def test_a_mistake_of_the_client_is_the_answer() -> None:
    async def main() -> None:
        async with OpenAIServer() as server, endpoint_at(server.url) as (endpoint, _):
            body = {"error": {"message": "top_k is wrong", "param": "top_k"}}
            server.faults = [Fault(kind="status", status=400, body=body)]
            attempt = await result(endpoint, request())
            assert attempt.reason == Rejected("r", "top_k is wrong", "top_k")

    virtual_time.run(main())


def test_a_killed_server_fails_what_runs_and_is_gone_at_once() -> None:
    async def main() -> None:
        async with OpenAIServer(step_seconds=0.002) as server, endpoint_at(server.url) as (endpoint, fleet):
            attempts = [RecordedAttempt(request(id=f"r{i}", max_tokens=10_000)) for i in range(8)]
            for attempt in attempts:
                endpoint.submit(attempt)
            for attempt in attempts:
                await attempt.wait_for_tokens(1)
            assert fleet.gone_because is None
            await server.die()
            for attempt in attempts:
                await attempt.wait()
                assert failure(attempt).kind == "lost"
            async with asyncio.timeout(0.45):  # not by the next regular poll
                await fleet.is_gone.wait()
            late = await result(endpoint, request(id="late"))
            assert failure(late).kind == "refused"

    virtual_time.run(main())


def test_a_dead_server_whose_balancer_accepts_connections_and_closes_them_is_gone() -> None:
    async def main() -> None:
        async with OpenAIServer() as server, endpoint_at(server.url) as (endpoint, fleet):
            port = int(server.url.rsplit(":", 1)[1])
            closed = 0

            def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                nonlocal closed
                closed += 1
                writer.close()

            server._server.close()
            balancer = await asyncio.start_server(close, "127.0.0.1", port)
            server.close_idle_connections()
            async with balancer:
                # Requests that keep coming are no reason to believe in it.
                async with asyncio.timeout(60):
                    number = 0
                    while fleet.gone_because is None:
                        number += 1
                        endpoint.submit(late := RecordedAttempt(request(id=f"late{number}")))
                        await asyncio.sleep(0.001)
                    await late.wait()
                    assert failure(late).kind == "lost"
            assert closed >= 3 and "closed before" in (fleet.gone_because or "")

    asyncio.run(main())  # by the real clock: requests keep coming, and time would stand still


def test_one_connection_that_is_closed_says_nothing_of_a_server() -> None:
    async def main() -> None:
        async with OpenAIServer() as server, endpoint_at(server.url) as (endpoint, fleet):
            port = int(server.url.rsplit(":", 1)[1])
            was_closed = asyncio.Event()

            def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                balancer.close()  # the next connection is the server's
                writer.close()
                was_closed.set()

            server._server.close()
            balancer = await asyncio.start_server(close, "127.0.0.1", port)
            server.close_idle_connections()
            await was_closed.wait()  # it was the poll's
            server._server = await asyncio.start_server(server._serve, "127.0.0.1", port)
            assert (await result(endpoint, request())).reason is None
            assert fleet.gone_because is None

    virtual_time.run(main())


def test_a_server_that_shuts_down_may_complete_its_streams_but_not_hold_them() -> None:
    async def main() -> None:
        async with OpenAIServer(step_seconds=0.02) as server, endpoint_at(server.url) as (endpoint, fleet):
            fault = Fault(kind="hang", after=3)
            server.faults = [fault]
            held, completed = RecordedAttempt(request(id="held")), RecordedAttempt(request(id="c", max_tokens=120))
            for attempt in (held, completed):
                endpoint.submit(attempt)
                await attempt.wait_for_tokens(2)
            server.shut_down()
            await held.wait()
            assert fault.happened and failure(held).kind == "lost"
            assert not completed.over.is_set() and fleet.gone_because is None
            await completed.wait()
            assert completed.reason is None and len(completed.tokens[0]) == 120
            async with asyncio.timeout(5):
                await fleet.is_gone.wait()

    virtual_time.run(main())


def test_an_endpoint_that_was_gone_can_be_started_again() -> None:
    async def main() -> None:
        async with OpenAIServer() as server, endpoint_at(server.url) as (endpoint, fleet):
            port = int(server.url.rsplit(":", 1)[1])
            await server.die()
            async with asyncio.timeout(5):
                await fleet.is_gone.wait()
            with pytest.raises(EndpointStartError, match="refuses connections"):
                await endpoint.start(RecordedFleet())
            server._server = await asyncio.start_server(server._serve, "127.0.0.1", port)
            await endpoint.start(RecordedFleet())
            assert (await result(endpoint, request())).reason is None

    virtual_time.run(main())


def test_a_kept_connection_that_the_server_closed_is_no_failure() -> None:
    async def main() -> None:
        async with OpenAIServer() as server, endpoint_at(server.url) as (endpoint, _):
            await result(endpoint, request())
            server.close_idle_connections()
            # At once: the client has not heard of it yet.
            assert (await result(endpoint, request(id="next"))).reason is None

    virtual_time.run(main())


def test_a_silent_stream_is_hung_only_when_the_server_makes_no_step() -> None:
    async def main() -> None:
        async with OpenAIServer() as server, endpoint_at(server.url, idle_seconds=1.0) as (endpoint, _):
            server.faults = [Fault(kind="hang", after=3), Fault(kind="hang", after=3)]
            attempt = RecordedAttempt(request())
            endpoint.submit(attempt)
            for _ in range(20):  # it waits in the server's queue, say
                server.steps += 1
                await asyncio.sleep(0.1)
            assert attempt.reason is None and len(attempt.tokens[0]) == 3
            await attempt.wait()
            assert failure(attempt).kind == "hung"

    virtual_time.run(main())


def test_a_server_that_hangs_reports_nothing_and_is_asked_once() -> None:
    async def main() -> None:
        async with OpenAIServer() as server, endpoint_at(server.url) as (endpoint, fleet):
            async with asyncio.timeout(5):
                while not fleet.reports:
                    await asyncio.sleep(0.01)
            server.polls_answered.clear()
            await asyncio.sleep(1.1)
            before = len(fleet.reports)
            await asyncio.sleep(1.5)
            assert len(fleet.reports) == before and fleet.gone_because is None
            assert server.most_open_polls == 1
            server.polls_answered.set()
            async with asyncio.timeout(5):
                while len(fleet.reports) == before:
                    await asyncio.sleep(0.01)

    virtual_time.run(main())


def test_steps_grow_with_the_servers_count_and_with_tokens() -> None:
    async def main() -> None:
        async with OpenAIServer(step_seconds=0.02) as server, endpoint_at(server.url) as (endpoint, fleet):
            steps = server.steps
            await result(endpoint, request(n=4, sampling=SAMPLED, max_tokens=60))
            seen = [report.steps for report in fleet.reports if report.steps is not None]
            assert len(seen) > 5, "steps are reported between polls"
            assert seen[-1] <= server.steps - steps
            async with asyncio.timeout(5):
                while fleet.reports[-1].steps != server.steps - steps:
                    await asyncio.sleep(0.05)
            async with asyncio.timeout(5):
                while fleet.reports[-1].num_running != 0:
                    await asyncio.sleep(0.05)
            assert fleet.reports[-1].kv_usage == 0.25 and fleet.reports[-1].num_waiting == 0

    virtual_time.run(main())


def test_without_metrics_an_answer_is_a_sign_of_life() -> None:
    async def main() -> None:
        async with OpenAIServer() as server:
            server.has_metrics = False
            async with endpoint_at(server.url) as (_, fleet):
                async with asyncio.timeout(5):
                    while len(fleet.reports) < 2:
                        await asyncio.sleep(0.05)
                assert fleet.reports[-1].num_running is None

    virtual_time.run(main())
