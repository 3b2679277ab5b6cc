"""From the pieces of a request to what its client is sent: server-sent events as they come, or one whole body."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from shoal.serve.books import Book
from shoal.serve.errors import ApiError
from shoal.serve.flight import Flight
from shoal.serve.generation import Job, Piece
from shoal.serve.openai_format import Usage, joined

_encode = msgspec.json.Encoder().encode
_MOST_UNSENT_BYTES = 1 << 20
"""Of a stream whose client does not read: then it is ended, for what is generated has to be somewhere."""
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Work:
    """The jobs of one request under way. Choices are numbered over all of them."""

    def __init__(
        self,
        jobs: list[Job],
        book: Book,
        usage: Usage,
        answer: WholeAnswer | EventStream,
        on_end: Callable[[ApiError | None], None],
    ) -> None:
        """`on_end` is called once, when all have ended, with the error if there was one."""
        self._jobs = jobs
        self._book = book
        self._usage = usage
        self._answer = answer
        self._on_end = on_end
        self._is_over = False
        self.left = sum(len(job.indexes) for job in jobs)
        """Choices that have not ended."""
        self.flights: list[Flight] = []

    def begin(self, begin: Callable[[Job, Callable[[Piece], None], Callable[[ApiError], None]], Flight | None]) -> None:
        """Raises ApiError, with nothing left running."""
        try:
            for number, job in enumerate(self._jobs):
                flight = begin(job, self._taker(number, job.request.n), self._fail)
                if flight is not None:
                    self.flights.append(flight)
        except ApiError as error:
            self._book.discard()
            self._end(error)
            raise

    def _taker(self, number: int, n: int) -> Callable[[Piece], None]:
        book, usage, first, show = self._book, self._usage, number * n, self._answer.piece

        def take(piece: Piece) -> None:
            book.piece(number, first + piece.index, piece)
            usage.add(piece)
            if piece.finish is None:
                show(first + piece.index, piece)
            elif piece.finish == "error":
                self._fail(ApiError(500, f"generation failed: {piece.error}", code="generation_failed"))
            else:
                self.left -= 1
                show(first + piece.index, piece)
                if not self.left:
                    self._end(None)

        return take

    def _fail(self, error: ApiError) -> None:
        self._answer.failed(error)
        self._end(error)

    def hand_over(self) -> None:
        """The client reads it from another connection. This one is closed without an end, so that it is not mistaken
        for one."""
        if not self._is_over:
            self._answer.cut()
            self._end(ApiError(499, "the client is elsewhere", code="handed_over"))

    def abandon(self) -> None:
        """The client is gone."""
        if not self._is_over:
            self._end(ApiError(499, "the client left", code="client_left"))

    def _end(self, error: ApiError | None) -> None:
        if self._is_over:
            return
        self._is_over = True
        for flight in self.flights:
            flight.abort()
        self._book.close(error)
        self._on_end(error)


class WholeAnswer:
    """Everything at once."""

    def __init__(self, form: Any, usage: Usage) -> None:
        self._form = form
        self._usage = usage
        self._pieces: dict[int, list[Piece]] = {}
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.work: Work

    def piece(self, index: int, piece: Piece) -> None:
        self._pieces.setdefault(index, []).append(piece)
        if self.work.left == 0 and not self._done.done():
            self._done.set_result(None)

    def failed(self, error: ApiError) -> None:
        if not self._done.done():
            self._done.set_exception(error)

    def cut(self) -> None:
        self.failed(ApiError(409, "the answer was asked for again elsewhere", code="handed_over"))

    async def body(self) -> dict[str, Any]:
        """Raises ApiError."""
        await self._done
        whole: dict[str, Any] = self._form.whole([joined(self._pieces[i]) for i in sorted(self._pieces)], self._usage)
        return whole


class EventStream:
    """Server-sent events, each sent as it is made; those that come together are sent together.

    The client's leaving ends the generation at once, not at the next event.
    """

    def __init__(self, form: Any, usage: Usage, position: Position | None, *, wants_usage: bool) -> None:
        """`position`: of a stream that can be gone on with, what its client has of each choice; it is written into the
        events and moves on with them."""
        self.headers = list(_HEADERS)
        self._form = form
        self._position = position
        self._plain: dict[int, _Plain] = {}
        """By choice, once its first event was made: the first one may say more."""
        self._usage = usage
        self._wants_usage = wants_usage
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wake: asyncio.Future[None] | None = None
        self._is_complete = False
        self._is_cut = False
        self._wire: Wire | None = None
        """Once what came before is sent."""
        self.work: Work

    def open(self, num_choices: int) -> None:
        """What comes before the first piece."""
        self._unsent += [event(chunk) for chunk in self._form.opening(num_choices)]

    def piece(self, index: int, piece: Piece) -> None:
        mark = b"" if self._position is None else self._position.after(index, piece)
        plain = self._plain.get(index)
        if plain is not None and piece.finish is None and not piece.logprobs:
            self._put(mark + plain.event(piece))
        else:
            self._put(mark + event(self._form.chunk(index, piece)))
            if plain is None and piece.finish is None and not piece.logprobs:
                self._plain[index] = _Plain(self._form, index)
        if self.work.left == 0:
            if self._wants_usage:
                self._put(event(self._form.usage_chunk(self._usage)))
            self._close()
        if not self._first.done():
            self._first.set_result(None)

    def failed(self, error: ApiError) -> None:
        if not self._first.done():
            self._first.set_exception(error)
            return
        self._put(event(error.body()))
        self._close()

    async def begun(self) -> None:
        """Until there is something to send. Raises ApiError: what is refused is a status, not a broken stream."""
        await self._first

    def cut(self) -> None:
        """Close the connection where it stands."""
        self._is_cut = self._is_complete = True
        self._unsent.clear()
        self._wake_up()

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _put(self, data: bytes) -> None:
        if self._wire is not None and not self._unsent and self._wire.write(data):
            return
        self._unsent.append(data)
        self._unsent_bytes += len(data)
        if self._unsent_bytes > _MOST_UNSENT_BYTES and not self._is_complete:
            self._is_complete = True
            self._unsent.clear()
            self.work.abandon()
        self._wake_up()

    def _close(self) -> None:
        self._put(b"data: [DONE]\n\n")
        self._is_complete = True
        self._wake_up()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send_all(send, Wire.below(scope)))
        watching = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait([sending, watching], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, watching):
                task.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
            if not self._is_complete:
                self._is_complete = True
                self.work.abandon()

    async def _send_all(self, send: Send, wire: Wire | None) -> None:
        loop = asyncio.get_running_loop()
        await send({"type": "http.response.start", "status": 200, "headers": self.headers})
        while self._unsent or not self._is_complete:
            if not self._unsent:
                self._wire = wire
                self._wake = loop.create_future()
                await self._wake
            data = b"".join(self._unsent)
            self._unsent.clear()
            self._unsent_bytes = 0
            await send({"type": "http.response.body", "body": data, "more_body": True})
        if not self._is_cut:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        elif wire is not None:
            await wire.close()


class Wire:
    """The connection below the server's layers: an event goes out where it is made. A task that is woken, and a message
    that is passed down to the connection, cost as much as all else that is done for a token."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._transport = cycle.transport
        self._flow = cycle.flow

    @classmethod
    def below(cls, scope: Scope) -> Wire | None:
        """None where something else than uvicorn serves."""
        cycle = getattr(scope["state"].get("send"), "__self__", None)
        return cls(cycle) if isinstance(cycle, RequestResponseCycle) else None

    def write(self, data: bytes) -> bool:
        """Part of a body whose start was sent. False where it has to wait, or cannot be sent so."""
        cycle = self._cycle
        if self._flow.write_paused or not cycle.chunked_encoding or cycle.disconnected:
            return False
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    async def close(self) -> None:
        """Without an end, so that nobody takes it for one."""
        self._transport.abort()
        while not self._cycle.disconnected:
            await asyncio.sleep(0.001)


