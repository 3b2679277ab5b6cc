"""`shoal chat` over a pipe and on a terminal, with a real engine."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import subprocess
import time
from pathlib import Path

from shoal.cli.terminal import printable
from tests.cli.conftest import SHOAL, run_shoal


def test_a_piped_conversation(checkpoint: Path) -> None:
    command = ["chat", checkpoint, "--temperature", 2, "--seed", 5, "--max-tokens", 8]
    alone = run_shoal(command, stdin="hello")
    assert alone.returncode == 0, alone.stderr
    lines = ["hello", "/nonsense", "", "/reset", "hello", "hello", "/quit", "never answered"]
    done = run_shoal(command, stdin="\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert "/nonsense is not a command" in done.stderr
    assert done.stdout.startswith(alone.stdout * 2), "after /reset the same question has the same answer"
    third = done.stdout.removeprefix(alone.stdout * 2)
    assert third and third != alone.stdout, "without it the answer depends on what was said before"


def test_a_conversation_that_outgrows_the_context(checkpoint: Path) -> None:
    done = run_shoal(["chat", checkpoint, "--max-model-len", 32, "--max-tokens", 2], stdin="word " * 60 + "\nhi\n")
    assert done.returncode == 0, done.stderr
    assert "context is 32 tokens" in done.stderr
    assert "/reset begins a new conversation" in done.stderr
    assert done.stderr.count("context is 32 tokens") == 1, "the long question was not kept"


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, command: list[str]) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=_take_terminal
        )
        os.close(slave)
        self.seen = ""

    def press(self, key: str, pattern: str) -> None:
        """Again until `pattern` comes: a signal between the prompt and the read behind it wakes nobody (CPython)."""
        for _ in range(20):
            self.type(key)
            with contextlib.suppress(AssertionError):
                return self.wait_for(pattern, seconds=4)
        raise AssertionError(f"{pattern!r} never came")

    def wait_for(self, pattern: str, seconds: float = 90) -> None:
        """Read until `pattern` matches what came since the last match. `seconds` only bounds a hang."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} did not come; there is {self.seen[:400]!r}"
            self.seen += os.read(self._master, 65536).decode("utf-8", "replace")
        self.seen = self.seen[match.end() :]

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def close(self) -> int:
        """Read on until the command ends; its exit status."""
        while True:
            try:
                if not os.read(self._master, 65536):
                    break
            except OSError:  # Linux's way to say that the other side is closed
                break
        os.close(self._master)
        return self.process.wait(60)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_ctrl_c_stops_an_answer_and_not_the_conversation(checkpoint: Path) -> None:
    sampling = ["--temperature", "0", "--max-tokens", "30000"]
    terminal = Terminal([*SHOAL, "chat", str(checkpoint), *sampling])
    try:
        terminal.wait_for("/quit or Ctrl-D ends it")
        terminal.wait_for("> ")
        terminal.press("\x03", "> ")  # at the prompt it clears the line
        terminal.type("go on for ever\n")
        terminal.wait_for(r"(?s)go on for ever\r\n.{40}")
        terminal.type("\x03")
        terminal.wait_for("stopped")
        terminal.wait_for("> ")
        terminal.type("/reset\n")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.close() == 0
    finally:
        if terminal.process.poll() is None:
            terminal.process.kill()


def test_a_model_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\x9b31mc\td\né\x7f") == "a[2Jb31mc\td\né"
