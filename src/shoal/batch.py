"""`shoal generate`: a file of requests to a file of answers, in order, resumable.

Requests run as many at a time as the engine takes; answers are written in input order as soon as all before them are
there. What is in the output file is therefore always a prefix of the answers: a run that was interrupted goes on after
the last whole line.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from shoal.serve.errors import ApiError
from shoal.serve.generation import Generator, Piece
from shoal.serve.openai_format import Usage, joined
from shoal.serve.protocol import ChatRequest, CompletionRequest, decode

AHEAD = 256
"""Requests under way at once, the engine's waiting ones included."""


class Progress(msgspec.Struct):
    lines: int = 0
    """Answered, those of an earlier run included."""
    tokens: int = 0
    """Generated in this run."""
    errors: int = 0


def count_lines(path: Path) -> int:
    """Requests in a file: lines that are not blank."""
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())


def open_output(path: Path, *, force: bool) -> tuple[BinaryIO, int]:
    """The output file, ready to append, and how many answers it holds. A torn last line is cut off."""
    file = open(path, "wb" if force or not path.exists() else "r+b")  # noqa: SIM115  (the caller closes it)
    whole = count = 0
    if not force:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                msgspec.json.decode(line)
            except msgspec.DecodeError:
                break
            whole += len(line)
            count += 1
        file.truncate(whole)
    file.seek(whole)
    return file, count


def _requests(path: Path, skip: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        number = 0
        for line in file:
            if line.strip():
                number += 1
                if number > skip:
                    yield line


async def run_batch(
    generator: Generator, source: Path, output: BinaryIO, skip: int, on_progress: Callable[[Progress], None]
) -> Progress:
    """Answer every request of `source` after the first `skip`. Answers are flushed line by line."""
    progress = Progress(lines=skip)
    room = asyncio.Semaphore(AHEAD)
    answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()

    async def feed() -> None:
        for number, line in enumerate(_requests(source, skip), start=skip):
            await room.acquire()
            answers.put_nowait(asyncio.create_task(_answer(generator, line, number, progress)))
        answers.put_nowait(None)

    feeder = asyncio.create_task(feed())
    task: asyncio.Task[bytes] | None = None
    try:
        while (task := await answers.get()) is not None:
            output.write(await task + b"\n")
            output.flush()
            room.release()
            progress.lines += 1
            on_progress(progress)
    finally:
        left = [feeder, *([task] if task is not None else [])]
        while not answers.empty():
            waiting = answers.get_nowait()
            left += [waiting] if waiting is not None else []
        for pending in left:
            pending.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        os.fsync(output.fileno())
    return progress


async def _answer(generator: Generator, line: bytes, number: int, progress: Progress) -> bytes:
    try:
        answer = await _generate(generator, line, number, progress)
    except ApiError as error:
        progress.errors += 1
        answer = {"error": {"message": error.message, "param": error.param, "code": error.code}}
    return msgspec.json.encode(answer)


async def _generate(generator: Generator, line: bytes, number: int, progress: Progress) -> dict[str, Any]:
    is_chat = b'"messages"' in line
    body: ChatRequest | CompletionRequest = decode(
        line, ChatRequest if is_chat else CompletionRequest, generator.limits
    )
    if isinstance(body, ChatRequest):
        prompt = generator.chat_prompt(body.messages, body.tools, body.add_generation_prompt)
    else:
        prompts = generator.prompts(body)
        if len(prompts) != 1:
            raise ApiError(400, "a line has one prompt; write one line for each", param="prompt")
        prompt = prompts[0]
    job = await generator.job(body, prompt, f"line-{number}")
    usage = Usage(len(prompt))
    pieces: dict[int, list[Piece]] = {}
    async for piece in generator.run(job):
        usage.add(piece)
        progress.tokens += len(piece.token_ids)
        pieces.setdefault(piece.index, []).append(piece)
        if piece.finish == "error":
            raise ApiError(500, f"generation failed: {piece.error}", code="generation_failed")
    choices = [_choice(joined(pieces[index])) for index in sorted(pieces)]
    answer = choices[0] if len(choices) == 1 else {"choices": choices}
    return answer | {"usage": usage.body()}


def _choice(piece: Piece) -> dict[str, Any]:
    choice: dict[str, Any] = {"text": piece.text, "token_ids": piece.token_ids, "finish_reason": piece.finish}
    if piece.logprobs:
        choice["logprobs"] = [entry.logprob for entry in piece.logprobs]
    return choice