class Position:
    """How far a client is in its stream: tokens of each choice, and whether it was told of the choice's end.

    As the id of an event: "17" of one choice, "17-12e" of two of which the second has ended.
    """

    def __init__(self, counts: list[int], ended: list[bool]) -> None:
        self._counts = counts
        self._ended = ended

    @classmethod
    def parse(cls, text: str, num_choices: int) -> Position:
        """Of a Last-Event-ID; empty is the beginning. Raises ApiError."""
        if not text:
            return cls([0] * num_choices, [False] * num_choices)
        parts = text.split("-")
        if len(parts) != num_choices or not all(re.fullmatch(r"[0-9]{1,9}e?", part) for part in parts):
            raise ApiError(
                400, f"Last-Event-ID {text[:80]!r} is not an id of this stream's events", code="bad_event_id"
            )
        return cls([int(part.rstrip("e")) for part in parts], [part.endswith("e") for part in parts])

    def has(self, index: int) -> int:
        return self._counts[index]

    def is_ended(self, index: int) -> bool:
        return self._ended[index]

    @property
    def is_beginning(self) -> bool:
        return not any(self._counts) and not any(self._ended)

    def after(self, index: int, piece: Piece) -> bytes:
        """The line of the event's id; from here on the client is there."""
        self._counts[index] += len(piece.token_ids)
        if piece.finish is not None:
            self._ended[index] = True
        if len(self._counts) == 1 and piece.finish is None:
            return b"id: %d\n" % self._counts[0]
        marks = zip(self._counts, self._ended, strict=True)
        text = "-".join(f"{count}e" if ended else f"{count}" for count, ended in marks)
        return f"id: {text}\n".encode()


class _Plain:
    """An event of which nothing but the text and the ids changes: made once, and filled in for every token."""

    _TEXT, _IDS = "\x01text\x01", [-(1 << 40)]

    def __init__(self, form: Any, index: int) -> None:
        whole = event(form.chunk(index, Piece(index, self._TEXT, self._IDS, [], None, None, 0)))
        self._before, after = whole.split(_encode(self._TEXT), 1)
        self._between, _, self._after = after.partition(_encode(self._IDS))
        self._has_ids = bool(self._after)

    def event(self, piece: Piece) -> bytes:
        if not self._has_ids:
            return b"".join((self._before, _encode(piece.text), self._between))
        return b"".join((self._before, _encode(piece.text), self._between, _encode(piece.token_ids), self._after))


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + _encode(body) + b"\n\n"


async def disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
