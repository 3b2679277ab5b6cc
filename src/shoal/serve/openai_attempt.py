"""One attempt at an OpenAI endpoint: its sequences, and the streams that they come in.

A shoal server gets a request as it is, `resume` and all. Elsewhere each sequence is a stream of its own, so that it can
go on by itself after a failover: it *continues* (what was generated becomes part of the prompt) or *replays* (it is
generated again from the start, and nothing is passed on until it has reached what was delivered). Replay is for
sequences whose next draw depends on more than the tokens before it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import msgspec

from shoal.core.engine_core import sequences_of
from shoal.core.fleet_types import EndpointFailure, FailureKind
from shoal.core.types import Output, Rejected, TokenLogprobs
from shoal.serve import openai_dialect as dialect
from shoal.serve.endpoint import Attempt
from shoal.serve.http_client import Exchange, HttpError
from shoal.serve.openai_dialect import Body, Choice

if TYPE_CHECKING:
    from shoal.serve.openai_endpoint import OpenAIEndpoint

_log = logging.getLogger(__name__)

_MAX_ERROR_BYTES = 64 << 10


class Sequence:
    """Of one attempt; what it has generated elsewhere is `given`."""

    def __init__(self, index: int, given: list[int], mark: int = -1) -> None:
        self.index = index
        self.given = given
        self.num_to_match = 0
        """Of `given`, at its end: tokens that a replay has not reached again yet."""
        self.mark = mark


class OpenAIAttempt:
    """Between the fleet's attempt and the streams."""

    def __init__(self, endpoint: OpenAIEndpoint, attempt: Attempt) -> None:
        self.endpoint = endpoint
        self.attempt = attempt
        self.request = attempt.request
        self.heard_at = time.monotonic()
        """Of the last byte; before there is one, of its beginning."""
        self.has_heard = False
        self._open = {index: Sequence(index, list(tokens)) for index, tokens in sequences_of(self.request).items()}
        """Sequences that have not ended."""
        self._streams: dict[CompletionStream, None] = {}
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

    def lost_stream(self, stream: CompletionStream, reason: EndpointFailure | Rejected) -> None:
        """A stream ended. If before its sequences did, the others are given up as well: the fleet moves requests."""
        stream.release(0)
        if not self.num_open(stream):
            self.ended_stream(stream)
            return
        for other in list(self._streams):
            other.release(0)
        self.fail(reason)

    def ended_stream(self, stream: CompletionStream) -> None:
        self._streams.pop(stream, None)

    def choice(self, stream: CompletionStream, choice: Choice) -> Output | None:
        """What a chunk's choice adds to its sequence. None is nothing to pass on."""
        sequence = stream.sequences.get(choice.index)
        if sequence is None or sequence.index not in self._open:
            return None
        self.endpoint.stepped(sequence)
        if choice.token_ids is None and choice.text:
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

    def num_open(self, stream: CompletionStream) -> int:
        return sum(sequence.index in self._open for sequence in stream.sequences.values())

    def _match(self, stream: CompletionStream, sequence: Sequence, ids: list[int], finished: bool) -> int | None:
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

    def _continue(self, sequence: Sequence) -> None:
        sequence.num_to_match = 0
        body = dialect.continuation_of(self._body, self.request, sequence.index, sequence.given)
        self._send(body, {0: sequence})

    def _send(self, body: Body, sequences: dict[int, Sequence]) -> None:
        stream = CompletionStream(self, sequences)
        self._streams[stream] = None
        stream.exchange = self.endpoint.send(body, stream)

    def _end_at_length(self, sequence: Sequence) -> None:
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


class CompletionStream:
    """One HTTP response, with some sequences of an attempt by choice index."""

    exchange: Exchange

    def __init__(self, owner: OpenAIAttempt, sequences: dict[int, Sequence]) -> None:
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
        self._try.has_heard = True
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
        self._ended("lost" if error.kind in ("lost", "closed") else "refused", str(error))

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
