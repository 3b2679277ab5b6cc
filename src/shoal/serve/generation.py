"""From an API request to text: prompt to tokens, sampling fields to Sampling, outputs to pieces of text.

The one copy of this path: chat and completions over HTTP, `shoal generate` and `shoal chat` all go through it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import msgspec

from shoal.checkpoint.chat_template import TemplateError
from shoal.checkpoint.text_stream import TextStream
from shoal.checkpoint.tokenizer import Tokenizer
from shoal.core.engine_core import resume_error
from shoal.core.types import FinishReason, Grammar, Output, Request, Sampling, TokenLogprobs
from shoal.engine.grammar import GrammarCompiler, GrammarError, vocabulary_of_checkpoint
from shoal.serve.errors import ApiError, invalid
from shoal.serve.flight import Flight, FlightObserver
from shoal.serve.journal_store import SequenceProgress
from shoal.serve.pool import Pool
from shoal.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    Limits,
    SamplingFields,
    grammar_of,
    logit_bias,
    stop_strings,
)

_LIKELY_CHARACTERS_PER_TOKEN = 4
"""Texts with more for each token of the context are probably too long, which is worth finding out cheaply."""
_PIECE_CHARACTERS = 4096
_TOKENS_LOST_TO_A_CUT = 16
"""At most so many more tokens has a text because it was cut: only the words at the cut are tokenised otherwise."""


class Job(msgspec.Struct, frozen=True):
    """A request ready for the engine, and what the text side must know of it."""

    request: Request
    continues_prompt: bool
    """The text goes on where the prompt ends (completions), rather than standing by itself (chat)."""
    stop: list[str]
    include_stop: bool
    skip_special_tokens: bool
    done: dict[int, SequenceProgress] = {}
    """What is known already of its sequences: nothing, unless it was begun elsewhere or before."""
    has: dict[int, int] = {}
    """How many of those tokens, or of tokens that are still to be made again, the client has."""
    wanted: list[int] | None = None
    """Sequences that the client waits for; None is all."""

    @property
    def indexes(self) -> list[int]:
        return list(range(self.request.n)) if self.wanted is None else self.wanted


class Position(Protocol):
    """How far a client is in its stream."""

    def has(self, index: int) -> int:
        """Tokens of a sequence."""

    def is_ended(self, index: int) -> bool:
        """Whether it was told of the sequence's end."""


class Recorder(Protocol):
    """Keeps what was generated, so that the client can have the rest of it elsewhere."""

    def progress(self, index: int, token_ids: list[int], logprobs: list[TokenLogprobs]) -> None: ...

    def finished(self, output: Output) -> None: ...


