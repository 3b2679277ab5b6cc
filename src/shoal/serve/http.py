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
from shoal.serve.answer import EventStream, WholeAnswer, Work, disconnected
from shoal.serve.errors import ApiError, invalid
from shoal.serve.fleet_routes import FleetRoutes
from shoal.serve.generation import Generator
from shoal.serve.metrics import ServerMetrics, own_engines
from shoal.serve.openai_format import ChatFormat, CompletionFormat, Usage
from shoal.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, Limits, TokenizeRequest, decode
from shoal.serve.session import Session

_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode


class Server:
    """The application over a fleet. `app` is what an ASGI server runs."""

    def __init__(self, session: Session, *, limits: Limits, api_key: str | None) -> None:
        self.fleet = fleet = session.fleet
        self.generators = session.generators
        """By the model's name; the first one serves requests that name none."""
        self.limits = limits
        self.metrics = ServerMetrics(fleet)
        self._api_key = api_key.encode() if api_key else None
        self._started = int(time.time())
        get, post = ["GET"], ["POST"]
        operate = FleetRoutes(fleet, session.add_any, session.deployment.drain_seconds)
        self._routes = [
            Route("/v1/models", self._guarded(self.models), methods=get),
            Route("/v1/models/{name:path}", self._guarded(self.one_model), methods=get),
            Route("/v1/experts", self._guarded(self.experts), methods=get),
            Route("/v1/chat/completions", self._guarded(self.chat), methods=post),
            Route("/v1/completions", self._guarded(self.completions), methods=post),
            Route("/tokenize", self._guarded(self.tokenize), methods=post),
            Route("/detokenize", self._guarded(self.detokenize), methods=post),
            Route("/fleet", self._guarded(operate.status), methods=get),
            Route("/fleet/endpoints", self._guarded(operate.add), methods=post),
            Route("/fleet/endpoints/{name}/drain", self._guarded(operate.drain), methods=post),
            Route("/fleet/endpoints/{name}/undrain", self._guarded(operate.undrain), methods=post),
            Route("/fleet/endpoints/{name}/restart", self._guarded(operate.restart), methods=post),
            Route("/fleet/endpoints/{name}", self._guarded(operate.remove), methods=["DELETE"]),
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

    def _generator(self, name: str) -> Generator:
        """Of the model that is asked for."""
        generator = self.generators.get(name)
        if generator is not None:
            return generator
        if not name:
            return next(iter(self.generators.values()))
        known = ", ".join(repr(known) for known in self.generators)
        raise ApiError(
            404, f"model {name!r} does not exist; this server has {known}", param="model", code="model_not_found"
        )

    # --- generation -------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response | EventStream:
        body = decode(await self._body(request), ChatRequest, self.limits)
        generator = self._generator(body.model)
        if isinstance(body.tool_choice, dict) or body.tool_choice not in (None, "none", "auto"):
            raise invalid("tool_choice must be 'none' or 'auto': a call cannot be forced", "tool_choice")
        tools = None if body.tool_choice == "none" else body.tools
        prompt = generator.chat_prompt(body.messages, tools, body.add_generation_prompt, body.chat_template_kwargs)
        return await self._answer(request, generator, body, [prompt], ChatFormat)

    async def completions(self, request: Request) -> Response | EventStream:
        body = decode(await self._body(request), CompletionRequest, self.limits)
        generator = self._generator(body.model)
        if body.suffix:
            raise invalid("suffix is not supported", "suffix")
        if body.echo and body.logprobs is not None:
            raise invalid("echo together with logprobs is not supported", "echo")
        return await self._answer(request, generator, body, generator.prompts(body), CompletionFormat)

    async def _answer(
        self,
        request: Request,
        generator: Generator,
        body: ChatRequest | CompletionRequest,
        prompts: list[list[int]],
        make_format: Any,
    ) -> Response | EventStream:
        if self.fleet.draining:
            raise ApiError(503, "the server is shutting down", code="draining")
        request_id: str = request.state.request_id
        cache_salt = (body.cache_salt or "") if isinstance(body, CompletionRequest) else ""
        jobs = [await generator.job(body, p, f"{request_id}-{i}", cache_salt) for i, p in enumerate(prompts)]
        form = make_format(body, generator.tokenizer, generator.pool.name, request_id, prompts)
        usage = Usage(sum(map(len, prompts)))
        num_choices = sum(job.request.n for job in jobs)
        timers = [self.metrics.timer(request.state.arrived, len(job.request.prompt), job.request.n) for job in jobs]
        answer: EventStream | WholeAnswer
        if body.stream:
            wants_usage = body.stream_options is not None and body.stream_options.include_usage
            answer = EventStream(form, usage, num_choices, wants_usage=wants_usage)
        else:
            answer = WholeAnswer(form, usage)
        answer.work = Work(generator, jobs, timers, usage, answer.piece, answer.failed)
        try:
            async with _cancelled_by_disconnect(request):
                if isinstance(answer, WholeAnswer):
                    return _json(await answer.body())
                await answer.begun()
                return answer
        except (asyncio.CancelledError, ClientDisconnect):
            answer.work.abandon()
            raise

    # --- everything else --------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        return _json(
            {"object": "list", "data": [self._model_entry(generator) for generator in self.generators.values()]}
        )

    async def one_model(self, request: Request) -> Response:
        return _json(self._model_entry(self._generator(request.path_params["name"])))

    def _model_entry(self, generator: Generator) -> dict[str, Any]:
        return {
            "id": generator.pool.name,
            "object": "model",
            "created": self._started,
            "owned_by": "shoal",
            "max_model_len": generator.max_len,
        }

    async def experts(self, request: Request) -> Response:
        generator = self._generator(request.query_params.get("model", ""))
        loads = [load for engine in own_engines(generator.pool) for load in engine.experts]
        if not any(engine.engine_info.spec.moe for engine in own_engines(generator.pool)):
            raise ApiError(404, f"{generator.pool.name!r} has no experts", code="no_experts")
        return _json(ExpertReport(engines=loads))

    async def tokenize(self, request: Request) -> Response:
        body = decode(await self._body(request), TokenizeRequest, self.limits)
        generator = self._generator(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("give either prompt or messages", "prompt")
        if body.messages is not None:
            ids = generator.chat_prompt(body.messages, body.tools, body.add_generation_prompt)
        else:
            # Of any length, for counting is what this is for: on a thread, or every stream would wait for it.
            ids = await asyncio.to_thread(generator.tokenizer.encode, body.prompt or "", body.add_special_tokens)
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": generator.max_len, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = [generator.tokenizer.token_text(i) for i in ids]
        return _json(answer)

    async def detokenize(self, request: Request) -> Response:
        body = decode(await self._body(request), DetokenizeRequest, self.limits)
        generator = self._generator(body.model)
        if any(i >= generator.vocab_size for i in body.tokens):
            raise invalid(f"token ids must lie in [0, {generator.vocab_size})", "tokens")
        return _json({"prompt": generator.tokenizer.decode(body.tokens, body.skip_special_tokens)})

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
        """Why requests should go elsewhere; None if they need not: every model has an endpoint that makes progress."""
        if self.fleet.draining:
            return "the server is shutting down"
        for pool in self.fleet.pools.values():
            if not any(member.state == "ready" for member in pool.members.values()):
                reasons = "; ".join(f"{m.name}: {m.reason or m.state}" for m in pool.members.values())
                return f"no endpoint of {pool.name!r} is ready ({reasons or 'it has none'})"
        return None


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
