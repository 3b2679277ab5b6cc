"""An endpoint that speaks OpenAI's HTTP API with token ids: vLLM, SGLang, or another shoal.

A shoal server gets a request as it is, `resume` and all. Elsewhere each sequence is a stream of its own, so that it can
go on by itself after a failover: it *continues* (what was generated becomes part of the prompt) or *replays* (it is
generated again from the start, and nothing is passed on until it has reached what was delivered). Replay is for
sequences whose next draw depends on more than the tokens before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time

import msgspec

from shoal.core.fleet_types import EndpointFailure, EndpointKind, EndpointReport, FailureKind
from shoal.core.types import Output, Rejected, Request, Sampling, TokenLogprobs
from shoal.serve import openai_dialect as dialect
from shoal.serve.endpoint import Attempt, EndpointInfo, EndpointListener, EndpointStartError
from shoal.serve.http_client import Exchange, HttpClient, HttpError, HttpResponse
from shoal.serve.openai_dialect import Body, Choice, Load, Server

_log = logging.getLogger(__name__)

_COMPLETIONS = "/v1/completions"
_BUSY_POLL_SECONDS = 0.5
_IDLE_POLL_SECONDS = 1.0
_LEAST_POLL_SECONDS = 0.05
_ANSWER_SECONDS = 10.0
"""For a poll. There is one at a time, so a server that hangs is asked once, not again and again."""
_START_SECONDS = 60.0
"""For each request of a start; the first generation may compile kernels."""
_REFUSED_SECONDS = 1.0
"""Without a byte while the server refuses connections, until a stream is given up."""
_REPORT_SECONDS = 0.1
"""Least time between reports of steps that were seen in streams."""
_DEFAULT_BLOCK_SIZE = 16
_MAX_ERROR_BYTES = 64 << 10

_encode = msgspec.json.Encoder().encode


class OpenAIEndpoint:
    """May be started again after it was gone: `start` learns anew what runs there."""

    kind: EndpointKind = "openai"
    info: EndpointInfo

    def __init__(
        self,
        name: str,
        url: str,
        *,
        model: str = "",
        api_key: str | None = None,
        tls: ssl.SSLContext | None = None,
        vocab_size: int = 0,
        idle_seconds: float = 60.0,
    ) -> None:
        """Raises ValueError, with a message for the user.

        `model` may be empty where the server has one only. `vocab_size` is of the gateway's tokenizer: these servers do
        not tell. A stream fails as hung after `idle_seconds` without a byte in which the server made no step either.
        """
        self.name = name
        self.address = url.rstrip("/").removesuffix("/v1")
        self._model = model
        self._vocab_size = vocab_size
        self._idle_seconds = idle_seconds
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = HttpClient(self.address, headers=headers, tls=tls)
        self._listener: EndpointListener | None = None
        self.server: Server = "vllm"
        self.served_model = ""
        self._tries: dict[str, _Try] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._poll_path = "/metrics"
        self._steps = 0
        """Never falls: what the server counted, and between two polls what was seen in streams."""
        self._seen_steps = 0
        """In streams since the last poll; a part of `_steps`."""
        self._counted_steps: int | None = None
        """By the server at the last poll."""
        self._mark = 0
        self._progress_at = 0.0
        self._reported_at = 0.0

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self, listener: EndpointListener) -> None:
        await self._stop_watching()
        card = await self._model_card()
        self.server, self.served_model = dialect.server_of(card), card.id
        if card.max_model_len is None:
            raise self._start_error(f"/v1/models does not say the max_model_len of {card.id!r}")
        await self._try_out()
        page = await self._ask("GET", "/metrics")
        # Without a metrics page, whatever answers shows that the server lives.
        self._poll_path = "/metrics" if page.status == 200 else "/v1/models"
        load = dialect.load_of(page.body) if page.status == 200 else Load()
        self.info = EndpointInfo(
            max_len=card.max_model_len,
            vocab_size=self._vocab_size,
            block_size=load.block_size or _DEFAULT_BLOCK_SIZE,
            num_blocks=load.num_blocks,
            exact_resume=self.server == "shoal",
        )
        self._counted_steps, self._seen_steps = load.steps, 0
        self._progress_at = time.monotonic()
        self._listener = listener
        self._watcher = asyncio.create_task(self._watch(listener), name=f"watch {self.name}")

    async def stop(self) -> None:
        await self._stop_watching()
        for one in list(self._tries.values()):
            one.fail(EndpointFailure(kind="lost", message="the endpoint was stopped"))
        self._client.close()

    async def _stop_watching(self) -> None:
        if self._watcher is not None:
            watcher, self._watcher = self._watcher, None
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    async def _model_card(self) -> dialect.ModelCard:
        answer = await self._ask("GET", "/v1/models")
        if answer.status != 200:
            refusal = dialect.refusal_of("", answer.status, answer.headers, answer.body)
            raise self._start_error(refusal.reason if isinstance(refusal, Rejected) else refusal.message)
        try:
            return msgspec.json.decode(answer.body, type=dialect.Models).choose(self._model)
        except msgspec.DecodeError as error:
            raise self._start_error(f"/v1/models is not OpenAI's: {error}") from None
        except ValueError as error:
            raise self._start_error(str(error)) from None

    async def _try_out(self) -> None:
        """One token: that requests are taken, and that token ids come back, is better known before there are any."""
        request = Request(id="", prompt=[0], max_tokens=1, sampling=Sampling(temperature=0.0))
        body = dialect.body_of(request, self.served_model, self.server, time.monotonic())
        answer = await self._ask("POST", _COMPLETIONS, _encode(body))
        if answer.status != 200:
            refusal = dialect.refusal_of("", answer.status, answer.headers, answer.body)
            raise self._start_error(refusal.reason if isinstance(refusal, Rejected) else refusal.message)
        try:
            events = dialect.Events().feed(answer.body)
            chunks = [dialect.decode_chunk(event) for event in events if event != b"[DONE]"]
        except dialect.Unreadable as error:
            raise self._start_error(str(error)) from None
        for chunk in chunks:
            if chunk.error is not None:
                raise self._start_error(f"it cannot generate: {chunk.error.message}")
        if not any(choice.token_ids for chunk in chunks for choice in chunk.choices):
            raise self._start_error("it does not send token ids; vLLM and SGLang have return_token_ids since mid-2026")

    async def _ask(self, method: str, path: str, body: bytes | None = None) -> HttpResponse:
        try:
            return await self._client.fetch(method, path, body, seconds=_START_SECONDS)
        except HttpError as error:
            raise self._start_error(str(error)) from None

    def _start_error(self, message: str) -> EndpointStartError:
        return EndpointStartError(f"endpoint {self.name!r} at {self.address}: {message}")

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(self, attempt: Attempt) -> None:
        one = _Try(self, attempt)
        self._tries[attempt.request.id] = one
        one.begin()

    def abort(self, request_id: str, index: int | None = None) -> None:
        one = self._tries.get(request_id)
        if one is not None:
            one.abort(index)

    def send(self, body: Body, stream: _Stream) -> Exchange:
        return self._client.send("POST", _COMPLETIONS, _encode(body), stream)

    def forget(self, request_id: str) -> None:
        self._tries.pop(request_id, None)

    # --- reports ----------------------------------------------------------------------------------------------------

    def stepped(self, sequence: _Sequence) -> None:
        """A sequence gets one chunk a step, so its second chunk since a step was seen is of another."""
        if sequence.mark == self._mark:
            self._mark += 1
            self._steps += 1
            self._seen_steps += 1
        sequence.mark = self._mark

    def progressed(self, now: float) -> None:
        self._progress_at = now
        if now - self._reported_at >= _REPORT_SECONDS and self._listener is not None:
            self._reported_at = now
            self._listener.reported(self.name, EndpointReport(at=now, steps=self._steps))

    def poll_soon(self) -> None:
        self._wake.set()

    async def _watch(self, listener: EndpointListener) -> None:
        while True:
            self._wake.clear()
            try:
                answer = await self._client.fetch("GET", self._poll_path, seconds=_ANSWER_SECONDS)
            except HttpError as error:
                if error.kind == "refused":
                    self._end_refused_streams(time.monotonic())
                    if not self._tries:
                        self._watcher = None
                        listener.gone(self.name, str(error))
                        return
            else:
                if answer.status == 200:
                    self._polled(listener, dialect.load_of(answer.body))
            self._end_idle_streams(time.monotonic())
            await asyncio.sleep(_LEAST_POLL_SECONDS)
            pause = _BUSY_POLL_SECONDS if self._tries else _IDLE_POLL_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause - _LEAST_POLL_SECONDS):
                    await self._wake.wait()

    def _polled(self, listener: EndpointListener, load: Load) -> None:
        now = time.monotonic()
        if load.steps is not None:
            if self._counted_steps is not None and load.steps > self._counted_steps:
                self._steps += max(load.steps - self._counted_steps - self._seen_steps, 0)
                self._progress_at = now
            self._counted_steps = load.steps
            self._seen_steps = 0
        self._reported_at = now
        listener.reported(
            self.name,
            EndpointReport(
                at=now,
                num_running=load.num_running,
                num_waiting=load.num_waiting,
                kv_usage=load.kv_usage,
                steps=self._steps,
            ),
        )

    def _end_refused_streams(self, now: float) -> None:
        """A server that shuts down refuses new connections while it completes its streams. vLLM on SIGTERM does not
        complete them: it ends its engine at once, and then waits without end for their clients to leave."""
        for one in list(self._tries.values()):
            if now - one.heard_at > _REFUSED_SECONDS:
                one.fail(EndpointFailure(kind="lost", message="it refuses connections and sends nothing any more"))

    def _end_idle_streams(self, now: float) -> None:
        for one in list(self._tries.values()):
            silent = now - max(one.heard_at, self._progress_at)
            if silent > self._idle_seconds:
                one.fail(EndpointFailure(kind="hung", message=f"neither a token nor a step for {silent:.0f} s"))


class _Sequence:
    """Of one attempt; what it has generated elsewhere is `given`."""

    def __init__(self, index: int, given: list[int], mark: int = -1) -> None:
        self.index = index
        self.given = given
        self.num_to_match = 0
        """Of `given`, at its end: tokens that a replay has not reached again yet."""
        self.mark = mark


class _Try:
    """One attempt here."""

    def __init__(self, endpoint: OpenAIEndpoint, attempt: Attempt) -> None:
        self.endpoint = endpoint
        self.attempt = attempt
        self.request = attempt.request
        self.heard_at = time.monotonic()
        given = self.request.resume
        if given is None:
            given = {index: [] for index in range(self.request.n)}
        self._open = {index: _Sequence(index, tokens) for index, tokens in given.items()}
        """Sequences that have not ended."""
        self._streams: dict[_Stream, None] = {}
        self._body = dialect.body_of(self.request, endpoint.served_model, endpoint.server, self.heard_at)

    def begin(self) -> None:
        if self.endpoint.server == "shoal":
            self._send(self._body, dict(self._open))
            return
        replays = dialect.needs_replay(self.request)
        for sequence in list(self._open.values()):
            if len(sequence.given) >= self.request.max_tokens:
                asyncio.get_running_loop().call_soon(self._end_at_length, sequence)
            elif replays:
                sequence.num_to_match = len(sequence.given)
                self._send(dialect.replay_of(self._body, self.request, sequence.index), {0: sequence})
            else:
                self._continue(sequence)

    def abort(self, index: int | None) -> None:
        if index is None:
            self._close()
        elif self._open.pop(index, None) is not None:
            self._after_end()

    def fail(self, reason: EndpointFailure | Rejected) -> None:
        self._close()
        self.attempt.ended(reason)

    def lost_stream(self, stream: _Stream, reason: EndpointFailure | Rejected) -> None:
        """A stream ended. If before its sequences did, the others are given up as well: the fleet moves requests."""
        stream.release(0)
        if not self.num_open(stream):
            self.ended_stream(stream)
            return
        for other in list(self._streams):
            other.release(0)
        self.fail(reason)

    def ended_stream(self, stream: _Stream) -> None:
        self._streams.pop(stream, None)

    def choice(self, stream: _Stream, choice: Choice) -> Output | None:
        """What a chunk's choice adds to its sequence. None is nothing to pass on."""
        sequence = stream.sequences.get(choice.index)
        if sequence is None or sequence.index not in self._open:
            return None
        self.endpoint.stepped(sequence)
        if choice.token_ids is None and (choice.finish_reason is None or choice.finish_reason in dialect.FINISHES):
            raise dialect.Unreadable("the endpoint sends no token ids")
        ids = choice.token_ids or []
        logprobs: list[TokenLogprobs] = []
        if self.request.sampling.logprobs is not None and ids:
            logprobs = dialect.logprobs_of(choice.logprobs, len(ids), self.request.sampling.logprobs)
        finish = None
        if choice.finish_reason is not None:
            finish = dialect.FINISHES.get(choice.finish_reason)
            if finish is None:
                raise _SequenceLost(f"the endpoint ended a sequence with finish_reason {choice.finish_reason!r}")
        if sequence.num_to_match:
            num_old = self._match(stream, sequence, ids, finish is not None)
            if num_old is None:
                return None
            ids, logprobs = ids[num_old:], logprobs[num_old:]
        if not ids and finish is None:
            return None
        stop_token = dialect.stop_token_of(choice, self.request.stop_token_ids) if finish == "stop" else None
        return Output(self.request.id, sequence.index, ids, logprobs, finish, stop_token)

    def deliver(self, output: Output) -> None:
        if output.index not in self._open:
            return  # aborted meanwhile, perhaps by what was made of another sequence's output
        if output.finish is not None:
            del self._open[output.index]
            if not self._open:
                self.endpoint.forget(self.request.id)
        self.attempt.output(output)

    def num_open(self, stream: _Stream) -> int:
        return sum(sequence.index in self._open for sequence in stream.sequences.values())

    def _match(self, stream: _Stream, sequence: _Sequence, ids: list[int], finished: bool) -> int | None:
        """How many of a replay's tokens were delivered before; None if they differ, and it goes on otherwise."""
        at = len(sequence.given) - sequence.num_to_match
        count = min(len(ids), sequence.num_to_match)
        if ids[:count] == sequence.given[at : at + count] and not (finished and count < sequence.num_to_match):
            sequence.num_to_match -= count
            return count
        where = f"sequence {sequence.index} of {self.request.id} was not generated again as it was"
        if self.request.sampling.grammar is not None:
            # Continued as a prompt, the grammar would begin anew in the middle of the text.
            raise _SequenceLost(f"{where}, and a structured output cannot be continued without that")
        _log.warning("endpoint %s: %s; it continues from what was delivered", self.endpoint.name, where)
        stream.cancel()
        self._streams.pop(stream, None)
        self._continue(sequence)
        return None

    def _continue(self, sequence: _Sequence) -> None:
        sequence.num_to_match = 0
        body = dialect.continuation_of(self._body, self.request, sequence.index, sequence.given)
        self._send(body, {0: sequence})

    def _send(self, body: Body, sequences: dict[int, _Sequence]) -> None:
        stream = _Stream(self, sequences)
        self._streams[stream] = None
        stream.exchange = self.endpoint.send(body, stream)

    def _end_at_length(self, sequence: _Sequence) -> None:
        """It had all its tokens already; only that it has ended was not heard."""
        self.deliver(Output(self.request.id, sequence.index, [], finish="length"))

    def _after_end(self) -> None:
        """Streams all of whose sequences were aborted are closed, so that the server stops generating them."""
        for stream in list(self._streams):
            if not self.num_open(stream):
                self._streams.pop(stream)
                stream.cancel()
        if not self._open:
            self.endpoint.forget(self.request.id)

    def _close(self) -> None:
        self._open.clear()
        self._after_end()


