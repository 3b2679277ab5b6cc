"""From the pieces of a request to what its client is sent: server-sent events as they come, or one whole body."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from shoal.core.engine_core import sequences_of
from shoal.serve.errors import ApiError
from shoal.serve.flight import Flight
from shoal.serve.generation import Job, Piece
from shoal.serve.metrics import RequestTimer
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
        timers: list[RequestTimer],
        usage: Usage,
        answer: WholeAnswer | EventStream,
        on_end: Callable[[ApiError | None], None],
    ) -> None:
        """`on_end` is called once, when all have ended, with the error if there was one."""
        self._jobs = jobs
        self._timers = timers
        self._usage = usage
        self._answer = answer
        self._on_end = on_end
        self._is_over = False
        self.left = sum(len(sequences_of(job.request)) for job in jobs)
        """Choices that have not ended."""
        self.flights: list[Flight] = []

    def begin(self, begin: Callable[[Job, Callable[[Piece], None], Callable[[ApiError], None]], Flight]) -> None:
        """Raises ApiError, with nothing left running."""
        try:
            for number, job in enumerate(self._jobs):
                self.flights.append(begin(job, self._taker(number, job.request.n), self._fail))
        except ApiError as error:
            self._end(error)
            raise

    def _taker(self, number: int, n: int) -> Callable[[Piece], None]:
        timer, usage, first, show = self._timers[number], self._usage, number * n, self._answer.piece

        def take(piece: Piece) -> None:
            timer.observe(piece)
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

    def abandon(self) -> None:
        """The client is gone."""
        if not self._is_over:
            for timer in self._timers:
                timer.abandon()
            self._end(ApiError(499, "the client left", code="client_left"))

    def _end(self, error: ApiError | None) -> None:
        if self._is_over:
            return
        self._is_over = True
        for flight in self.flights:
            flight.abort()
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

    async def body(self) -> dict[str, Any]:
        """Raises ApiError."""
        await self._done
        whole: dict[str, Any] = self._form.whole([joined(self._pieces[i]) for i in sorted(self._pieces)], self._usage)
        return whole


class EventStream:
    """Server-sent events, each sent as it is made; those that come together are sent together.

    The client's leaving ends the generation at once, not at the next event.
    """

    def __init__(self, form: Any, usage: Usage, num_choices: int, *, wants_usage: bool) -> None:
        self._form = form
        self._plain: dict[int, _Plain] = {}
        """By choice, once its first event was made: the first one may say more."""
        self._usage = usage
        self._wants_usage = wants_usage
        self._unsent: list[bytes] = [event(chunk) for chunk in form.opening(num_choices)]
        self._unsent_bytes = 0
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wake: asyncio.Future[None] | None = None
        self._is_complete = False
        self.work: Work

    def piece(self, index: int, piece: Piece) -> None:
        plain = self._plain.get(index)
        if plain is not None and piece.finish is None and not piece.logprobs:
            self._put(plain.event(piece))
        else:
            self._put(event(self._form.chunk(index, piece)))
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

    def _put(self, data: bytes) -> None:
        self._unsent.append(data)
        self._unsent_bytes += len(data)
        if self._unsent_bytes > _MOST_UNSENT_BYTES and not self._is_complete:
            self._is_complete = True
            self._unsent.clear()
            self.work.abandon()
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _close(self) -> None:
        self._put(b"data: [DONE]\n\n")
        self._is_complete = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send_all(send))
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

    async def _send_all(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        while self._unsent or not self._is_complete:
            if not self._unsent:
                self._wake = loop.create_future()
                await self._wake
            data = b"".join(self._unsent)
            self._unsent.clear()
            self._unsent_bytes = 0
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


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
