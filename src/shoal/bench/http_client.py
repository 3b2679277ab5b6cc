"""A small HTTP/1.1 client on asyncio: one connection a request, so that its loss is the loss of that request alone.

Libraries hide what is measured here: when bytes came, whether an answer was cut short, and resets on purpose.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httptools

_READ_BYTES = 1 << 16


class ConnectionLost(Exception):
    """The connection could not be made, or ended before the answer was whole."""


class Answer:
    """A whole answer."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def json(self) -> Any:
        return json.loads(self.body)


class Exchange:
    """One request and its answer. `connect`, then `send`, `head`, and `chunks` until they end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
        self._reader = reader
        self._writer = writer
        self._host = host
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._has_head = False
        self._complete = False
        self.headers: dict[str, str] = {}
        """Names in lower case."""

    @classmethod
    async def connect(cls, url: str, *, receive_buffer: int | None = None) -> Exchange:
        """`receive_buffer`: bytes that the kernel holds for a client that does not read."""
        parts = urlsplit(url)
        host, secure = parts.hostname or "127.0.0.1", parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        try:
            if receive_buffer is None:
                reader, writer = await asyncio.open_connection(host, port, ssl=secure or None)
            else:
                plain = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
                plain.setblocking(False)
                await asyncio.get_running_loop().sock_connect(plain, (host, port))
                reader, writer = await asyncio.open_connection(sock=plain, limit=receive_buffer)
        except OSError as error:
            raise ConnectionLost(f"cannot connect to {url}: {error}") from None
        return cls(reader, writer, f"{host}:{port}")

    async def send(self, method: str, path: str, headers: Mapping[str, str] = {}, body: bytes = b"") -> None:
        lines = [f"{method} {path} HTTP/1.1", f"host: {self._host}", "connection: close"]
        if body or method == "POST":
            lines += ["content-type: application/json", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        await self.send_raw("\r\n".join([*lines, "", ""]).encode() + body)

    async def send_raw(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise ConnectionLost(f"the connection was lost while sending: {error}") from None

    async def head(self) -> int:
        """The answer's status, once its headers have come."""
        while not self._has_head:
            await self._receive()
        return int(self._parser.get_status_code())

    @property
    def answered(self) -> bool:
        """Whether an answer has begun."""
        return self._has_head

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises ConnectionLost if it is cut short."""
        await self.head()
        while True:
            while self._parts:
                yield self._parts.pop(0)
            if self._complete:
                return
            await self._receive()

    async def whole(self) -> Answer:
        status = await self.head()
        return Answer(status, self.headers, b"".join([part async for part in self.chunks()]))

    async def _receive(self) -> None:
        try:
            data = await self._reader.read(_READ_BYTES)
        except OSError as error:
            raise ConnectionLost(f"the connection was lost: {error}") from None
        if not data:
            if self._has_head and not {"content-length", "transfer-encoding"} & self.headers.keys():
                self._complete = True  # such a body ends with its connection
                return
            raise ConnectionLost("the connection was closed before the answer was whole")
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise ConnectionLost(f"the answer is not HTTP: {error}") from None

    def close(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        """Close with a TCP reset, as a client that dies does."""
        if not self._writer.transport.is_closing():
            self.socket().setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    def socket(self) -> Any:
        """asyncio's view of it: options and the descriptor, no reading."""
        return self._writer.get_extra_info("socket")

    # --- what the parser calls --------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._has_head = True

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        self._complete = True


async def fetch(
    url: str,
    path: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] = {},
    body: bytes = b"",
    seconds: float = 10.0,
) -> Answer:
    """A whole answer within `seconds`, or ConnectionLost."""
    try:
        async with asyncio.timeout(seconds):
            exchange = await Exchange.connect(url)
            try:
                await exchange.send(method, path, headers, body)
                return await exchange.whole()
            finally:
                exchange.close()
    except TimeoutError:
        raise ConnectionLost(f"{url}{path} did not answer within {seconds:g} s") from None


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[tuple[str | None, str]]:
    """(id, data) of server-sent events; comments and other fields are passed over."""
    pending = b""
    async for chunk in chunks:
        pending = (pending + chunk).replace(b"\r\n", b"\n")
        *whole, pending = pending.split(b"\n\n")
        for block in whole:
            event_id, data = None, []
            for line in block.decode("utf-8").split("\n"):
                name, _, value = line.partition(":")
                value = value.removeprefix(" ")
                if name == "id":
                    event_id = value
                elif name == "data":
                    data.append(value)
            if data:
                yield event_id, "\n".join(data)
