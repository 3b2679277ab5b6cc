"""The HTTP front: routes, body limits, authentication, streaming, readiness, metrics."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from hashlib import sha256
from math import ceil
from pathlib import Path
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
from shoal.serve.access import Access, Denied
from shoal.serve.answer import EventStream
from shoal.serve.audit.log import AuditLog
from shoal.serve.books import Books, digest_of_files
from shoal.serve.dashboard.assets import HEADERS, Asset, dashboard_assets
from shoal.serve.deployment import redacted
from shoal.serve.errors import ApiError, invalid
from shoal.serve.fleet_metrics import FleetMetrics
from shoal.serve.fleet_routes import FleetRoutes
from shoal.serve.generation import Generator
from shoal.serve.metrics import ServerMetrics, own_engines
from shoal.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, decode
from shoal.serve.reception import Reception
from shoal.serve.session import Session
from shoal.serve.tenants import KeyFile, Principal
from shoal.serve.tracing import TracingConfig, open_tracer

_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode


class Server:
    """The application over a fleet. `app` is what an ASGI server runs."""

    def __init__(self, session: Session) -> None:
        config = session.deployment
        self._session = session
        self.fleet = fleet = session.fleet
        self.generators = session.generators
        """By the model's name; the first one serves requests that name none."""
        self.limits = config.limits
        self.metrics = ServerMetrics(fleet)
        self.access = Access(None if config.keys is None else KeyFile(Path(config.keys)), api_key=config.api_key)
        self.fleet_metrics = FleetMetrics(fleet.status, models=fleet.pools, tenants=config.tenants)
        fleet.percentiles = self.fleet_metrics.percentiles
        digest = sha256(msgspec.json.encode(redacted(config))).hexdigest()
        audit = None if config.audit is None else AuditLog(config.audit, config_digest=digest)
        if audit is not None:
            fleet.audit_state = lambda: audit.state
        fleet.on_event = lambda said: self.books.happened(said)
        self._digesting: asyncio.Task[None] | None = None
        self.tracer = open_tracer(config.tracing or TracingConfig())
        self.books = Books(self.metrics, self.fleet_metrics, self.tracer, audit, digest)
        self.reception = Reception(session, self.books)
        self._started = int(time.time())
        get, post = ["GET"], ["POST"]
        operate = FleetRoutes(fleet, session.add_any, config.drain_seconds, self.books)
        self._routes = [
            Route("/v1/models", self._guarded(self.models), methods=get),
            Route("/v1/models/{name:path}", self._guarded(self.one_model), methods=get),
            Route("/v1/experts", self._guarded(self.experts), methods=get),
            Route("/v1/streams/{id}", self._guarded(self.stream), methods=get),
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
        self._routes += [Route(path, page(asset), methods=get) for path, asset in dashboard_assets().items()]
        starlette = Starlette(routes=self._routes, exception_handlers={404: _no_route, 405: _no_method})
        starlette.router.redirect_slashes = False
        self.app = self._with_admission(starlette)

    async def open(self) -> None:
        """Before the first request. Raises StoreError."""
        await self.reception.open()
        if self.books.audit is not None:
            self._digesting = asyncio.create_task(self._find_digests())

    async def _find_digests(self) -> None:
        """Which weights answer, for the audit log: read in the background, which takes seconds a gigabyte."""
        for name, files in self._session.files.items():
            found = await asyncio.to_thread(digest_of_files, files.path, lambda: self.fleet.draining)
            self.books.weights_digests[name] = found

    async def close(self) -> None:
        """After the last one. What is written in the background is written by then."""
        await self.reception.close()
        if self._digesting is not None:
            await asyncio.gather(self._digesting, return_exceptions=True)
        await asyncio.to_thread(self.tracer.close)
        if self.books.audit is not None:
            await asyncio.to_thread(self.books.audit.close)

    # --- before and around every request ----------------------------------------------------------------------------

    def _with_admission(self, app: Starlette) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
        """Who may ask at all is decided here, before routing: no path can be spelled so that it is missed."""

        generating = {
            ("POST", "/v1/chat/completions"): self._guarded(self.chat),
            ("POST", "/v1/completions"): self._guarded(self.completions),
        }

        async def admit(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            request_id = _request_id(scope["headers"])
            scope["state"] = {"arrived": time.monotonic(), "request_id": request_id, "send": send}

            def send_with_id(message: Message) -> Awaitable[None]:
                if message["type"] == "http.response.start":
                    request_id = scope["state"]["request_id"]  # a client that is back has its own
                    message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                return send(message)

            principal = self._principal(scope)
            if isinstance(principal, ApiError):
                if isinstance(principal, Denied):
                    address = scope.get("client")
                    self.books.denied(principal, scope["method"], scope["path"], address[0] if address else "")
                self.metrics.rejected(principal.status)
                await _error_response(principal)(scope, receive, send_with_id)
                return
            scope["state"]["principal"] = principal
            direct = generating.get((scope["method"], scope["path"]))
            if direct is None:
                await app(scope, receive, send_with_id)
            else:
                # The router's layers would each take every event in hand. Whether it may be asked is decided already.
                answer = await direct(Request(scope, receive, send_with_id))
                await answer(scope, receive, send_with_id)

        return admit

    def _principal(self, scope: Scope) -> Principal | ApiError:
        """Who asks, or why nobody may ask so."""
        headers = scope["headers"]
        most, most_bytes = self.limits.headers, self.limits.header_bytes
        if len(headers) > most or sum(len(k) + len(v) for k, v in headers) > most_bytes:
            return ApiError(431, f"the request has more than {most} headers or {most_bytes} bytes of them")
        return self.access.check(scope["method"], scope["path"], headers)

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

    # --- generation -------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response | EventStream:
        raw = await self._body(request)
        return await self.reception.answer(request, decode(raw, ChatRequest, self.limits), raw)

    async def completions(self, request: Request) -> Response | EventStream:
        raw = await self._body(request)
        return await self.reception.answer(request, decode(raw, CompletionRequest, self.limits), raw)

    async def stream(self, request: Request) -> Response | EventStream:
        return await self.reception.resume(request, request.path_params["id"])

    # --- everything else --------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        return _json(
            {"object": "list", "data": [self._model_entry(generator) for generator in self.generators.values()]}
        )

    async def one_model(self, request: Request) -> Response:
        return _json(self._model_entry(self.reception.generator(request.path_params["name"])))

    def _model_entry(self, generator: Generator) -> dict[str, Any]:
        return {
            "id": generator.pool.name,
            "object": "model",
            "created": self._started,
            "owned_by": "shoal",
            "max_model_len": generator.max_len if generator.pool.is_known else None,
        }

    async def experts(self, request: Request) -> Response:
        generator = self.reception.generator(request.query_params.get("model", ""))
        loads = [load for engine in own_engines(generator.pool) for load in engine.experts]
        if not any(engine.engine_info.spec.moe for engine in own_engines(generator.pool)):
            raise ApiError(404, f"{generator.pool.name!r} has no experts", code="no_experts")
        return _json(ExpertReport(engines=loads))

    async def tokenize(self, request: Request) -> Response:
        body = decode(await self._body(request), TokenizeRequest, self.limits)
        generator = self.reception.generator(body.model)
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
        generator = self.reception.generator(body.model)
        if any(i >= generator.vocab_size for i in body.tokens):
            raise invalid(f"token ids must lie in [0, {generator.vocab_size})", "tokens")
        return _json({"prompt": generator.tokenizer.decode(body.tokens, body.skip_special_tokens)})

    async def prometheus(self, request: Request) -> Response:
        return Response(
            self.metrics.text() + self.fleet_metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

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


def _request_id(headers: list[tuple[bytes, bytes]]) -> str:
    given = next((value for key, value in headers if key == b"x-request-id"), b"").decode("latin-1")
    # The client's own id is kept for its logs but made unique: two requests may carry the same.
    clean = "".join(c for c in given[:64] if c.isascii() and (c.isalnum() or c in "-_."))
    unique = uuid4().hex
    return f"{clean}-{unique[:16]}" if clean else unique


def page(asset: Asset) -> Callable[[Request], Awaitable[Response]]:
    """Of the dashboard: the same for everybody."""

    async def send(request: Request) -> Response:
        return Response(asset.body, media_type=asset.content_type, headers=dict(HEADERS))

    return send


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_encode(body), status_code=status, media_type="application/json", headers=headers)


def _error_response(error: ApiError) -> Response:
    headers = {}
    if error.status in (429, 503):
        headers["retry-after"] = str(max(1, ceil(error.retry_after or 0.0)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return _json(error.body(), error.status, headers)


async def _no_route(request: Request, error: Exception) -> Response:
    return _error_response(ApiError(404, f"there is nothing at {request.url.path}", code="unknown_url"))


async def _no_method(request: Request, error: Exception) -> Response:
    return _error_response(ApiError(405, f"{request.method} is not allowed at {request.url.path}"))
