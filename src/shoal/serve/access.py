"""Who may ask for what: one table of routes and scopes, held against a request before anything routes it.

What is not in the table does not exist, whatever else would answer. A route that needs no scope is open to everybody.
"""

from __future__ import annotations

import hmac
import re
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Literal

from shoal.serve.errors import ApiError
from shoal.serve.tenants import DEFAULT_TENANT, SCOPES, KeyFile, KeyProblem, Principal, Scope, utc_now

Headers = Sequence[tuple[bytes, bytes]]
"""As ASGI has them: names in lower case."""
Reason = KeyProblem | Literal["bad_target", "scope", "no_route", "method"]

OPEN: tuple[Scope, ...] = ()
ROUTES: dict[tuple[str, str], tuple[Scope, ...]] = {
    # (method, path): scopes of which a key needs one. `{name}` is one segment or several, never an empty or dotted one.
    ("GET", "/health"): OPEN,
    ("GET", "/ready"): ("read", "metrics", "admin"),
    ("GET", "/version"): ("read", "metrics", "admin"),
    ("GET", "/v1/models"): ("read", "generate"),
    ("GET", "/v1/models/{name}"): ("read", "generate"),
    ("POST", "/v1/chat/completions"): ("generate",),
    ("POST", "/v1/completions"): ("generate",),
    ("GET", "/v1/streams/{id}"): ("generate",),
    ("POST", "/tokenize"): ("generate",),
    ("POST", "/detokenize"): ("generate",),
    ("GET", "/v1/experts"): ("metrics", "admin"),
    ("GET", "/metrics"): ("metrics",),
    ("GET", "/fleet"): ("metrics", "admin"),
    ("POST", "/fleet/endpoints"): ("admin",),
    ("POST", "/fleet/endpoints/{name}/drain"): ("admin",),
    ("POST", "/fleet/endpoints/{name}/undrain"): ("admin",),
    ("POST", "/fleet/endpoints/{name}/restart"): ("admin",),
    ("DELETE", "/fleet/endpoints/{name}"): ("admin",),
    # Pages without data: what they show they fetch from /fleet, with a key.
    ("GET", "/dashboard"): OPEN,
    ("GET", "/dashboard/{name}"): OPEN,
}

_PATH = re.compile(r"/|(/[A-Za-z0-9._~:@+=,-]+)+")
"""Neither an absolute URL nor an empty segment, an escape, a backslash or a parameter: nothing that two readers of a
path could read differently."""
_DOTTED = re.compile(r"/\.{1,2}(/|$)")
_ONCE = (b"host", b"authorization", b"content-length", b"transfer-encoding")
_SAID: dict[Reason, str] = {
    "missing": "no API key: send `Authorization: Bearer KEY`",
    "malformed": "wrong API key: what was sent is not a key",
    "unknown": "wrong API key",
    "wrong_secret": "wrong API key",
    "revoked": "the API key is revoked: ask for a new one",
    "expired": "the API key has expired: ask for a new one",
    "not_yet_valid": "the API key is not valid yet",
}


class Denied(ApiError):
    """An answer to the client, and what an audit log says of it."""

    def __init__(self, status: int, message: str, reason: Reason, *, key_id: str = "", code: str | None = None) -> None:
        super().__init__(status, message, code=code)
        self.reason = reason
        self.key_id = key_id
        """Of the key that was sent, valid or not; empty where there was none."""


