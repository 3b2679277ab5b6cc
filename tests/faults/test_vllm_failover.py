"""Requests that go on at a second real vLLM when the first is lost. Each fault is seen, and has a control."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.core.fleet_types import EndpointFailure
from shoal.core.types import Grammar, Request, Sampling
from shoal.serve.endpoint import EndpointStartError
from shoal.serve.openai_endpoint import OpenAIEndpoint
from tests.faults.vllm_server import START_SECONDS, VllmServer, make_checkpoint
from tests.serve.openai_fleet import RecordedAttempt, RecordedFleet
from tests.serve.running import wait_until

pytestmark = pytest.mark.timeout(900)

NUM_STREAMS = 32
NUM_TOKENS = 96
EOS = 2


@pytest.fixture(scope="module")
def servers(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[VllmServer]]:
    """Two, started together. The test that kills the first is the last one."""
    directory = tmp_path_factory.mktemp("vllm")
    checkpoint = make_checkpoint(directory / "model")
    started: list[VllmServer] = []
    try:
        for core in range(2):
            started.append(VllmServer(vllm_python, checkpoint, directory / f"{core}.log", core=core))
        asyncio.run(_wait_until_ready(started))
        yield started
    finally:
        for server in started:
            server.stop()
    assert not any(server.states() for server in started)


async def _wait_until_ready(servers: list[VllmServer]) -> None:
    for server in servers:
        endpoint = OpenAIEndpoint("e", server.url, vocab_size=49_152)
        while True:
            try:
                await endpoint.start(RecordedFleet())
            except EndpointStartError as error:
                waited = time.monotonic() - server.started_at
                assert server.process.poll() is None and waited < START_SECONDS, f"{error}\n{server.tail()}"
                await asyncio.sleep(0.5)
            else:
                await endpoint.stop()
                break


@contextlib.asynccontextmanager
async def both(servers: list[VllmServer]) -> AsyncIterator[tuple[OpenAIEndpoint, OpenAIEndpoint, RecordedFleet]]:
    """The endpoints, and what the first one reports."""
    fleet = RecordedFleet()
    first, second = (OpenAIEndpoint(f"e{i}", server.url, vocab_size=49_152) for i, server in enumerate(servers))
    try:
        await first.start(fleet)
        await second.start(RecordedFleet())
        yield first, second, fleet
    finally:
        await first.stop()
        await second.stop()


def requests(kind: str) -> list[Request]:
    rng = random.Random(7)
    return [
        Request(
            id=f"{kind}-{i}",
            prompt=[rng.randrange(100, 40_000) for _ in range(rng.randrange(5, 60))],
            max_tokens=NUM_TOKENS,
            sampling=Sampling(temperature=0.0),
        )
        for i in range(NUM_STREAMS)
    ]


def begin(endpoint: OpenAIEndpoint, wanted: list[Request]) -> list[RecordedAttempt]:
    attempts = [RecordedAttempt(request) for request in wanted]
    for attempt in attempts:
        endpoint.submit(attempt)
    return attempts


async def transcripts(endpoint: OpenAIEndpoint, wanted: list[Request]) -> list[dict[int, list[int]]]:
    attempts = begin(endpoint, wanted)
    for attempt in attempts:
        await attempt.wait(120)
        assert attempt.reason is None, attempt.reason
    return [attempt.tokens for attempt in attempts]


def rest_of(attempt: RecordedAttempt) -> Request:
    """What is still to be generated of it."""
    request = attempt.request
    given = {i: attempt.tokens.get(i, []) for i in range(request.n) if i not in attempt.finished}
    return msgspec.structs.replace(request, id=f"{request.id}-again", resume=given)


async def joined(first: list[RecordedAttempt], endpoint: OpenAIEndpoint) -> list[dict[int, list[int]]]:
    """What clients have: what came of the first attempts, and what follows at `endpoint`."""
    second = begin(endpoint, [rest_of(attempt) for attempt in first])
    for attempt in second:
        await attempt.wait(120)
        assert attempt.reason is None, attempt.reason
    return [
        {i: a.tokens.get(i, []) + b.tokens.get(i, []) for i in range(a.request.n)}
        for a, b in zip(first, second, strict=True)
    ]


KINDS: dict[str, dict[str, Any]] = {
    "seeded": {"sampling": Sampling(temperature=0.9, seed=11, top_p=0.95), "n": 2},
    "penalised": {"sampling": Sampling(temperature=0.0, presence_penalty=0.8, frequency_penalty=0.4)},
    "repetition": {"sampling": Sampling(temperature=0.0, repetition_penalty=1.3), "n": 2},
    "logprobs": {"sampling": Sampling(temperature=0.0, logprobs=3)},
    "structured": {
        "sampling": Sampling(temperature=0.7, seed=3, grammar=Grammar("regex", "([a-z]{2,9} ){6,40}", "")),
        "stop_token_ids": [EOS],
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_moved_in_the_middle_goes_on_as_it_would_have(servers: list[VllmServer], kind: str) -> None:
    async def main() -> None:
        wanted = [msgspec.structs.replace(request, max_tokens=40, **KINDS[kind]) for request in requests(kind)[:4]]
        async with both(servers) as (first, second, _):
            control = await transcripts(second, wanted)
            moved = begin(first, [msgspec.structs.replace(request, id=f"{request.id}-1") for request in wanted])
            for attempt in moved:
                await attempt.wait_for_tokens(12)
                first.abort(attempt.request.id)
                attempt.given_up = True
            assert any(12 <= len(tokens) < 40 for attempt in moved for tokens in attempt.tokens.values())
            assert await joined(moved, second) == control

    asyncio.run(main())


def test_streams_of_a_server_that_hangs_go_on_elsewhere(servers: list[VllmServer]) -> None:
    async def main() -> None:
        wanted = requests("hang")[:8]
        async with both(servers) as (first, second, fleet):
            control = await transcripts(second, wanted)
            attempts = begin(first, [msgspec.structs.replace(request, id=f"{request.id}-1") for request in wanted])
            for attempt in attempts:
                await attempt.wait_for_tokens(8)
            servers[0].signal(signal.SIGSTOP)
            try:
                await asyncio.to_thread(wait_until, lambda: set(servers[0].states()) == {"T"}, "all to be stopped")
                await asyncio.sleep(0.5)
                num_reports = len(fleet.reports)
                await asyncio.sleep(2.5)
                assert len(fleet.reports) == num_reports, "a server that is stopped reports nothing"
                assert fleet.gone_because is None
                for attempt in attempts:
                    assert attempt.reason is None
                    first.abort(attempt.request.id)
                    attempt.given_up = True
                assert await joined(attempts, second) == control
            finally:
                servers[0].signal(signal.SIGCONT)
            async with asyncio.timeout(20):
                while len(fleet.reports) == num_reports or fleet.reports[-1].num_running != 0:
                    await asyncio.sleep(0.1)

    asyncio.run(main())


def test_no_stream_is_lost_when_a_server_is_killed(servers: list[VllmServer]) -> None:
    async def main() -> None:
        wanted = requests("kill")
        async with both(servers) as (first, second, fleet):
            control = await transcripts(second, wanted)
            assert await transcripts(first, wanted) == control, "without a fault both generate the same"
            attempts = begin(first, [msgspec.structs.replace(request, id=f"{request.id}-1") for request in wanted])
            for attempt in attempts[: NUM_STREAMS // 2]:
                await attempt.wait_for_tokens(NUM_TOKENS // 3)
            servers[0].signal(signal.SIGKILL)
            killed_at = time.monotonic()
            for attempt in attempts:
                await attempt.wait()
            noticed = time.monotonic() - killed_at
            lost = [attempt for attempt in attempts if attempt.reason is not None]
            assert len(lost) == NUM_STREAMS, "all were under way"
            assert all(isinstance(attempt.reason, EndpointFailure) for attempt in lost)
            assert any(attempt.tokens for attempt in lost)
            async with asyncio.timeout(5):
                await fleet.is_gone.wait()
            assert noticed < 2.0, "reset connections tell at once; the rest is a busy machine"
            assert await joined(attempts, second) == control

    asyncio.run(main())
