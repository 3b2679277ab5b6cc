"""What a connection may cost before a request is complete: time and bytes of its head. The server's own 4xx for it.

uvicorn limits neither, so a client that sends its headers slowly, or without end, would hold a socket and memory for
as long as it likes.
"""

from __future__ import annotations

import asyncio

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from shoal.serve.errors import ApiError
from shoal.serve.protocol import Limits

_REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


class LimitedConnection(HttpToolsProtocol):
    """One client's connection. `with_limits` gives the class that uvicorn makes them of."""

    _limits = Limits()
    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    """Received since the last complete request, while the head of the next is awaited."""
    _in_body = False

    @classmethod
    def with_limits(cls, limits: Limits) -> type[LimitedConnection]:
        return type(cls.__name__, (cls,), {"_limits": limits})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._in_body:
            self._head_bytes += len(data)
        super().data_received(data)
        # Checked after parsing: what was read together with a complete head is its body.
        if not self._in_body and self._head_bytes > self._limits.header_bytes and not self.transport.is_closing():
            self._refuse(ApiError(431, f"the request's headers are larger than {self._limits.header_bytes} bytes"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_body = False
        if self._head_timer is None:
            self._await_head()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        # Of an absolute URL the application would see the path alone, and another server before it perhaps the host.
        if not self.url.startswith(b"/"):
            raise ValueError("the target is not a path")

    def on_headers_complete(self) -> None:
        self._in_body = True
        self._head_bytes = 0
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_body = False

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "this is not a valid HTTP request", code="invalid_http"))

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.header_seconds, self._head_is_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._refuse(ApiError(408, f"the request's headers did not arrive within {self._limits.header_seconds:g} s"))

    def _refuse(self, error: ApiError) -> None:
        self._stop_timer()
        if self.transport.is_closing():
            return
        body = msgspec.json.encode(error.body())
        head = (
            f"HTTP/1.1 {error.status} {_REASONS[error.status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
