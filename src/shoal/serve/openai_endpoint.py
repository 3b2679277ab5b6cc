"""Placeholder until the branch is merged."""

from __future__ import annotations

from shoal.core.fleet_types import EndpointKind
from shoal.serve.endpoint import Attempt, EndpointInfo, EndpointListener


class OpenAIEndpoint:
    kind: EndpointKind = "openai"
    info: EndpointInfo

    def __init__(self, name: str, url: str, *, model: str | None = None, api_key: str | None = None) -> None:
        self.name = name
        self.address = url

    async def start(self, listener: EndpointListener) -> None: ...
    def submit(self, attempt: Attempt) -> None: ...
    def abort(self, request_id: str, index: int | None = None) -> None: ...
    async def stop(self) -> None: ...
