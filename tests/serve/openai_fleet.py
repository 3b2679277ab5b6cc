"""The fleet's side of an OpenAI endpoint, and requests for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from shoal.core.fleet_types import EndpointFailure, EndpointReport
from shoal.core.types import Grammar, Output, Rejected, Request, Sampling
from shoal.serve.openai_endpoint import OpenAIEndpoint
from tests.serve.openai_server import VOCAB, OpenAIServer

GREEDY = Sampling(temperature=0.0)
SAMPLED = Sampling(temperature=0.8, seed=5)
PENALISED = Sampling(temperature=0.0, frequency_penalty=0.5)
CONSTRAINED = Sampling(temperature=0.0, grammar=Grammar("regex", "[a-z]+", ""))
ALL = {"greedy": GREEDY, "sampled": SAMPLED, "penalised": PENALISED, "constrained": CONSTRAINED}


class RecordedAttempt:
    """Keeps what an endpoint says, and that it says nothing that it may not."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[Any]] = {}
        self.outputs: list[Output] = []
        self.finished: dict[int, Output] = {}
        self.reason: EndpointFailure | Rejected | None = None
        self.given_up = False
        self.over = asyncio.Event()
        self.progress = asyncio.Event()
        """Set with every output."""
        indices = range(request.n) if request.resume is None else request.resume
        self._open = dict.fromkeys(indices)

    def output(self, output: Output) -> None:
        assert self.reason is None and not self.given_up, "called after its end"
        assert output.request_id == self.request.id
        assert output.index in self._open, f"sequence {output.index} had ended, or was not asked for"
        assert output.token_ids or output.finish
        assert self.request.sampling.logprobs is None or len(output.logprobs) == len(output.token_ids)
        self.outputs.append(output)
        self.tokens.setdefault(output.index, []).extend(output.token_ids)
        self.logprobs.setdefault(output.index, []).extend(output.logprobs)
        if output.finish is not None:
            self.finished[output.index] = output
            del self._open[output.index]
        if not self._open:
            self.over.set()
        self.progress.set()

    def ended(self, reason: EndpointFailure | Rejected) -> None:
        assert self.reason is None and not self.given_up and self._open, "ended twice, or after its end"
        self.reason = reason
        self.over.set()
        self.progress.set()

    def aborted(self, index: int) -> None:
        del self._open[index]

    async def wait(self, seconds: float = 60) -> None:
        async with asyncio.timeout(seconds):
            await self.over.wait()

    async def wait_for_tokens(self, count: int, seconds: float = 60) -> None:
        """Of each of its sequences."""
        async with asyncio.timeout(seconds):
            while any(len(self.tokens.get(i, [])) < count for i in self._open) and not self.over.is_set():
                self.progress.clear()
                await self.progress.wait()


class RecordedFleet:
    def __init__(self) -> None:
        self.reports: list[EndpointReport] = []
        self.gone_because: str | None = None
        self.is_gone = asyncio.Event()

    def reported(self, name: str, report: EndpointReport) -> None:
        assert self.gone_because is None
        previous = [r.steps for r in self.reports if r.steps is not None]
        assert report.steps is None or not previous or report.steps >= previous[-1], "steps fell"
        self.reports.append(report)

    def gone(self, name: str, reason: str) -> None:
        assert self.gone_because is None, "gone twice"
        self.gone_because = reason
        self.is_gone.set()


def request(**changes: Any) -> Request:
    return Request(**({"id": "r", "prompt": [3, 1, 4], "max_tokens": 12, "sampling": GREEDY} | changes))


@contextlib.asynccontextmanager
async def endpoint_at(url: str, **options: Any) -> AsyncIterator[tuple[OpenAIEndpoint, RecordedFleet]]:
    fleet = RecordedFleet()
    endpoint = OpenAIEndpoint("e", url, **({"vocab_size": VOCAB} | options))
    await endpoint.start(fleet)
    try:
        yield endpoint, fleet
    finally:
        await endpoint.stop()
    assert not endpoint._tries, "attempts are left"


async def result(endpoint: OpenAIEndpoint, wanted: Request) -> RecordedAttempt:
    attempt = RecordedAttempt(wanted)
    endpoint.submit(attempt)
    assert not attempt.outputs and attempt.reason is None, "something was called before submit returned"
    await attempt.wait()
    return attempt


def failure(attempt: RecordedAttempt) -> EndpointFailure:
    assert isinstance(attempt.reason, EndpointFailure), attempt.reason
    return attempt.reason


async def undisturbed(wanted: Request) -> RecordedAttempt:
    async with OpenAIServer() as server, endpoint_at(server.url) as (endpoint, _):
        attempt = await result(endpoint, wanted)
        assert attempt.reason is None
        return attempt


def fields_of(wanted: Request) -> dict[str, Any]:
    return {name: getattr(wanted, name) for name in wanted.__struct_fields__}
