"""Which endpoint gets a request."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal.core.fleet_types import EndpointReport, RouteRequest


class RoutingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    policy: str = "least_tokens"


class Router:
    def __init__(self, config: RoutingConfig) -> None:
        self.config = config
        self._tokens: dict[str, int] = {}
        self._requests: dict[tuple[str, str], int] = {}

    def add(self, name: str, *, max_sequences: int | None, num_blocks: int | None, block_size: int, now: float) -> None:
        self._tokens[name] = 0

    def remove(self, name: str) -> None:
        self._tokens.pop(name, None)

    def route(self, request: RouteRequest, candidates: Sequence[str], now: float) -> str | None:
        fresh = [name for name in candidates if name not in request.avoid] or candidates
        return min(fresh, key=lambda name: (self._tokens[name], name), default=None)

    def dispatched(self, request: RouteRequest, name: str, now: float) -> None:
        self._requests[request.id, name] = tokens = request.num_prompt + request.num_output
        self._tokens[name] += tokens

    def first_token(self, request_id: str, name: str, now: float) -> None:
        pass

    def finished(self, request_id: str, name: str, num_generated: int, now: float, *, ok: bool) -> None:
        self._tokens[name] = self._tokens.get(name, 0) - self._requests.pop((request_id, name), 0)

    def reported(self, name: str, report: EndpointReport, now: float) -> None:
        pass
