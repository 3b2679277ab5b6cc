"""A request between its arrival and its answer: whose it is, which model serves it, what it may cost, what it leaves.

The tenant follows from the key alone, and with it limits, priority and the salt of the prefix cache. What was reserved
is settled when the request has ended, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from shoal.serve.answer import EventStream, Position, WholeAnswer, Work, disconnected
from shoal.serve.books import Asked, Book, Books
from shoal.serve.errors import ApiError, invalid
from shoal.serve.flight import Flight
from shoal.serve.generation import Generator, Job
from shoal.serve.journal import Journal, open_store
from shoal.serve.journal_store import JournaledRequest, JournalEntry
from shoal.serve.openai_format import ChatFormat, CompletionFormat, Usage
from shoal.serve.protocol import ChatRequest, CompletionRequest, decode
from shoal.serve.request_log import RequestLog
from shoal.serve.session import Session
from shoal.serve.tenants import Principal, Tenants, cluster_secret

_encode = msgspec.json.Encoder().encode
Answer = Response | EventStream
CLAIM_SECONDS = 10.0
"""How long a client that is back waits for the lease of a gateway that may be dead."""
_LONG_BYTES = 4096
"""Of a body: tokenising takes a millisecond for about so many, and handing it to a thread a tenth of that."""
RESUMABLE = ("client_left", "stopped", "handed_over")
"""Ends of a connection that are not the end of its request."""


class Reception:
    def __init__(self, session: Session, books: Books) -> None:
        self._session = session
        self._fleet = session.fleet
        self._books = books
        config = session.deployment
        file = config.cluster_secret
        secret = secrets.token_bytes(32) if file is None else cluster_secret(Path(file).expanduser())
        self.tenants = Tenants(config.tenants, secret)
        self._journal: Journal | None = None
        self._running: dict[str, Work] = {}
        """By request id, of those that the journal keeps."""

    async def open(self) -> None:
        """Raises StoreError."""
        config = self._session.deployment.journal
        if config is None:
            return
        journal = Journal(open_store(config, f"{socket.gethostname()}-{uuid4().hex}"), config, on_lost=self.lost)
        await journal.open()
        self._journal = journal
        self._fleet.journal_state = lambda: journal.state

    async def close(self) -> None:
        if self._journal is not None:
            await self._journal.close()

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

    async def answer(self, request: Request, body: ChatRequest | CompletionRequest, raw: bytes) -> Answer:
        """Generate what was asked for. `raw` is the body as it came. Raises ApiError, ClientDisconnect."""
        if self._fleet.draining:
            raise ApiError(503, "the server is shutting down", code="draining")
        self._books.require_audit()
        who: Principal = request.state.principal
        request_id: str = request.state.request_id
        asked = self.generator(body.model)
        generator = self._serving(asked, request, body)
        await self._reserve(request, who, request_id)
        try:
            return await self._accept(request, body, raw, asked, generator)
        except ApiError as error:
            self._books.refused(asked.pool.name, who, error, request_id, request.url.path)
            if error.code not in RESUMABLE:
                await self._unreserve(request, who, request_id)
            raise

    def _serving(self, asked: Generator, request: Request, body: ChatRequest | CompletionRequest) -> Generator:
        """Another model, where the one that was asked for is down or overloaded and the client did not opt out."""
        header = request.headers.get("x-shoal-fallback", "")
        if header not in ("", "never"):
            raise ApiError(400, f"x-shoal-fallback is {header[:40]!r}; it may be 'never'", code="bad_header")
        key = body.prompt_cache_key or body.user or request.state.request_id
        name = self._fleet.degrader.serve_by(asked.pool.name, header == "never", key, time.monotonic())
        return self._session.generators[name]

    async def _accept(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        raw: bytes,
        asked: Generator,
        generator: Generator,
    ) -> Answer:
        who: Principal = request.state.principal
        request_id: str = request.state.request_id
        if len(raw) < _LONG_BYTES:
            prompts = _prompts(generator, body)
        else:
            prompts = await asyncio.to_thread(_prompts, generator, body)  # every stream would wait for it
        jobs = await self._jobs(generator, body, prompts, request_id, who)
        position = entry = None
        if self._journal is not None and len(jobs) == 1 and jobs[0].wanted is None:
            position = Position.parse("", jobs[0].request.n)
            entry = JournalEntry(
                request_id=request_id,
                tenant=who.tenant,
                model=generator.pool.name,
                route="chat" if isinstance(body, ChatRequest) else "completions",
                body=raw,
                request=jobs[0].request,
                created=time.time(),
            )
        return await self._run(request, body, asked, generator, jobs, position, entry)

    async def resume(self, request: Request, request_id: str) -> Answer:
        """The rest of a stream, behind what its client has. Raises ApiError, ClientDisconnect."""
        if self._journal is None:
            raise ApiError(404, "this server keeps no journal: `journal.location` is not set", code="no_journal")
        if self._fleet.draining:
            raise ApiError(503, "the server is shutting down", code="draining")
        self._books.require_audit()
        who: Principal = request.state.principal
        found = await self._claimed(request_id, who)
        try:
            return await self._go_on(request, found)
        except ApiError:
            if request_id not in self._running:  # or else that of a client that came back once more
                self._journal.released(request_id)  # it may be asked for again, as it should be
            raise

    async def _go_on(self, request: Request, found: JournaledRequest) -> Answer:
        entry = found.entry
        kind: type[ChatRequest] | type[CompletionRequest]
        kind = ChatRequest if entry.route == "chat" else CompletionRequest
        body = decode(entry.body, kind, self._session.deployment.limits)
        generator = self.generator(entry.model)
        position = Position.parse(request.headers.get("last-event-id", ""), entry.request.n)
        if not body.stream and not position.is_beginning:
            raise ApiError(400, "this request was not a stream: ask for it without Last-Event-ID", code="bad_event_id")
        job = generator.resumed(body, entry.request, found.sequences, position)
        request.state.request_id = entry.request_id
        return await self._run(request, body, generator, generator, [job], position, created=entry.created)

    async def _claimed(self, request_id: str, who: Principal) -> JournaledRequest:
        """Make a request this gateway's own, wherever it ran. Raises ApiError."""
        journal = self._journal
        assert journal is not None
        until = time.monotonic() + CLAIM_SECONDS
        while True:
            found = await journal.load(request_id, who.tenant)
            if found is None:
                raise ApiError(404, f"there is no request {request_id!r}, or it ended long ago", code="unknown_request")
            here = self._running.pop(request_id, None)
            if here is not None:
                # Its client is here again: nobody reads the other connection any more. Only now, when it is known to be
                # this tenant's: nobody else's request may end a stream.
                here.hand_over()
            if not found.ended:
                found = await journal.claim(request_id, who.tenant)
            if found is not None:
                return found
            if time.monotonic() > until:
                raise ApiError(409, "another gateway goes on with this request", code="claimed", retry_after=1.0)
            await asyncio.sleep(0.1)

    async def _reserve(self, request: Request, who: Principal, request_id: str) -> None:
        key = request.headers.get("idempotency-key")
        if key is None or self._journal is None:
            return
        earlier = await self._journal.reserve(who.tenant, key[:256], request_id)
        if earlier is not None:
            raise ApiError(
                409,
                f"this Idempotency-Key was used for request {earlier}: GET /v1/streams/{earlier} has its answer",
                code="duplicate_request",
            )

    async def _unreserve(self, request: Request, who: Principal, request_id: str) -> None:
        """Of a request that was refused, so that it can be sent again."""
        key = request.headers.get("idempotency-key")
        if key is not None and self._journal is not None:
            await self._journal.unreserve(who.tenant, key[:256], request_id)

    async def _run(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        asked: Generator,
        generator: Generator,
        jobs: list[Job],
        position: Position | None,
        entry: JournalEntry | None = None,
        created: float | None = None,
    ) -> Answer:
        """`entry`: of a request that the journal does not know yet."""
        request_id: str = request.state.request_id
        prompts = [job.request.prompt for job in jobs]
        form: ChatFormat | CompletionFormat
        if isinstance(body, ChatRequest):
            form = ChatFormat(body, generator.tokenizer, generator.pool.name, request_id, prompts, created)
        else:
            form = CompletionFormat(body, generator.tokenizer, generator.pool.name, request_id, prompts, created)
        who: Principal = request.state.principal
        usage = Usage(sum(map(len, prompts)), self.tenants.settings(who.tenant).shows_cached_tokens)
        usage.completion = sum(count for job in jobs for count in job.has.values() if job.wanted is None or position)
        answer: EventStream | WholeAnswer
        if body.stream:
            wants_usage = body.stream_options is not None and body.stream_options.include_usage
            answer = EventStream(form, usage, position, wants_usage=wants_usage)
            if position is None or position.is_beginning:
                answer.open(sum(len(job.indexes) for job in jobs))
        else:
            answer = WholeAnswer(form, usage)
        recorder = None
        if position is not None and self._journal is not None:
            recorder = RequestLog(self._journal, request_id)
        headers = {} if asked is generator else {"x-shoal-degraded-from": asked.pool.name}
        if isinstance(answer, EventStream):
            answer.headers += [(name.encode(), value.encode()) for name, value in headers.items()]
        book = self._books.open(self._asked(request, body, asked, generator), jobs, usage)
        self._admit(jobs, who, book)
        if entry is not None and self._journal is not None:
            self._journal.accepted(entry)  # what a limit refuses is not: nobody would say that it has ended
        work = self._begin(generator, jobs, usage, answer, who, book, request_id, recorder, is_new=entry is not None)
        try:
            async with _cancelled_by_disconnect(request):
                if isinstance(answer, WholeAnswer):
                    return Response(_encode(await answer.body()), media_type="application/json", headers=headers)
                await answer.begun()
                if recorder is not None and self._journal is not None:
                    await self._journal.settled()
                return answer
        except (asyncio.CancelledError, ClientDisconnect):
            work.abandon()
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
                    message = f"{field} is for other gateways: it needs a key with the scope engine"
                    raise ApiError(403, message, param=field)
            salt = salt if body.cache_salt is None else body.cache_salt
            if body.resume is not None and len(prompts) != 1:
                raise invalid("resume goes with one prompt", "resume")
        body.priority = settings.priority(body.priority)
        return [await generator.job(body, p, f"{request_id}-{i}", salt) for i, p in enumerate(prompts)]

    def _admit(self, jobs: list[Job], who: Principal, book: Book) -> None:
        """Reserve of the tenant's limits what it may cost. Raises ApiError."""
        refusal = self.tenants.limiter.check(who.tenant, _cost(jobs), time.monotonic())
        if refusal is not None:
            book.discard()
            raise ApiError(429, refusal.message, code=refusal.reason, retry_after=refusal.retry_after)

    def _begin(
        self,
        generator: Generator,
        jobs: list[Job],
        usage: Usage,
        answer: EventStream | WholeAnswer,
        who: Principal,
        book: Book,
        request_id: str,
        recorder: RequestLog | None,
        *,
        is_new: bool,
    ) -> Work:
        """Of what was admitted. Raises ApiError. `is_new`: to the journal, which was told of it just now."""
        limiter, tenant, journal = self.tenants.limiter, who.tenant, self._journal
        cost = _cost(jobs)

        def end(error: ApiError | None) -> None:
            limiter.settle(tenant, cost, usage.prompt + usage.completion, time.monotonic())
            if self._running.get(request_id) is work:
                del self._running[request_id]
            if recorder is None or journal is None:
                return
            if error is not None and not work.flights and is_new:
                journal.refused(request_id)
            elif error is not None and (error.code in RESUMABLE or not work.flights):
                # One that its client is back for, if it is refused now, can be asked for later.
                journal.released(request_id)
            else:
                journal.ended(request_id)

        weight, session = self.tenants.settings(tenant).weight, book.session
        work = answer.work = Work(jobs, book, usage, answer, end)
        if recorder is not None:
            self._running[request_id] = work

        def begin(job: Job, on_piece: Any, on_error: Any) -> Flight | None:
            return generator.begin(
                job,
                on_piece,
                on_error,
                tenant=tenant,
                weight=weight,
                session=session,
                recorder=recorder,
                observer=book,
            )

        work.begin(begin)
        return work

    def _asked(
        self, request: Request, body: ChatRequest | CompletionRequest, asked: Generator, generator: Generator
    ) -> Asked:
        return Asked(
            request_id=request.state.request_id,
            route="chat" if isinstance(body, ChatRequest) else "completions",
            model=asked.pool.name,
            served_model=generator.pool.name,
            address="" if request.client is None else request.client.host,
            who=request.state.principal,
            stream=bool(body.stream),
            session=body.prompt_cache_key or request.headers.get("x-session-id", "")[:256],
            arrived=request.state.arrived,
            traceparent=request.headers.get("traceparent", ""),
            tracestate=request.headers.get("tracestate", ""),
        )

    def lost(self, request_id: str) -> None:
        """Another gateway has claimed a request of this one."""
        work = self._running.pop(request_id, None)
        if work is not None:
            work.hand_over()


def _cost(jobs: list[Job]) -> int:
    """Tokens, at most."""
    return sum(len(job.request.prompt) + job.request.max_tokens * job.request.n for job in jobs)


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
