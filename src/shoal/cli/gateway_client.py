"""A running gateway, as the commands see it: its status, and what an administrator may ask of it."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from difflib import get_close_matches
from typing import Any

import msgspec

from shoal.cli.errors import CommandError
from shoal.cli.terminal import printable
from shoal.core.fleet_types import EndpointStatus, FleetStatus

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class GatewayUnreachable(CommandError):
    """It may answer later."""


class _Added(msgspec.Struct):
    name: str


class GatewayClient:
    def __init__(self, url: str, api_key: str | None, *, seconds: float = 10.0) -> None:
        """`seconds` bounds what is answered at once. Raises CommandError."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise CommandError(f"--url is {url!r}: write the gateway's address, as http://127.0.0.1:8000")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise CommandError("--api-key holds a character that no key has: copy it again")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._seconds = seconds
        # A proxy for the outside world must not get a request, and its key, that is meant for this machine.
        handlers = [urllib.request.ProxyHandler({})] if parts.hostname in _LOOPBACK else []
        self._opener = urllib.request.build_opener(*handlers)

    def status(self) -> FleetStatus:
        try:
            return msgspec.json.decode(self._ask("GET", "/fleet", seconds=self._seconds), type=FleetStatus)
        except msgspec.DecodeError as error:
            raise CommandError(f"what {self.url}/fleet answers is no fleet's status: {error}") from None

    def endpoint(self, name: str) -> EndpointStatus:
        """Raises CommandError with the nearest name where there is none of this one."""
        found = {endpoint.name: endpoint for model in self.status().models for endpoint in model.endpoints}
        if name not in found:
            raise CommandError(f"there is no endpoint {name!r}: {_nearest(name, list(found), 'endpoint')}")
        return found[name]

    def check_model(self, name: str) -> None:
        models = [model.name for model in self.status().models]
        if name not in models:
            raise CommandError(f"there is no model {name!r}: {_nearest(name, models, 'model')}")

    # These are answered once they are done, which may take as long as a request or the start of an engine.

    def drain(self, name: str) -> None:
        self._ask("POST", _path(name, "/drain"), seconds=None)

    def restart(self, name: str) -> None:
        self._ask("POST", _path(name, "/restart"), seconds=None)

    def remove(self, name: str) -> None:
        self._ask("DELETE", _path(name), seconds=None)

    def add(self, body: dict[str, Any]) -> str:
        """The new endpoint's name."""
        answer = self._ask("POST", "/fleet/endpoints", body, seconds=None)
        try:
            return msgspec.json.decode(answer, type=_Added).name
        except msgspec.DecodeError as error:
            raise CommandError(f"what {self.url}/fleet/endpoints answers names no endpoint: {error}") from None

    def undrain(self, name: str) -> None:
        self._ask("POST", _path(name, "/undrain"), seconds=self._seconds)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None, *, seconds: float | None) -> bytes:
        request = urllib.request.Request(f"{self.url}{path}", method=method, headers=dict(self._headers))
        if body is not None:
            request.data = msgspec.json.encode(body)
            request.add_header("content-type", "application/json")
        try:
            with self._opener.open(request, timeout=seconds) as response:
                answer: bytes = response.read()
                return answer
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(path, error.code, error.read()) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            raise GatewayUnreachable(
                f"no gateway answers at {self.url} ({said.lower()}): "
                "start one with `shoal serve --deployment`, or name it with --url"
            ) from None

    def _refused(self, path: str, status: int, body: bytes) -> CommandError:
        message = _message(body)
        if status == 401:
            why = (message or "it was not accepted") if self._headers else "none was given"
            return CommandError(f"{self.url} asks for an API key (--api-key or SHOAL_API_KEY): {why}")
        if status == 403:
            return CommandError(f"this key may not do that: {message or 'it lacks the scope'}")
        if status == 404 and path == "/fleet":
            return CommandError(f"{self.url} has no fleet: only `shoal serve --deployment` runs one")
        return CommandError(message or f"the gateway answered {path} with status {status}")


def _path(name: str, action: str = "") -> str:
    return f"/fleet/endpoints/{urllib.parse.quote(name, safe='')}{action}"


def _message(body: bytes) -> str:
    """Of an error in OpenAI's form, in one line."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return ""
    return " ".join(printable(str(message)).split())


def _nearest(name: str, names: list[str], kind: str) -> str:
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"the nearest is {close[0]!r}"
    return f"this fleet has {', '.join(map(repr, sorted(names)))}" if names else f"this fleet has no {kind}"
