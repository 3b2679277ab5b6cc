"""An HTTP/1.1 client for a fleet's endpoints: pushed responses, kept connections, and failures as values.

Bytes go to a `Receiver` as the socket yields them, once a read: a stream of tokens costs no task and no queue.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Literal, Protocol, cast
from urllib.parse import urlsplit

import httptools
import msgspec

Loss = Literal["refused", "unreachable", "closed", "lost", "timeout"]
"""refused: nothing listens there · unreachable: no connection for another reason, or not in time · closed: the
connection ended before a byte of the answer · lost: it ended early, or what came is not HTTP · timeout: no whole answer
in time (only of `fetch`)."""

_MAX_KEPT = 32
"""Idle connections; more are closed."""
SPARE_CONNECTIONS = 2
"""Idle connections that a client in use keeps ready: requests come together, and none should wait for a handshake."""
_MAX_HEAD_BYTES = 64 << 10
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}
"""Seconds and probes: a peer that vanished without a word is noticed in about ten seconds, while a stream that merely
waits in the server's queue may be silent for minutes."""


class HttpError(Exception):
    def __init__(self, kind: Loss, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class HttpResponse(msgspec.Struct, frozen=True):
    status: int
    headers: dict[bytes, bytes]
    """Names in lower case."""
    body: bytes


class Receiver(Protocol):
    """Who gets a response. After `done`, `failed` or the exchange's `cancel`, nothing is called any more."""

    def head(self, status: int, headers: dict[bytes, bytes]) -> None: ...

    def body(self, data: bytes) -> None: ...

    def done(self) -> None: ...

    def failed(self, error: HttpError) -> None: ...


class HttpClient:
    """Connections to one server. `url` may have a path, which stands before every path asked for."""

    def __init__(
        self,
        url: str,
        *,
        headers: dict[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
        connect_seconds: float = 2.0,
    ) -> None:
        """Raises ValueError, with a message for the user."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not an address like http://127.0.0.1:8000")
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.connect_seconds = connect_seconds
        self.tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        self._path = parts.path.rstrip("/")
        host = f"[{self.host}]" if ":" in self.host else self.host
        fields = {"host": f"{host}:{self.port}", "accept": "*/*"} | (headers or {})
        if any(c in "\r\n" for value in fields.values() for c in value):
            raise ValueError("a header's value has a line break")
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._kept: list[_Connection] = []
        self._opening: asyncio.Task[None] | None = None
        self._exchanges: dict[Exchange, None] = {}

    def send(self, method: str, path: str, body: bytes | None, receiver: Receiver) -> Exchange:
        """Begin. Never raises; nothing is called on `receiver` before this has returned."""
        length = "" if body is None else f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._head}{length}\r\n"
        exchange = Exchange(self, head.encode() + (body or b""), receiver)
        self._exchanges[exchange] = None
        exchange.start()
        if len(self._kept) < SPARE_CONNECTIONS and self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open_spares())
        return exchange

    async def fetch(
        self, method: str, path: str, body: bytes | None = None, *, seconds: float, max_bytes: int = 16 << 20
    ) -> HttpResponse:
        """One whole answer, whatever its status. Raises HttpError."""
        collector = _Collector(max_bytes)
        exchange = self.send(method, path, body, collector)
        try:
            async with asyncio.timeout(seconds):
                return await collector.response
        except TimeoutError:
            raise HttpError("timeout", f"no answer to {method} {path} within {seconds:g} s") from None
        finally:
            exchange.cancel()

    def close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
        for exchange in list(self._exchanges):
            exchange.cancel()
        for connection in self._kept:
            connection.abort()
        self._kept.clear()

    # --- of connections ---------------------------------------------------------------------------------------------

    async def connect(self) -> _Connection:
        """A new connection. Raises HttpError."""
        where = f"{self.host}:{self.port}"
        try:
            async with asyncio.timeout(self.connect_seconds):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: _Connection(self), self.host, self.port, ssl=self.tls
                )
        except TimeoutError:
            raise HttpError("unreachable", f"no connection to {where} within {self.connect_seconds:g} s") from None
        except ConnectionRefusedError:
            raise HttpError("refused", f"{where} refuses connections") from None
        except (OSError, ssl.SSLError, ssl.CertificateError) as error:
            raise HttpError("unreachable", f"no connection to {where}: {error.strerror or error}") from None
        return connection

    async def _open_spares(self) -> None:
        """Whether the server can be reached is for requests to find out."""
        try:
            while len(self._kept) < SPARE_CONNECTIONS:
                self.keep(await self.connect())
        except HttpError:
            pass
        finally:
            self._opening = None

    def take_kept(self) -> _Connection | None:
        while self._kept:
            connection = self._kept.pop()
            if connection.usable:
                return connection
        return None

    def keep(self, connection: _Connection) -> None:
        if len(self._kept) < _MAX_KEPT:
            self._kept.append(connection)
        else:
            connection.abort()

    def forget(self, connection: _Connection) -> None:
        if connection in self._kept:
            self._kept.remove(connection)

    def ended(self, exchange: Exchange) -> None:
        self._exchanges.pop(exchange, None)


class Exchange:
    """A request under way."""

    def __init__(self, client: HttpClient, request: bytes, receiver: Receiver) -> None:
        self.request = request
        self.receiver: Receiver | None = receiver
        """None once it has ended."""
        self._client = client
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[None] | None = None

    def start(self) -> None:
        kept = self._client.take_kept()
        if kept is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect())
        else:
            self._connection = kept
            kept.begin(self)

    def cancel(self) -> None:
        """Closes the connection if the response is not complete: to the server, the client has left."""
        if self._end() is None:
            return
        if self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None:
            self._connection.abort()

    def finish(self) -> None:
        receiver = self._end()
        if receiver is not None:
            receiver.done()

    def fail(self, error: HttpError) -> None:
        receiver = self._end()
        if receiver is not None:
            receiver.failed(error)

    def again(self) -> None:
        """On a new connection: the kept one was closed by the server before the request reached it."""
        self._connection = None
        self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        try:
            connection = await self._client.connect()
        except HttpError as error:
            self.fail(error)
        else:
            self._connecting = None
            self._connection = connection
            connection.begin(self)

    def _end(self) -> Receiver | None:
        receiver, self.receiver = self.receiver, None
        self._client.ended(self)
        return receiver


class _Connection(asyncio.Protocol):
    """One socket, for one exchange after another."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._num_exchanges = 0
        self._received = 0
        """Bytes since the last request was sent."""
        self._headers: dict[bytes, bytes] = {}
        self._head_complete = False
        self._parts: list[bytes] = []
        """Of the body, from the read that is being parsed."""
        self._complete = False
        self._may_keep = False

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def begin(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._num_exchanges += 1
        self._received = 0
        self._headers, self._head_complete, self._complete = {}, False, False
        if self._transport is not None:
            self._transport.write(exchange.request)

    def abort(self) -> None:
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio ----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of no common class with asyncio's
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE.items():
                if hasattr(socket, option):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:  # a server that speaks unasked: what comes next could not be told apart
            self.abort()
            return
        self._received += len(data)
        had_head = self._head_complete
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._give_up(f"the answer is not HTTP: {error}")
            return
        if not self._head_complete and self._received > _MAX_HEAD_BYTES:
            self._give_up(f"the answer's head is larger than {_MAX_HEAD_BYTES} bytes")
            return
        self._deliver(exchange, not had_head)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.forget(self)
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        if self._num_exchanges > 1 and not self._received:
            exchange.again()
        elif self._head_complete and self._ends_with_connection() and exc is None:
            exchange.finish()
        else:
            what = f"the connection was lost: {exc}" if exc else "the connection was closed before the answer's end"
            exchange.fail(HttpError("lost" if self._received else "closed", what))

    # --- httptools --------------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._parser.get_status_code() >= 200:  # 1xx comes before the answer
            self._head_complete = True

    def on_body(self, data: bytes) -> None:
        self._parts.append(data)

    def on_message_complete(self) -> None:
        self._complete = self._head_complete
        self._may_keep = self._parser.should_keep_alive()  # the parser forgets it with its return

    # --- what was parsed --------------------------------------------------------------------------------------------

    def _deliver(self, exchange: Exchange, head_is_new: bool) -> None:
        """Outside the parser, which would turn an error of the receiver into one of its own."""
        data, self._parts = b"".join(self._parts), []
        if head_is_new and self._head_complete and exchange.receiver is not None:
            exchange.receiver.head(self._parser.get_status_code(), self._headers)
        if data and exchange.receiver is not None:
            exchange.receiver.body(data)
        if self._complete and self._exchange is not None:
            self._exchange = None
            if self._may_keep and self.usable:
                self._parser = httptools.HttpResponseParser(self)
                self._client.keep(self)
            else:
                self.abort()
            exchange.finish()

    def _ends_with_connection(self) -> bool:
        return b"content-length" not in self._headers and b"transfer-encoding" not in self._headers

    def _give_up(self, message: str) -> None:
        exchange = self._exchange
        self.abort()
        if exchange is not None:
            exchange.fail(HttpError("lost", message))


class _Collector:
    """A receiver that makes one response of what comes."""

    def __init__(self, max_bytes: int) -> None:
        self.response: asyncio.Future[HttpResponse] = asyncio.get_running_loop().create_future()
        self._max_bytes = max_bytes
        self._status = 0
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []
        self._size = 0

    def head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._status, self._headers = status, headers

    def body(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= self._max_bytes:
            self._parts.append(data)
        elif not self.response.done():
            self.response.set_exception(HttpError("lost", f"the answer is larger than {self._max_bytes} bytes"))

    def done(self) -> None:
        if not self.response.done():
            self.response.set_result(HttpResponse(self._status, self._headers, b"".join(self._parts)))

    def failed(self, error: HttpError) -> None:
        if not self.response.done():
            self.response.set_exception(error)
