"""`shoal generate`: a file of requests to a file of answers, in order; what was interrupted goes on where it stopped.

The output is at every moment the answers to the first requests of the input, perhaps with a torn line at the end. That
alone makes it resumable: there is no other state. Each answer carries a digest of its request, so that answers to
another input are not mistaken for these.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from shoal.cli.answer_file import AnswerFile
from shoal.cli.errors import CommandError
from shoal.cli.local_engine import exit_on_sigterm, local_engine
from shoal.cli.terminal import error_console, passing_bar, resolve_with_progress
from shoal.config import load_config
from shoal.core.config import EngineConfig
from shoal.serve.engine_client import EngineLost
from shoal.serve.errors import ApiError, invalid
from shoal.serve.generation import Generator, Piece
from shoal.serve.openai_format import ChatFormat, CompletionFormat, Usage, joined
from shoal.serve.protocol import ChatRequest, CompletionRequest, decode

_RETRY_SECONDS = 0.2
"""Before a request that the engine had no room for is sent again."""


class Defaults(msgspec.Struct, frozen=True, kw_only=True):
    """For requests that do not say."""

    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None


class ChatLine(ChatRequest, kw_only=True, forbid_unknown_fields=True):
    id: str | int | None = None
    """The user's own; the answer repeats it."""


class CompletionLine(CompletionRequest, kw_only=True, forbid_unknown_fields=True):
    id: str | int | None = None


class _Outline(msgspec.Struct):
    """What tells which kind of request a line is; nothing else of it is looked at."""

    messages: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    prompt: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    id: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class RequestLine(msgspec.Struct, frozen=True):
    number: int
    """From 1, blank lines counted, as editors count."""
    raw: bytes

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.raw).hexdigest()[:16]


class Tally(msgspec.Struct):
    """What a run has done so far."""

    answers: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    began: float = 0.0
    """Monotonic second."""

    def rate(self) -> float:
        """Output tokens a second."""
        return self.output_tokens / max(1e-9, time.monotonic() - self.began)