class Piece(msgspec.Struct, frozen=True):
    """What one step adds to one sequence."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish: FinishReason | None
    stop_reason: str | int | None
    """The stop string or stop token that ended the sequence."""
    num_cached: int
    error: str | None = None


class TextRun:
    """The text of a job: outputs in, pieces out. Of a job that goes on, pieces begin behind what the client has."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        job: Job,
        on_piece: Callable[[Piece], None],
        on_error: Callable[[ApiError], None],
        recorder: Recorder | None,
    ) -> None:
        request = job.request
        self.flight: Flight | None = None
        self._include_stop = job.include_stop
        self._on_piece = on_piece
        self._recorder = recorder
        self.failed = on_error
        self._streams = {
            index: TextStream(
                tokenizer,
                job.stop,
                prompt_ids=request.prompt if job.continues_prompt else (),
                skip_special_tokens=job.skip_special_tokens,
                include_stop=job.include_stop,
            )
            for index in job.indexes
        }
        """Of the sequences that have not ended."""
        self._has = {index: count for index, count in job.has.items() if count}
        """Tokens of each, from here on, that the client has already."""

    def replay(self, done: dict[int, SequenceProgress]) -> dict[int, list[int]]:
        """Pass on what is known already. Returns the sequences that have not ended, with their tokens."""
        for index, known in done.items():
            if index in self._streams and (known.token_ids or known.finish):
                stop, cached = known.stop_token, known.num_cached
                self._pass_on(Output("", index, known.token_ids, known.logprobs, known.finish, stop, None, cached))
        return {index: done[index].token_ids if index in done else [] for index in self._streams}

    def output(self, output: Output) -> None:
        if output.index not in self._streams:
            return
        if self._recorder is not None:
            if output.token_ids:
                self._recorder.progress(output.index, output.token_ids, output.logprobs)
            if output.finish is not None:
                self._recorder.finished(output)
        self._pass_on(output)

    def _pass_on(self, output: Output) -> None:
        has = self._has.get(output.index)
        if has is None:
            self._push(output, silent=False)
            return
        # What the client has is not sent again, but where its text stands depends on it.
        count = min(has, len(output.token_ids))
        self._has[output.index] -= count
        if not self._has[output.index]:
            del self._has[output.index]
        seen = msgspec.structs.replace(output, token_ids=output.token_ids[:count], logprobs=output.logprobs[:count])
        if count == len(output.token_ids):
            self._push(seen, silent=True)
            return
        self._push(msgspec.structs.replace(seen, finish=None, stop_token=None), silent=True)
        if output.index in self._streams:
            rest = msgspec.structs.replace(output, token_ids=output.token_ids[count:], logprobs=output.logprobs[count:])
            self._push(rest, silent=False)

    def _push(self, output: Output, *, silent: bool) -> None:
        """`silent`: the client has these tokens and their text; only an end is news."""
        stream = self._streams[output.index]
        ids, logprobs = output.token_ids, output.logprobs
        before = stream.num_tokens
        text, stopped = stream.push(ids[:-1] if output.stop_token is not None and not self._include_stop else ids)
        if stopped is not None:
            # Several tokens may come at once, and those behind the stop string are not the answer's.
            count = stream.num_tokens - before
            ids, logprobs = ids[:count], logprobs[:count]
        finish = output.finish
        stop_reason: str | int | None = output.stop_token
        if finish is not None and stopped is None:
            text += stream.flush()
            stopped = stream.stopped
        if stopped is not None:
            stop_reason = stopped
        ended_here = stopped is not None and finish is None
        if stopped is not None:
            finish = "stop"
        if finish is not None:
            del self._streams[output.index]
        if silent:
            if finish is None:
                return
            text, ids, logprobs = "", [], []
        self._on_piece(Piece(output.index, text, ids, logprobs, finish, stop_reason, output.num_cached, output.error))
        if ended_here and self.flight is not None:
            self.flight.abort(output.index)


