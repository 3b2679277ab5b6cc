"""`shoal chat`: a conversation on the terminal, or over a pipe."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console

from shoal.cli.local_engine import exit_on_sigterm, local_engine
from shoal.cli.terminal import error_console, printable, resolve_with_progress
from shoal.config import load_config
from shoal.core.config import EngineConfig
from shoal.serve.engine_client import EngineLost
from shoal.serve.errors import ApiError
from shoal.serve.generation import Generator
from shoal.serve.protocol import ChatRequest

_HELP = "/reset forgets the conversation, /system TEXT sets the system message, /quit or Ctrl-D ends it"


def talk(model: str, flags: Mapping[str, Any], system: str | None, sampling: Mapping[str, Any]) -> int:
    """Until the input ends. `flags` are EngineConfig's keys, `sampling` fields of the API. Returns the exit status."""
    console = error_console()
    config = load_config(EngineConfig, None, flags)
    files = resolve_with_progress(model, console)
    exit_on_sigterm()
    # The loop runs while an answer is made; between answers the terminal has the thread, so that editing a line and
    # Ctrl-C are the terminal's own.
    with asyncio.Runner() as runner:
        engine = local_engine(config, files, console)
        generator = runner.run(_enter(engine))
        try:
            conversation = Conversation(generator, system, sampling)
            if sys.stdin.isatty():
                console.print(f"{files.name}: {_HELP}", style="dim", soft_wrap=True)
            for line in _lines():
                _handle(line, conversation, runner, console)
        except _Quit:
            pass
        finally:
            runner.run(engine.__aexit__(None, None, None))
    return 0


async def _enter(engine: contextlib.AbstractAsyncContextManager[Generator]) -> Generator:
    return await engine.__aenter__()


class _Quit(Exception):
    """The user has had enough."""


def _lines() -> Iterator[str]:
    """What the user types. Ctrl-C at the prompt clears the line, as in a shell; Ctrl-D ends."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (makes `input` edit lines and keep their history)
    while True:
        try:
            yield input("> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()


def _handle(line: str, conversation: Conversation, runner: asyncio.Runner, console: Console) -> None:
    command, _, rest = line.strip().partition(" ")
    if command in ("/quit", "/exit"):
        raise _Quit
    if command == "/reset":
        conversation.reset()
    elif command == "/system":
        conversation.system = rest.strip() or None
        conversation.reset()
    elif command.startswith("/"):
        console.print(f"{command} is not a command: {_HELP}", style="dim", markup=False, soft_wrap=True)
    elif command:
        try:
            runner.run(conversation.answer(line, console))
        except KeyboardInterrupt:
            print()
            console.print("stopped", style="dim")


class Conversation:
    """The messages so far. An answer that failed takes its question with it; one that was stopped is kept."""

    def __init__(self, generator: Generator, system: str | None, sampling: Mapping[str, Any]) -> None:
        self.system = system
        self._generator = generator
        self._sampling = sampling
        self._turn = 0
        self._messages: list[dict[str, Any]] = []

    def reset(self) -> None:
        self._messages = []

    async def answer(self, question: str, console: Console) -> None:
        """Stream an answer to standard output. Raises EngineLost."""
        self._turn += 1
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*opening, *self._messages, {"role": "user", "content": question}]
        request = ChatRequest(messages=messages, **self._sampling)
        parts: list[str] = []
        try:
            prompt = self._generator.chat_prompt(messages)
            job = await self._generator.job(request, prompt, f"turn-{self._turn}")
            began, first, num_tokens = time.monotonic(), 0.0, 0
            async with contextlib.aclosing(self._generator.run(job)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    first = first or time.monotonic()
                    num_tokens += len(piece.token_ids)
                    parts.append(piece.text)
                    sys.stdout.write(printable(piece.text))
                    sys.stdout.flush()
                    if piece.error:
                        raise ApiError(500, f"generation failed: {piece.error}")
        except ApiError as error:
            if error.code in ("endpoints_lost", "no_endpoint"):
                raise EngineLost(error.message) from None
            advice = ": /reset begins a new conversation" if error.code == "context_length_exceeded" else ""
            console.print(f"{error.message}{advice}", style="red", markup=False, soft_wrap=True)
            return
        except asyncio.CancelledError:
            self._keep(question, parts)
            raise
        self._keep(question, parts)
        print(flush=True)
        if sys.stdout.isatty():
            console.print(_pace(num_tokens, first - began, time.monotonic() - first), style="dim")

    def _keep(self, question: str, parts: list[str]) -> None:
        self._messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "".join(parts)},
        ]


def _pace(num_tokens: int, to_first: float, after_first: float) -> str:
    """Decode speed leaves the first token out: its time is the prompt's."""
    speed = f", {(num_tokens - 1) / after_first:.0f} tokens/s" if num_tokens > 1 and after_first > 0 else ""
    return f"{num_tokens} tokens{speed}, first after {to_first:.2f} s"