class RouteTable:
    """Paths to scopes: a lookup for those without names, a pattern for each of the others."""

    def __init__(self, routes: dict[tuple[str, str], tuple[Scope, ...]]) -> None:
        self._exact: dict[str, dict[str, tuple[Scope, ...]]] = {}
        self._patterns: dict[str, tuple[re.Pattern[str], dict[str, tuple[Scope, ...]]]] = {}
        for (method, path), scopes in routes.items():
            if "{" not in path:
                self._exact.setdefault(path, {})[method] = scopes
                continue
            pattern = re.compile("(.+)".join(map(re.escape, re.split(r"\{\w+\}", path))))
            self._patterns.setdefault(path, (pattern, {}))[1][method] = scopes

    def find(self, path: str) -> dict[str, tuple[Scope, ...]] | None:
        """Scopes by method."""
        found = self._exact.get(path)
        if found is None:
            for pattern, methods in self._patterns.values():
                if pattern.fullmatch(path):
                    found = {**methods, **found} if found else methods
        return found


class Access:
    """The door. Without keys everybody may do everything, which is for a listener on loopback alone."""

    def __init__(
        self,
        keys: KeyFile | None = None,
        *,
        api_key: str | None = None,
        routes: dict[tuple[str, str], tuple[Scope, ...]] = ROUTES,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        """`api_key`: one more key, of the default tenant, that may do everything."""
        self._keys = keys
        self._api_key = api_key.encode() if api_key else None
        self._routes = RouteTable(routes)
        self._clock = clock
        self._everything = Principal(tenant=DEFAULT_TENANT, key_id="", scopes=SCOPES)
        self._holder = Principal(tenant=DEFAULT_TENANT, key_id="api-key", scopes=SCOPES)
        self.denied: Counter[Reason] = Counter()

    @property
    def is_open(self) -> bool:
        return self._keys is None and self._api_key is None

    def check(self, method: str, path: str, headers: Headers) -> Principal | Denied:
        """Who may make this request, or why nobody or not this one. `path`: decoded, as the router will see it."""
        answer = self._check(method, path, headers)
        if isinstance(answer, Denied):
            self.denied[answer.reason] += 1
        return answer

    def _check(self, method: str, path: str, headers: Headers) -> Principal | Denied:
        seen = [name for name, _ in headers if name in _ONCE]
        if len(seen) > len(dict.fromkeys(seen)):
            twice = next(name for name in seen if seen.count(name) > 1).decode()
            return Denied(400, f"the header {twice} is there twice", "bad_target", code="bad_target")
        is_plain = _PATH.fullmatch(path) is not None and _DOTTED.search(path) is None
        methods = self._routes.find(path) if is_plain else None
        scopes = methods.get("GET" if method == "HEAD" else method) if methods else None
        if scopes == OPEN:
            return self._everything if self.is_open else Principal(tenant="", key_id="", scopes=())
        # Whether a route exists is told to those alone who may ask for anything.
        caller = self._identify(headers)
        if isinstance(caller, Denied):
            return caller
        if not is_plain:
            return Denied(400, "this is not a path", "bad_target", key_id=caller.key_id, code="bad_target")
        if methods is None:
            return Denied(404, f"there is nothing at {path}", "no_route", key_id=caller.key_id, code="unknown_url")
        if scopes is None:
            return Denied(405, f"{method} is not allowed at {path}", "method", key_id=caller.key_id)
        if any(scope in caller.scopes for scope in scopes):
            return caller
        needed = " or ".join(scopes)
        message = f"this API key has the scopes {', '.join(caller.scopes)}; {method} {path} needs {needed}"
        return Denied(403, message, "scope", key_id=caller.key_id, code="insufficient_scope")

    def _identify(self, headers: Headers) -> Principal | Denied:
        if self.is_open:
            return self._everything
        header = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, given = header.partition(b" ")
        given = given.strip() if scheme.lower() == b"bearer" else b""
        if self._api_key is not None and hmac.compare_digest(given, self._api_key):
            return self._holder
        problem: KeyProblem = "malformed" if given else "missing"
        key_id = ""
        if self._keys is not None:
            found = self._keys.ring.identify(given.decode("latin-1"), self._clock())
            if isinstance(found, Principal):
                return found
            problem, key_id = found
        return Denied(401, _SAID[problem], problem, key_id=key_id, code="invalid_api_key")
