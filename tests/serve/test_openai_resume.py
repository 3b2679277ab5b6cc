"""Requests that go on at an OpenAI endpoint after another, scripted; and all of it against a real shoal server."""

from __future__ import annotations

import asyncio

import pytest

from shoal.core.types import Rejected, Sampling
from tests import virtual_time
from tests.serve.openai_fleet import (
    ALL,
    CONSTRAINED,
    GREEDY,
    PENALISED,
    SAMPLED,
    RecordedAttempt,
    endpoint_at,
    failure,
    fields_of,
    request,
    result,
    undisturbed,
)
from tests.serve.openai_server import Fault, OpenAIServer
from tests.serve.running import RunningServer, until

# --- going on elsewhere ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ALL.values(), ids=ALL)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_request_goes_on_as_it_would_have(sampling: Sampling, n: int, after: int) -> None:
    async def main() -> None:
        # A prompt in which nothing is unknown, so that a stop token comes up in some sequences.
        wanted = request(n=n, sampling=sampling, min_tokens=9)
        whole = await undisturbed(wanted)
        async with OpenAIServer() as server, endpoint_at(server.url) as (endpoint, _):
            fault = Fault(kind="reset", after=after)
            server.faults = [Fault(kind="none") for _ in range(n - 1)] + [fault]
            first = await result(endpoint, wanted)
            assert fault.happened and failure(first).kind == "lost"
            given = {i: first.tokens.get(i, []) for i in range(n) if i not in first.finished}
            resumed = await result(endpoint, request(**fields_of(wanted) | {"id": "again", "resume": given}))
            assert resumed.reason is None
        for i in range(n):
            assert first.tokens.get(i, []) + resumed.tokens.get(i, []) == whole.tokens[i]
        sent = server.bodies[-1]
        if sampling is GREEDY:
            assert sent["prompt"] == [3, 1, 4, *given[n - 1]], "nothing is generated twice"
            assert sent["max_tokens"] == 12 - len(given[n - 1])
            assert sent.get("min_tokens", 0) == 9 - len(given[n - 1])
        else:
            assert sent["prompt"] == [3, 1, 4]

    virtual_time.run(main())


@pytest.mark.parametrize("sampling", [SAMPLED, PENALISED])
@pytest.mark.parametrize("cut", [None, 11])
def test_a_replay_that_diverges_continues_from_what_was_delivered(sampling: Sampling, cut: int | None) -> None:
    async def main() -> None:
        given = (await undisturbed(request(sampling=sampling))).tokens[0][:6]
        async with OpenAIServer(cut=cut) as server, endpoint_at(server.url) as (endpoint, _):
            fault = Fault(kind="diverge", after=3)
            server.faults = [fault]
            attempt = await result(endpoint, request(sampling=sampling, resume={0: given}))
            assert fault.happened and attempt.reason is None
            assert len(attempt.tokens[0]) == 6, "no token of the diverging replay was passed on"
            assert server.bodies[-1]["prompt"] == [3, 1, 4, *given] and server.bodies[-1]["max_tokens"] == 6
            control = await result(endpoint, request(id="control", sampling=sampling, resume={0: given}))
            assert control.reason is None and server.bodies[-1]["prompt"] == [3, 1, 4]

    virtual_time.run(main())


def test_a_replay_that_ends_too_early_diverges() -> None:
    async def main() -> None:
        given = (await undisturbed(request(sampling=SAMPLED))).tokens[0][:6]
        async with OpenAIServer() as server, endpoint_at(server.url) as (endpoint, _):
            wanted = request(sampling=SAMPLED, resume={0: given}, stop_token_ids=[given[2]])
            attempt = await result(endpoint, wanted)
            assert attempt.reason is None and len(server.bodies) == 3, "probe, replay, continuation"
            assert server.bodies[-1]["prompt"] == [3, 1, 4, *given]

    virtual_time.run(main())


