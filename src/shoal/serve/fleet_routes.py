"""What operators ask of a fleet over HTTP: its state; endpoints to add, drain, restart and remove."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from shoal.serve.books import Books
from shoal.serve.deployment import EndpointAddress
from shoal.serve.endpoint import EndpointStartError
from shoal.serve.errors import ApiError, invalid
from shoal.serve.fleet import Fleet
from shoal.serve.pool import Pool

_encode = msgspec.json.Encoder().encode
_Body = TypeVar("_Body", bound=msgspec.Struct)


class AddEndpoint(msgspec.Struct, forbid_unknown_fields=True):
    """`openai` names a server that runs already; without it an engine is started."""

    model: str = ""
    openai: str | None = None
    name: str | None = None
    api_key: str | None = None
    remote_model: str | None = None
    """What that server calls the model."""


class DrainEndpoint(msgspec.Struct, forbid_unknown_fields=True):
    seconds: float | None = None
    """After which what still runs is moved; None is the deployment's drain_seconds."""


AddAny = Callable[[Pool, EndpointAddress | None], Awaitable[str]]


class FleetRoutes:
    """Handlers; the table of routes is in http.py."""

    def __init__(self, fleet: Fleet, add: AddAny, drain_seconds: float, books: Books) -> None:
        self._books = books
        self._fleet = fleet
        self._add = add
        self._drain_seconds = drain_seconds

    async def status(self, request: Request) -> Response:
        return _json(self._fleet.status())

    async def add(self, request: Request) -> Response:
        body = await _decoded(request, AddEndpoint)
        name = body.model or next(iter(self._fleet.pools))
        if name not in self._fleet.pools:
            known = ", ".join(repr(known) for known in self._fleet.pools)
            raise ApiError(404, f"model {name!r} does not exist; this fleet has {known}", param="model")
        address = None
        if body.openai is not None:
            if not body.openai.startswith(("http://", "https://")):
                raise invalid(f"openai is {body.openai!r}; write a URL such as http://127.0.0.1:8001", "openai")
            address = EndpointAddress(openai=body.openai, model=body.remote_model, api_key=body.api_key, name=body.name)
        try:
            added = await self._add(self._fleet.pools[name], address)
            return self._done(request, "add", added, {"name": added}, 201)
        except EndpointStartError as error:
            raise ApiError(502, f"the endpoint cannot be used: {error}", code="endpoint_failed") from None

    async def drain(self, request: Request) -> Response:
        name, body = request.path_params["name"], await _decoded(request, DrainEndpoint)
        await self._fleet.drain(name, self._seconds(body))
        return self._done(request, "drain", name, {"name": name, "drained": True})

    async def undrain(self, request: Request) -> Response:
        member = self._fleet.member(request.path_params["name"])
        member.draining = False
        return self._done(request, "undrain", member.name, {"name": member.name, "draining": False})

    async def restart(self, request: Request) -> Response:
        name, body = request.path_params["name"], await _decoded(request, DrainEndpoint)
        await self._fleet.restart(name, self._seconds(body))
        return self._done(request, "restart", name, {"name": name, "restarted": True})

    async def remove(self, request: Request) -> Response:
        name = request.path_params["name"]
        await self._fleet.remove(name)
        return self._done(request, "remove", name, {"name": name, "removed": True})

    def _done(self, request: Request, action: str, target: str, body: object, status: int = 200) -> Response:
        self._books.operated(request.state.principal, action, target, status)
        return _json(body, status)

    def _seconds(self, body: DrainEndpoint) -> float:
        return self._drain_seconds if body.seconds is None else body.seconds


async def _decoded(request: Request, kind: type[_Body]) -> _Body:
    raw = await request.body()
    try:
        return msgspec.json.decode(raw or b"{}", type=kind)
    except msgspec.DecodeError as error:
        raise invalid(f"the body cannot be read: {error}") from None


def _json(body: object, status: int = 200) -> Response:
    return Response(_encode(body), status_code=status, media_type="application/json")
