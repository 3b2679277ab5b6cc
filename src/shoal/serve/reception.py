"""A request between its arrival and its answer: whose it is, which model serves it, what it may cost, what it leaves.

The tenant follows from the key alone, and with it limits, priority and the salt of the prefix cache. What was reserved
is settled when the request has ended, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from shoal.core.engine_core import sequences_of
from shoal.serve.answer import EventStream, WholeAnswer, Work, disconnected
from shoal.serve.errors import ApiError, invalid
from shoal.serve.flight import Flight
from shoal.serve.generation import Generator, Job
from shoal.serve.metrics import ServerMetrics
from shoal.serve.openai_format import ChatFormat, CompletionFormat, Usage
from shoal.serve.protocol import ChatRequest, CompletionRequest
from shoal.serve.session import Session
from shoal.serve.tenants import Principal, Tenants, cluster_secret

_encode = msgspec.json.Encoder().encode


class Reception:
    def __init__(self, session: Session, metrics: ServerMetrics) -> None:
        self._session = session
        self._fleet = session.fleet
        self._metrics = metrics
        config = session.deployment
        file = config.cluster_secret
        secret = secrets.token_bytes(32) if file is None else cluster_secret(Path(file).expanduser())
        self.tenants = Tenants(config.tenants, secret)

    def generator(self, name: str) -> Generator:
        """Of the model that is asked for; the first one where none is. Raises ApiError 404."""
        generators = self._session.generators
        if name in generators:
            return generators[name]
        if not name:
            return next(iter(generators.values()))
        known = ", ".join(repr(known) for known in generators)
        raise ApiError(
            404, f"model {name!r} does not exist; this server has {known}", param="model", code="model_not_found"
        )

    async def answer(self, request: Request, body: ChatRequest | CompletionRequest) -> Response | EventStream:
        """Generate what was asked for. Raises ApiError, ClientDisconnect."""
        if self._fleet.draining:
            raise ApiError(503, "the server is shutting down", code="draining")
        who: Principal = request.state.principal
        request_id: str = request.state.request_id
        generator = self.generator(body.model)
        prompts = _prompts(generator, body)
        jobs = await self._jobs(generator, body, prompts, request_id, who)
        form: ChatFormat | CompletionFormat
        if isinstance(body, ChatRequest):
            form = ChatFormat(body, generator.tokenizer, generator.pool.name, request_id, prompts)
        else:
            form = CompletionFormat(body, generator.tokenizer, generator.pool.name, request_id, prompts)
        usage = Usage(sum(map(len, prompts)), self.tenants.settings(who.tenant).shows_cached_tokens)
        answer: EventStream | WholeAnswer
        if body.stream:
            wants_usage = body.stream_options is not None and body.stream_options.include_usage
            num_choices = sum(len(sequences_of(job.request)) for job in jobs)
            answer = EventStream(form, usage, num_choices, wants_usage=wants_usage)
        else:
            answer = WholeAnswer(form, usage)
        answer.work = self._begin(generator, jobs, usage, answer, who, request.state.arrived)
        try:
            async with _cancelled_by_disconnect(request):
                if isinstance(answer, WholeAnswer):
                    return Response(_encode(await answer.body()), media_type="application/json")
                await answer.begun()
                return answer
        except (asyncio.CancelledError, ClientDisconnect):
            answer.work.abandon()
            raise

    async def _jobs(
        self,
        generator: Generator,
        body: ChatRequest | CompletionRequest,
        prompts: list[list[int]],
        request_id: str,
        who: Principal,
    ) -> list[Job]:
        settings = self.tenants.settings(who.tenant)
        salt = self.tenants.salt(who.tenant)
        if isinstance(body, CompletionRequest):
            for field in ("resume", "cache_salt"):
                if getattr(body, field) is not None and not who.may("engine"):
                    raise ApiError(
                        403, f"{field} is for other gateways: it needs a key with the scope engine", param=field
                    )
            salt = salt if body.cache_salt is None else body.cache_salt
            if body.resume is not None and len(prompts) != 1:
                raise invalid("resume goes with one prompt", "resume")
        body.priority = settings.priority(body.priority)
        return [await generator.job(body, p, f"{request_id}-{i}", salt) for i, p in enumerate(prompts)]

    def _begin(
        self,
        generator: Generator,
        jobs: list[Job],
        usage: Usage,
        answer: EventStream | WholeAnswer,
        who: Principal,
        arrived: float,
    ) -> Work:
        """Raises ApiError."""
        limiter, tenant = self.tenants.limiter, who.tenant
        cost = sum(len(job.request.prompt) + job.request.max_tokens * job.request.n for job in jobs)
        refusal = limiter.check(tenant, cost, time.monotonic())
        if refusal is not None:
            raise ApiError(429, refusal.message, code=refusal.reason, retry_after=refusal.retry_after)

        def end(error: ApiError | None) -> None:
            limiter.settle(tenant, cost, usage.prompt + usage.completion, time.monotonic())

        timers = [self._metrics.timer(arrived, len(job.request.prompt), job.request.n) for job in jobs]
        weight = self.tenants.settings(tenant).weight
        work = answer.work = Work(jobs, timers, usage, answer, end)

        def begin(job: Job, on_piece: Any, on_error: Any) -> Flight:
            return generator.begin(job, on_piece, on_error, tenant=tenant, weight=weight)

        work.begin(begin)
        return work


def _prompts(generator: Generator, body: ChatRequest | CompletionRequest) -> list[list[int]]:
    """Token ids of each prompt. Raises ApiError."""
    if isinstance(body, ChatRequest):
        if isinstance(body.tool_choice, dict) or body.tool_choice not in (None, "none", "auto"):
            raise invalid("tool_choice must be 'none' or 'auto': a call cannot be forced", "tool_choice")
        tools = None if body.tool_choice == "none" else body.tools
        return [generator.chat_prompt(body.messages, tools, body.add_generation_prompt, body.chat_template_kwargs)]
    if body.suffix:
        raise invalid("suffix is not supported", "suffix")
    if body.echo and body.logprobs is not None:
        raise invalid("echo together with logprobs is not supported", "echo")
    return generator.prompts(body)


@contextlib.asynccontextmanager
async def _cancelled_by_disconnect(request: Request) -> AsyncIterator[None]:
    """Cancels the body of the `async with` when the client leaves; raises ClientDisconnect then."""
    body = asyncio.current_task()
    left = False

    async def watch() -> None:
        nonlocal left
        await disconnected(request.receive)
        left = True
        if body is not None:
            body.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not left:
            raise
        if body is not None:
            body.uncancel()
        raise ClientDisconnect from None
    finally:
        watcher.cancel()