def test_a_structured_output_that_diverges_fails_rather_than_break_its_grammar() -> None:
    async def main() -> None:
        given = (await undisturbed(request(sampling=CONSTRAINED))).tokens[0][:6]
        async with OpenAIServer() as server, endpoint_at(server.url) as (endpoint, _):
            server.faults = [Fault(kind="diverge", after=3)]
            attempt = await result(endpoint, request(sampling=CONSTRAINED, resume={0: given}))
            assert failure(attempt).kind == "error"
            assert "structured output cannot be continued" in failure(attempt).message
            assert not attempt.outputs

    virtual_time.run(main())


def test_only_an_end_that_was_not_heard() -> None:
    async def main() -> None:
        given = (await undisturbed(request())).tokens[0]
        async with OpenAIServer() as server, endpoint_at(server.url) as (endpoint, _):
            attempt = await result(endpoint, request(resume={0: given}))
            assert attempt.finished[0].finish == "length" and attempt.tokens[0] == []

    virtual_time.run(main())


def test_a_shoal_server_is_told_what_was_generated() -> None:
    async def main() -> None:
        async with OpenAIServer(owned_by="shoal") as server, endpoint_at(server.url) as (endpoint, _):
            attempt = await result(endpoint, request(n=3, sampling=SAMPLED, resume={0: [5, 6], 2: []}))
            assert attempt.reason is None and sorted(attempt.finished) == [0, 2]
            assert server.bodies[-1]["resume"] == {"0": [5, 6], "2": []}
            assert server.bodies[-1]["n"] == 3

    virtual_time.run(main())


# --- a real shoal server --------------------------------------------------------------------------------------------


def test_a_real_server_generates(server: RunningServer) -> None:
    async def main() -> None:
        async with endpoint_at(server.url) as (endpoint, fleet):
            assert endpoint.info.exact_resume and endpoint.info.max_len == 8192
            wanted = request(n=2, max_tokens=40, sampling=Sampling(temperature=0.9, seed=3))
            first = await result(endpoint, wanted)
            assert first.reason is None and [len(first.tokens[i]) for i in (0, 1)] == [40, 40]
            again = await result(endpoint, request(**fields_of(wanted) | {"id": "again"}))
            assert again.tokens == first.tokens
            stop = first.tokens[0][5]
            stopped = await result(
                endpoint, request(**fields_of(wanted) | {"id": "s", "n": 1, "stop_token_ids": [stop]})
            )
            assert stopped.tokens[0] == first.tokens[0][: first.tokens[0].index(stop) + 1]
            assert stopped.finished[0].stop_token == stop
            await until(lambda: any(report.num_running is not None for report in fleet.reports), "a report")
            refused = await result(endpoint, request(id="long", prompt=[1] * 9000))
            assert isinstance(refused.reason, Rejected) and refused.reason.field == "prompt"

    asyncio.run(main())


def test_a_real_server_stops_what_is_aborted(server: RunningServer) -> None:
    async def main() -> None:
        async with endpoint_at(server.url) as (endpoint, _):
            attempt = RecordedAttempt(request(max_tokens=8000))
            endpoint.submit(attempt)
            await attempt.wait_for_tokens(1)
            assert await asyncio.to_thread(server.metric, "shoal:num_requests_running") == 1
            endpoint.abort("r")
            attempt.given_up = True
            await asyncio.to_thread(server.wait_for_metric, "shoal:num_requests_running", 0)

    asyncio.run(main())


def test_a_real_server_goes_on_exactly(server: RunningServer) -> None:
    async def main() -> None:
        async with endpoint_at(server.url) as (endpoint, _):
            sampling = Sampling(temperature=0.9, seed=3, frequency_penalty=0.5, logprobs=2)
            wanted = request(n=2, max_tokens=40, sampling=sampling, cache_salt="salt")
            whole = await result(endpoint, wanted)
            given = {0: whole.tokens[0][:7], 1: whole.tokens[1][:25]}
            resumed = await result(endpoint, request(**fields_of(wanted) | {"id": "on", "resume": given}))
            assert {i: given[i] + resumed.tokens[i] for i in (0, 1)} == whole.tokens
            for i in (0, 1):
                seen = whole.logprobs[i][len(given[i]) :]
                assert [e.top_ids for e in resumed.logprobs[i]] == [e.top_ids for e in seen]
                assert all(len(entry.top_ids) == 2 for entry in seen)

    asyncio.run(main())