def read_requests(path: Path) -> Iterator[RequestLine]:
    """Lines that are not blank. Raises OSError."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if stripped := line.strip():
                yield RequestLine(number, stripped)


def generate_file(
    model: str, flags: Mapping[str, Any], source: Path, target: Path, defaults: Defaults, *, force: bool
) -> int:
    """Answer every request of `source` in `target`. Returns the exit status, 0 also where single requests failed."""
    console = error_console()
    total = sum(1 for _ in read_requests(source))
    if target.exists() and target.samefile(source):
        raise CommandError(f"{target} is the input: name another file for the answers")
    exit_on_sigterm()
    with AnswerFile(target, fresh=force) as answers:
        done = answers.resume((line.number, line.digest) for line in read_requests(source))
        if done == total:
            console.print(f"{target}: all {total} answers are there already (--force begins anew)", soft_wrap=True)
            return 0
        if done:
            console.print(f"{target}: {done} of {total} answers are there already; going on", soft_wrap=True)
        config = load_config(EngineConfig, None, flags)
        files = resolve_with_progress(model, console)
        tally = Tally(answers=done)

        async def run() -> None:
            async with local_engine(config, files, console) as generator:
                with _bar(tally, total, console) as on_answer:
                    tally.began = time.monotonic()
                    left = islice(read_requests(source), done, None)
                    await answer_all(
                        generator, left, answers.append, defaults, tally, on_answer, 2 * config.max_sequences
                    )

        try:
            with asyncio.Runner() as runner:
                runner.run(run())
        except ExceptionGroup as group:
            raise _first(group) from None
        finally:
            if tally.answers < total and answers.num_written:
                console.print(
                    f"{tally.answers} of {total} answers are in {target}; the same command goes on from there",
                    soft_wrap=True,
                )
    _summarise(console, tally, done, target)
    return 0


def _first(group: ExceptionGroup[Any]) -> Exception:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error


@contextmanager
def _bar(tally: Tally, total: int, console: Console) -> Iterator[Callable[[], None]]:
    """Gives what to call after each answer."""
    columns = (BarColumn(), MofNCompleteColumn(), _RateColumn(tally), TimeRemainingColumn())
    with passing_bar(console, *columns) as bar:
        task = bar.add_task("answers", total=total, completed=tally.answers)
        yield lambda: bar.update(task, completed=tally.answers)


class _RateColumn(ProgressColumn):
    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def render(self, task: Task) -> Text:
        return Text(f"{self._tally.rate():,.0f} tokens/s")


def _summarise(console: Console, tally: Tally, done: int, target: Path) -> None:
    seconds = time.monotonic() - tally.began
    console.print(
        f"{tally.answers - done:,} answers in {seconds:.1f} s: {tally.output_tokens:,} output tokens "
        f"({tally.rate():,.0f}/s) for {tally.prompt_tokens:,} prompt tokens; in {target}",
        soft_wrap=True,
    )
    if tally.errors:
        console.print(f"[yellow]{tally.errors:,} of them are errors:[/] look for lines with `error`", soft_wrap=True)


async def answer_all(
    generator: Generator,
    lines: Iterator[RequestLine],
    append: Callable[[bytes], None],
    defaults: Defaults,
    tally: Tally,
    on_answer: Callable[[], None],
    max_open: int,
) -> None:
    """Answer `lines`, `max_open` at a time; `append` gets the answers in their order. Raises a group with EngineLost.

    `max_open` should be more than the engine runs at once, so that its queue is never empty.
    """
    room = asyncio.Semaphore(max_open)
    # Answers that wait for an earlier one. They are few: the earlier request was started first.
    waiting: dict[int, bytes] = {}

    async def answer(index: int, line: RequestLine) -> None:
        try:
            result = await _answer(generator, line, defaults, tally)
        finally:
            room.release()
        waiting[index] = msgspec.json.encode({"line": line.number, "request": line.digest} | result) + b"\n"
        while tally.answers in waiting:
            append(waiting.pop(tally.answers))
            tally.answers += 1
            on_answer()

    async with asyncio.TaskGroup() as group:
        for index, line in enumerate(lines, tally.answers):
            await room.acquire()
            group.create_task(answer(index, line))


async def _answer(generator: Generator, line: RequestLine, defaults: Defaults, tally: Tally) -> dict[str, Any]:
    identity: dict[str, Any] = {}
    try:
        body = _parse(line.raw, generator)
        if body.id is not None:
            identity["id"] = body.id
        _apply(defaults, body)
        while True:
            try:
                return identity | await _generate(generator, body, f"line-{line.number}", tally)
            except ApiError as error:
                if error.code in ("endpoints_lost", "no_endpoint"):
                    raise EngineLost(error.message) from None
                if error.status != 429:
                    raise
                await asyncio.sleep(_RETRY_SECONDS)
    except ApiError as error:
        tally.errors += 1
        return identity | error.body()


def _parse(raw: bytes, generator: Generator) -> ChatLine | CompletionLine:
    if len(raw) > generator.limits.body_bytes:
        raise invalid(f"the line has {len(raw)} bytes; at most {generator.limits.body_bytes} are allowed")
    outline = decode(raw, _Outline, generator.limits)
    has_messages, has_prompt = outline.messages is not msgspec.UNSET, outline.prompt is not msgspec.UNSET
    if has_messages == has_prompt:
        raise invalid("a request has either messages or prompt" + (", not both" if has_prompt else "; add one of them"))
    if has_messages:
        return decode(raw, ChatLine, generator.limits)
    return decode(raw, CompletionLine, generator.limits)


def _apply(defaults: Defaults, body: ChatLine | CompletionLine) -> None:
    unlimited = body.max_tokens is None and getattr(body, "max_completion_tokens", None) is None
    if unlimited:
        body.max_tokens = defaults.max_tokens
    if body.temperature is None:
        body.temperature = defaults.temperature
    if body.seed is None:
        body.seed = defaults.seed


async def _generate(
    generator: Generator, body: ChatLine | CompletionLine, request_id: str, tally: Tally
) -> dict[str, Any]:
    if isinstance(body, ChatRequest):
        prompts = [
            generator.chat_prompt(body.messages, body.tools, body.add_generation_prompt, body.chat_template_kwargs)
        ]
        form: Any = ChatFormat(body, generator.tokenizer, body.model, request_id, prompts)
    else:
        prompts = generator.prompts(body)
        form = CompletionFormat(body, generator.tokenizer, body.model, request_id, prompts)
    if len(prompts) > 1:
        raise invalid(f"a line holds one request, this one {len(prompts)} prompts: give each its own line", "prompt")
    job = await generator.job(body, prompts[0], request_id)
    usage = Usage(len(prompts[0]))
    pieces: dict[int, list[Piece]] = {}
    async for piece in generator.run(job):
        usage.add(piece)
        tally.output_tokens += len(piece.token_ids)
        pieces.setdefault(piece.index, []).append(piece)
        if piece.finish == "error":
            raise ApiError(500, f"generation failed: {piece.error}", code="generation_failed")
    tally.prompt_tokens += usage.prompt
    sequences = [joined(pieces[index]) for index in sorted(pieces)]
    formed = form.whole(sequences, usage)["choices"]
    choices = [_plain(choice, piece.token_ids) for choice, piece in zip(formed, sequences, strict=True)]
    return (choices[0] if job.request.n == 1 else {"choices": choices}) | {"usage": usage.body()}


def _plain(choice: dict[str, Any], token_ids: list[int]) -> dict[str, Any]:
    """One sequence, flat: a file of answers is read by scripts, and chats and completions look alike in it."""
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    answer = {"text": text, "token_ids": token_ids, "finish_reason": choice["finish_reason"]}
    extra = {key: choice[key] for key in ("stop_reason", "logprobs") if choice.get(key) is not None}
    return answer | extra
