"""One streamed answer as the client sees it, and the connections that carry them: asyncio protocols, little parsing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httptools

_IDS = b'"token_ids":['  # with its quotation mark it is not found in "prompt_token_ids"
_TEXTS = (b'"content":"', b'"text":"')


@dataclass(slots=True)
class Stream:
    """A request and what came of it. Times are monotonic seconds."""

    number: int
    request: bytes
    """Head and body, ready to be sent."""
    intended: float = 0.0
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    """Of chunks that held tokens."""
    counts: list[int] = field(default_factory=list)
    """Tokens in each of them."""
    ids: list[int] = field(default_factory=list)
    texts: list[bytes] = field(default_factory=list)
    """Of chunks without ids, for servers that do not pass them on. Mocks say plain words, so nothing is escaped."""
    status: int = 0
    ended: float = 0.0
    finished: bool = False
    """It ended as a stream should: `data: [DONE]` and then the end of the body."""
    error: str = ""
    _tail: bytes = b""

    def received(self, body: bytes, now: float) -> None:
        if self._tail:
            body = self._tail + body
        *events, self._tail = body.split(b"\n\n")
        for event in events:
            at = event.find(_IDS)
            if at >= 0:
                found = event[at + len(_IDS) : event.index(b"]", at)]
                if found:
                    tokens = found.split(b",")
                    self.ids += map(int, tokens)
                    self.times.append(now)
                    self.counts.append(len(tokens))
            else:
                self._without_ids(event, now)

    def _without_ids(self, event: bytes, now: float) -> None:
        if event.endswith(b"[DONE]"):
            self.finished = True
            return
        if b'"error"' in event:
            self.error = event.decode(errors="replace")[:200]
            return
        for key in _TEXTS:
            at = event.find(key)
            if at >= 0:
                at += len(key)
                text = event[at : event.index(b'"', at)]
                if text:
                    self.texts.append(text)
                    self.times.append(now)
                    self.counts.append(1)
                return

    @property
    def complete(self) -> bool:
        return self.status == 200 and self.finished and not self.error


class Connection(asyncio.Protocol):
    """Carries one stream at a time; then it is free for the next, unless the server closes it."""

    def __init__(self, on_free: Callable[[Connection], None], on_end: Callable[[Stream], None]) -> None:
        self._on_free, self._on_end = on_free, on_end
        self._stream: Stream | None = None
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0.0

    def send(self, stream: Stream) -> None:
        """At once where it is connected, else once it is."""
        self._stream = stream
        if self._transport is not None:
            self._write(stream)

    def _write(self, stream: Stream) -> None:
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        stream.sent = time.monotonic()
        self._transport.write(stream.request)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        if self._stream is not None:
            self._write(self._stream)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._stream is not None:
            self.fail(f"the connection was lost: {error or 'closed'}")

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def fail(self, reason: str) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.error, stream.ended = stream.error or reason, time.monotonic()
            self._on_end(stream)

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(f"not HTTP: {error}")
            self.close()

    def on_body(self, body: bytes) -> None:
        if self._stream is None:
            return
        if self._parser.get_status_code() == 200:
            self._stream.received(body, self._now)
        else:
            self._stream.error += body.decode(errors="replace")[:200]

    def on_message_complete(self) -> None:
        stream, self._stream = self._stream, None
        if stream is None:
            return
        stream.status, stream.ended = self._parser.get_status_code(), self._now
        if not self._parser.should_keep_alive():
            self.close()
        self._on_end(stream)
        self._on_free(self)