class Generator:
    def __init__(self, pool: Pool, tokenizer: Tokenizer, checkpoint: str, limits: Limits, vocab_size: int) -> None:
        self.pool = pool
        self.tokenizer = tokenizer
        self.limits = limits
        self.vocab_size = vocab_size
        self.grammars = GrammarCompiler(vocabulary_of_checkpoint(checkpoint, self.vocab_size))

    @property
    def max_len(self) -> int:
        """Of a sequence. Raises ApiError 503 as long as no endpoint could be asked."""
        return self.pool.max_len

    async def close(self) -> None:
        await self.grammars.close()

    # --- prompts ----------------------------------------------------------------------------------------------------

    def chat_prompt(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: dict[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation. Raises ApiError."""
        if not messages:
            raise invalid("messages is empty", "messages")
        if len(messages) > self.limits.messages:
            raise invalid(
                f"messages has {len(messages)} entries; at most {self.limits.messages} are allowed", "messages"
            )
        plain = [_plain_message(message, number) for number, message in enumerate(messages)]
        reserved = {"messages", "tools", "add_generation_prompt"} & set(variables or {})
        if reserved:
            raise invalid(f"chat_template_kwargs may not set {sorted(reserved)[0]!r}", "chat_template_kwargs")
        try:
            text = self.tokenizer.apply_chat_template(
                plain, tools, add_generation_prompt=add_generation_prompt, **(variables or {})
            )
        except TemplateError as error:
            raise invalid(str(error), "messages") from None
        return self._encode(text, False, "messages")

    def prompts(self, body: CompletionRequest) -> list[list[int]]:
        """Token ids of each prompt of a completion request. Raises ApiError."""
        prompt = body.prompt
        if isinstance(prompt, str) or prompt and all(isinstance(item, int) for item in prompt):
            prompt = [prompt]
        if not prompt:
            raise invalid("prompt is empty", "prompt")
        if len(prompt) > self.limits.prompts:
            raise invalid(f"prompt has {len(prompt)} entries; at most {self.limits.prompts} are allowed", "prompt")
        return [self._one_prompt(item, body.add_special_tokens) for item in prompt]

    def _one_prompt(self, item: Any, add_special_tokens: bool) -> list[int]:
        if isinstance(item, str):
            return self._encode(item, add_special_tokens, "prompt")
        if isinstance(item, list) and all(type(token) is int for token in item):
            if not item:
                raise invalid("the prompt has no tokens", "prompt")
            return item
        raise invalid("prompt must be a string, a list of token ids, or a list of either", "prompt")

    def _encode(self, text: str, add_special_tokens: bool, field: str) -> list[int]:
        if len(text) > _LIKELY_CHARACTERS_PER_TOKEN * self.max_len:
            self._refuse_surely_too_long(text, field)
        ids = self.tokenizer.encode(text, add_special_tokens)
        if not ids:
            raise invalid("the prompt has no tokens", field)
        return ids

    def _refuse_surely_too_long(self, text: str, field: str) -> None:
        """Tokenise piece by piece only until there are too many tokens, however long the text goes on."""
        count = 0
        for start in range(0, len(text), _PIECE_CHARACTERS):
            piece = self.tokenizer.encode(text[start : start + _PIECE_CHARACTERS], False)
            count += max(0, len(piece) - _TOKENS_LOST_TO_A_CUT)
            if count >= self.max_len:
                raise self._too_long(f"the prompt has {len(text)} characters, more than {count} tokens", field)

    def _too_long(self, what: str, field: str) -> ApiError:
        return invalid(
            f"{what}; this model's context is {self.max_len} tokens, prompt and output together",
            field,
            "context_length_exceeded",
        )

    # --- sampling ---------------------------------------------------------------------------------------------------

    async def job(
        self, body: ChatRequest | CompletionRequest, prompt: list[int], request_id: str, cache_salt: str = ""
    ) -> Job:
        """Check everything that can be wrong with a request. Raises ApiError."""
        field = "messages" if isinstance(body, ChatRequest) else "prompt"
        if len(prompt) >= self.max_len:
            raise self._too_long(f"the prompt has {len(prompt)} tokens", field)
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            raise invalid(f"token ids must lie in [0, {self.vocab_size})", field)
        room = self.max_len - len(prompt)
        asked = body.max_tokens
        if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
            asked = body.max_completion_tokens
        default = room if isinstance(body, ChatRequest) else 16  # OpenAI's own
        n = body.n or 1
        if n > self.limits.n:
            raise invalid(f"n is {n}; at most {self.limits.n} is allowed", "n")
        if body.best_of not in (None, n):
            raise invalid("best_of other than n is not supported", "best_of")
        stop_ids = list(body.stop_token_ids or [])
        if len(stop_ids) > self.limits.stop_token_ids or any(i >= self.vocab_size for i in stop_ids):
            raise invalid(
                f"stop_token_ids takes at most {self.limits.stop_token_ids} ids below {self.vocab_size}",
                "stop_token_ids",
            )
        if not body.ignore_eos:
            stop_ids += self.tokenizer.eos_ids
        request = Request(
            id=request_id,
            prompt=prompt,
            max_tokens=min(default if asked is None else asked, room),
            sampling=await self._sampling(body),
            n=n,
            min_tokens=min(body.min_tokens, room),
            stop_token_ids=list(dict.fromkeys(stop_ids)),
            priority=body.priority,
            deadline=None if body.timeout is None else time.monotonic() + body.timeout,
            cache_salt=cache_salt,
        )
        resume = body.resume if isinstance(body, CompletionRequest) else None
        resumed = msgspec.structs.replace(request, resume=resume)
        if (reason := resume_error(resumed, self.max_len, self.vocab_size)) is not None:
            raise invalid(reason, "resume")
        stops = stop_strings(body, self.limits)
        return Job(
            request,
            isinstance(body, CompletionRequest),
            stops,
            body.include_stop_str_in_output,
            body.skip_special_tokens,
            done={index: SequenceProgress(token_ids=tokens) for index, tokens in (resume or {}).items()},
            has={index: len(tokens) for index, tokens in (resume or {}).items()},
            wanted=None if resume is None else sorted(resume),
        )

    def resumed(
        self,
        body: ChatRequest | CompletionRequest,
        request: Request,
        done: dict[int, SequenceProgress],
        position: Position,
    ) -> Job:
        """A job that was begun before, for a client that has its part up to `position`."""
        indexes = range(request.n)
        return Job(
            # Its deadline was on the clock of a process that may be gone.
            msgspec.structs.replace(request, deadline=None),
            isinstance(body, CompletionRequest),
            stop_strings(body, self.limits),
            body.include_stop_str_in_output,
            body.skip_special_tokens,
            done=done,
            has={index: position.has(index) for index in indexes},
            wanted=[index for index in indexes if not position.is_ended(index)],
        )

    async def _sampling(self, body: ChatRequest | CompletionRequest) -> Sampling:
        top_k = body.top_k or 0
        return Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=max(top_k, 0),
            top_p=1.0 if body.top_p is None else body.top_p,
            min_p=body.min_p or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            logit_bias=logit_bias(body, self.vocab_size, self.limits),
            seed=secrets.randbits(63) if body.seed is None else body.seed,
            logprobs=self._num_logprobs(body),
            grammar=await self._grammar(body),
        )

    def _num_logprobs(self, body: ChatRequest | CompletionRequest) -> int | None:
        if isinstance(body, ChatRequest):
            if body.top_logprobs is not None and not body.logprobs:
                raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
            count = (body.top_logprobs or 0) if body.logprobs else None
            field = "top_logprobs"
        else:
            count, field = body.logprobs, "logprobs"
        if count is not None and count > self.limits.logprobs:
            raise invalid(f"{field} is {count}; at most {self.limits.logprobs} is allowed", field)
        return count

    async def _grammar(self, body: SamplingFields) -> Grammar | None:
        asked = grammar_of(body)
        if asked is None:
            return None
        kind, source = asked
        try:
            return Grammar(kind, source, await self.grammars.compile(kind, source))
        except GrammarError as error:
            raise invalid(str(error), "response_format", "invalid_grammar") from None

    # --- text -------------------------------------------------------------------------------------------------------

    def begin(
        self,
        job: Job,
        on_piece: Callable[[Piece], None],
        on_error: Callable[[ApiError], None],
        *,
        tenant: str = "",
        weight: float = 1.0,
        session: str = "",
        recorder: Recorder | None = None,
        observer: FlightObserver | None = None,
    ) -> Flight | None:
        """Generate. Pieces of all sequences come as they are made, and nothing after an error. Raises ApiError.

        None is returned where everything was known already.
        """
        run = TextRun(self.tokenizer, job, on_piece, on_error, recorder)
        left = run.replay(job.done)
        if not left:
            return None
        fresh = len(left) == job.request.n and not any(left.values())
        request = msgspec.structs.replace(job.request, resume=None if fresh else left)
        run.flight = self.pool.submit(request, run, tenant=tenant, weight=weight, session=session, observer=observer)
        return run.flight

    async def run(self, job: Job) -> AsyncIterator[Piece]:
        """Pieces to be awaited. Leaving early aborts the rest. Raises ApiError."""
        queue: asyncio.Queue[Piece | ApiError] = asyncio.Queue()
        flight = self.begin(job, queue.put_nowait, queue.put_nowait)
        left = len(job.indexes)
        try:
            while left:
                item = await queue.get()
                if isinstance(item, ApiError):
                    raise item
                left -= item.finish is not None
                yield item
        finally:
            if flight is not None:
                flight.abort()


def _plain_message(message: dict[str, Any], number: int) -> dict[str, Any]:
    """A message as templates expect it: content as one string. Content parts other than text are refused."""
    where = f"messages[{number}]"
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise invalid(f"{where}.role must be a string such as user, assistant, system or tool", "messages")
    content = message.get("content")
    if isinstance(content, list):
        parts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise invalid(f"{where}.content: only parts of type 'text' are supported by this model", "messages")
            parts.append(part["text"])
        content = "".join(parts)
    if content is None and (message.get("tool_calls") or role == "assistant"):
        content = ""
    if not isinstance(content, str):
        raise invalid(f"{where}.content must be a string or a list of text parts", "messages")
    return {**message, "content": content}