class _SequenceLost(Exception):
    """The endpoint cannot go on with a sequence."""


class _Stream:
    """One HTTP response, with some sequences of an attempt by choice index."""

    exchange: Exchange

    def __init__(self, owner: _Try, sequences: dict[int, _Sequence]) -> None:
        self.sequences = sequences
        self._try = owner
        self._status = 0
        self._headers: dict[bytes, bytes] = {}
        self._error = b""
        self._events = dialect.Events()
        self._held: Output | None = None
        """The last sequence's end, until the usage chunk behind it tells how much of the prompt was cached."""
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True
        self.exchange.cancel()

    # --- as a receiver ----------------------------------------------------------------------------------------------

    def head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._status, self._headers = status, headers

    def body(self, data: bytes) -> None:
        now = self._try.heard_at = time.monotonic()
        if self._status != 200:
            self._error = (self._error + data)[:_MAX_ERROR_BYTES]
            return
        try:
            for event in self._events.feed(data):
                self._event(event)
                if self._cancelled:
                    break
        except (_SequenceLost, dialect.Unreadable) as error:
            self._try.lost_stream(self, EndpointFailure(kind="error", message=str(error)))
            self.exchange.cancel()
        self._try.endpoint.progressed(now)

    def done(self) -> None:
        if self._status == 200:
            self._ended("lost", "the stream ended before its last token")
        else:
            refusal = dialect.refusal_of(self._try.request.id, self._status, self._headers, self._error)
            self._try.lost_stream(self, refusal)

    def failed(self, error: HttpError) -> None:
        self._try.endpoint.poll_soon()
        self._ended("lost" if error.kind == "lost" else "refused", str(error))

    def _ended(self, kind: FailureKind, message: str) -> None:
        self._try.lost_stream(self, EndpointFailure(kind=kind, message=message))

    # --- events -----------------------------------------------------------------------------------------------------

    def _event(self, event: bytes) -> None:
        """Raises _SequenceLost or Unreadable, for what the server sent and never for what is made of it."""
        if event == b"[DONE]":
            self.release(0)
            self._try.ended_stream(self)
            return
        chunk = dialect.decode_chunk(event)
        if chunk.error is not None:
            raise _SequenceLost(f"it failed: {chunk.error.message}")
        for choice in chunk.choices:
            output = self._try.choice(self, choice)
            if output is None:
                continue
            if output.finish is not None and self._try.num_open(self) == 1:
                self._held = output
            else:
                self._try.deliver(output)
        if chunk.usage is not None and not chunk.choices:
            self.release(chunk.usage.cached)

    def release(self, num_cached: int) -> None:
        held, self._held = self._held, None
        if held is not None:
            cached = min(num_cached, len(self._try.request.prompt))
            self._try.deliver(msgspec.structs.replace(held, num_cached=cached))
