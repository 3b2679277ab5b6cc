"""The HTTP front: routes, body limits, authentication, streaming, readiness, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import uuid4

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from shoal import __version__
from shoal.core.expert_load import ExpertReport
from shoal.serve.engine_group import Engine
from shoal.serve.errors import ApiError, invalid
from shoal.serve.generation import Generator, Job, Piece
from shoal.serve.messages import HEARTBEAT_SECONDS
from shoal.serve.metrics import ServerMetrics
from shoal.serve.openai_format import ChatFormat, CompletionFormat, Usage, joined
from shoal.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, Limits, TokenizeRequest, decode

_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode


class Server:
    """The application over one engine. `app` is what an ASGI server runs."""

    def __init__(
        self,
        engine: Engine,
        generator: Generator,
        *,
        model: str,
        limits: Limits,
        stall_seconds: float,
        api_key: str | None,
    ) -> None:
        self.engine = engine
        self.generator = generator
        self.model = model
        self.limits = limits
        self.stall_seconds = stall_seconds
        self.metrics = ServerMetrics(engine)
        self.draining = False
        self._api_key = api_key.encode() if api_key else None
        self._started = int(time.time())
        get, post = ["GET"], ["POST"]
        self._routes = [
            Route("/v1/models", self._guarded(self.models), methods=get),
            Route("/v1/models/{name:path}", self._guarded(self.one_model), methods=get),
            Route("/v1/experts", self._guarded(self.experts), methods=get),
            Route("/v1/chat/completions", self._guarded(self.chat), methods=post),
            Route("/v1/completions", self._guarded(self.completions), methods=post),
            Route("/tokenize", self._guarded(self.tokenize), methods=post),
            Route("/detokenize", self._guarded(self.detokenize), methods=post),
            Route("/metrics", self._guarded(self.prometheus), methods=get),
            Route("/ready", self._guarded(self.ready), methods=get),
            Route("/health", self._guarded(self.health), methods=get),
            Route("/version", self._guarded(self.version), methods=get),
        ]
        starlette = Starlette(routes=self._routes, exception_handlers={404: _no_route, 405: _no_method})
        starlette.router.redirect_slashes = False
        self.app = self._with_admission(starlette)

    # --- before and around every request ----------------------------------------------------------------------------

    def _with_admission(self, app: Starlette) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
        """Who may ask at all is decided here, before routing: no path can be spelled so that it is missed."""

        async def admit(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            request_id = _request_id(scope["headers"])
            scope["state"] = {"arrived": time.monotonic(), "request_id": request_id}

            async def send_with_id(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                await send(message)

            error = self._refusal(scope)
            if error is not None:
                self.metrics.rejected(error.status)
            await (app if error is None else _error_response(error))(scope, receive, send_with_id)

        return admit

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = scope["headers"]
        most, most_bytes = self.limits.headers, self.limits.header_bytes
        if len(headers) > most or sum(len(k) + len(v) for k, v in headers) > most_bytes:
            return ApiError(431, f"the request has more than {most} headers or {most_bytes} bytes of them")
        if self._api_key is None or scope["path"] == "/health":
            return None
        given = next((v for k, v in headers if k == b"authorization"), b"")
        if hmac.compare_digest(given, b"Bearer " + self._api_key):
            return None
        return ApiError(401, "missing or wrong API key: send `Authorization: Bearer KEY`", code="invalid_api_key")

    def _guarded(self, handler: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Any]]:
        """Errors become answers in OpenAI's form; what was not foreseen is a 500 without details."""

        async def guarded(request: Request) -> Any:
            try:
                return await handler(request)
            except ApiError as error:
                self.metrics.rejected(error.status)
                return _error_response(error)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception:
                _log.exception("%s %s failed", request.method, request.url.path)
                self.metrics.rejected(500)
                return _error_response(ApiError(500, "internal error; the server's log has the details"))

        return guarded

    async def _body(self, request: Request) -> bytes:
        most = self.limits.body_bytes
        length = request.headers.get("content-length", "0")
        too_large = ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")
        if length.isdigit() and int(length) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self.limits.body_seconds:g} s") from None
        return b"".join(parts)

    def _check_model(self, name: str) -> None:
        if name and name != self.model:
            raise ApiError(
                404,
                f"model {name!r} does not exist; this server has {self.model!r}",
                param="model",
                code="model_not_found",
            )

    # --- generation -------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response | EventStream:
        body = decode(await self._body(request), ChatRequest, self.limits)
        self._check_model(body.model)
        if isinstance(body.tool_choice, dict) or body.tool_choice not in (None, "none", "auto"):
            raise invalid("tool_choice must be 'none' or 'auto': a call cannot be forced", "tool_choice")
        tools = None if body.tool_choice == "none" else body.tools
        prompt = self.generator.chat_prompt(body.messages, tools, body.add_generation_prompt, body.chat_template_kwargs)
        return await self._answer(request, body, [prompt], ChatFormat)

    async def completions(self, request: Request) -> Response | EventStream:
        body = decode(await self._body(request), CompletionRequest, self.limits)
        self._check_model(body.model)
        if body.suffix:
            raise invalid("suffix is not supported", "suffix")
        if body.echo and body.logprobs is not None:
            raise invalid("echo together with logprobs is not supported", "echo")
        return await self._answer(request, body, self.generator.prompts(body), CompletionFormat)

    async def _answer(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        prompts: list[list[int]],
        make_format: Any,
    ) -> Response | EventStream:
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="draining")
        request_id: str = request.state.request_id
        jobs = [await self.generator.job(body, p, f"{request_id}-{i}") for i, p in enumerate(prompts)]
        form = make_format(body, self.generator.tokenizer, self.model, request_id, prompts)
        usage = Usage(sum(map(len, prompts)))
        pieces = self._pieces(jobs, usage, request.state.arrived)
        if body.stream:
            wants_usage = body.stream_options is not None and body.stream_options.include_usage
            events = _events(form, pieces, usage, sum(job.request.n for job in jobs), wants_usage)
            # The first event is awaited here: what the engine refuses is an error status, not a broken stream.
            async with _cancelled_by_disconnect(request):
                first = await anext(events)
            return EventStream(first, events)
        collected: dict[int, list[Piece]] = {}
        async with _cancelled_by_disconnect(request), contextlib.aclosing(pieces) as source:  # type: ignore[type-var]
            async for index, piece in source:
                collected.setdefault(index, []).append(piece)
                if piece.finish == "error":
                    raise ApiError(500, f"generation failed: {piece.error}", code="generation_failed")
        choices = [joined(collected[index]) for index in sorted(collected)]
        return _json(form.whole(choices, usage))

    async def _pieces(self, jobs: list[Job], usage: Usage, arrived: float) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces of all jobs by choice number, interleaved as they come. `arrived`: monotonic second of the request."""
        timers = [self.metrics.timer(arrived, len(job.request.prompt), job.request.n) for job in jobs]
        queue: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()

        async def pump(number: int, job: Job) -> None:
            try:
                async with contextlib.aclosing(self.generator.run(job)) as run:  # type: ignore[type-var]
                    async for piece in run:
                        timers[number].observe(piece)
                        queue.put_nowait((number * job.request.n + piece.index, piece))
                queue.put_nowait(None)
            except asyncio.CancelledError:
                timers[number].abandon()
                raise
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(pump(number, job)) for number, job in enumerate(jobs)]
        left = len(tasks)
        try:
            while left:
                item = await queue.get()
                if item is None:
                    left -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    usage.add(item[1])
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- everything else --------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model_entry()]})

    async def one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return _json(self._model_entry())

    def _model_entry(self) -> dict[str, Any]:
        return {
            "id": self.model,
            "object": "model",
            "created": self._started,
            "owned_by": "shoal",
            "max_model_len": self.generator.max_len,
        }

    async def experts(self, request: Request) -> Response:
        if self.engine.info.spec.moe is None:
            raise ApiError(404, f"{self.model!r} has no experts", code="no_experts")
        return _json(ExpertReport(engines=self.engine.experts))

    async def tokenize(self, request: Request) -> Response:
        body = decode(await self._body(request), TokenizeRequest, self.limits)
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("give either prompt or messages", "prompt")
        if body.messages is not None:
            ids = self.generator.chat_prompt(body.messages, body.tools, body.add_generation_prompt)
        else:
            # Of any length, for counting is what this is for: on a thread, or every stream would wait for it.
            ids = await asyncio.to_thread(self.generator.tokenizer.encode, body.prompt or "", body.add_special_tokens)
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": self.generator.max_len, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = [self.generator.tokenizer.token_text(i) for i in ids]
        return _json(answer)

    async def detokenize(self, request: Request) -> Response:
        body = decode(await self._body(request), DetokenizeRequest, self.limits)
        self._check_model(body.model)
        if any(i >= self.generator.vocab_size for i in body.tokens):
            raise invalid(f"token ids must lie in [0, {self.generator.vocab_size})", "tokens")
        return _json({"prompt": self.generator.tokenizer.decode(body.tokens, body.skip_special_tokens)})

    async def prometheus(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def version(self, request: Request) -> Response:
        return _json({"version": __version__})

    async def ready(self, request: Request) -> Response:
        reason = self.unready_reason()
        return _json({"ready": reason is None, "reason": reason}, status=200 if reason is None else 503)

    def unready_reason(self) -> str | None:
        """Why requests should go elsewhere; None if they need not. Progress decides: a process that lives may hang."""
        if self.draining:
            return "the server is shutting down"
        if self.engine.lost is not None:
            return self.engine.lost
        age = time.monotonic() - self.engine.progress_at
        if age <= self.stall_seconds:
            return None
        if self.engine.num_streams:
            return f"the engine has work and has made no step for {age:.1f} s"
        # An idle engine gives a sign of life every second, which may be late on a busy machine.
        return f"the engine has given no sign of life for {age:.1f} s" if age > 3 * HEARTBEAT_SECONDS else None


class EventStream:
    """Server-sent events. The client's leaving cancels the generation at once, not at the next event."""

    def __init__(self, first: bytes, rest: AsyncIterator[bytes]) -> None:
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.create_task(self._pump(send))
        watch = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait([pump, watch], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (pump, watch):
                task.cancel()
            await asyncio.gather(pump, watch, return_exceptions=True)
            await self._rest.aclose()  # type: ignore[attr-defined]

    async def _pump(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for event in self._rest:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _events(
    form: Any, pieces: AsyncIterator[tuple[int, Piece]], usage: Usage, num_choices: int, wants_usage: bool
) -> AsyncIterator[bytes]:
    """The stream's events as bytes; the first comes with the first piece."""
    opening = b"".join(_event(chunk) for chunk in form.opening(num_choices))
    async with contextlib.aclosing(pieces) as source:  # type: ignore[type-var]
        try:
            async for index, piece in source:
                if piece.finish == "error":
                    raise ApiError(500, f"generation failed: {piece.error}", code="generation_failed")
                yield opening + _event(form.chunk(index, piece))
                opening = b""
        except ApiError as error:
            if opening:
                raise
            yield _event(error.body())
            yield b"data: [DONE]\n\n"
            return
    if wants_usage:
        yield _event(form.usage_chunk(usage))
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + _encode(body) + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@contextlib.asynccontextmanager
async def _cancelled_by_disconnect(request: Request) -> AsyncIterator[None]:
    """Cancels the body of the `async with` when the client leaves; raises ClientDisconnect then."""
    body = asyncio.current_task()
    left = False

    async def watch() -> None:
        nonlocal left
        await _disconnected(request.receive)
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


def _request_id(headers: list[tuple[bytes, bytes]]) -> str:
    given = next((value for key, value in headers if key == b"x-request-id"), b"").decode("latin-1")
    # The client's own id is kept for its logs but made unique: two requests may carry the same.
    clean = "".join(c for c in given[:64] if c.isascii() and (c.isalnum() or c in "-_."))
    unique = uuid4().hex
    return f"{clean}-{unique[:8]}" if clean else unique


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_encode(body), status_code=status, media_type="application/json", headers=headers)


def _error_response(error: ApiError) -> Response:
    headers = {"retry-after": "1"} if error.status in (429, 503) else None
    return _json(error.body(), error.status, headers)


async def _no_route(request: Request, error: Exception) -> Response:
    return _error_response(ApiError(404, f"there is nothing at {request.url.path}", code="unknown_url"))


async def _no_method(request: Request, error: Exception) -> Response:
    return _error_response(ApiError(405, f"{request.method} is not allowed at {request.url.path}"))
