"""The output of `shoal generate`: answers in order, one a line, whole or not at all as far as a reader can tell."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from shoal.cli.errors import CommandError


class _Head(msgspec.Struct):
    """What every answer has, errors too."""

    line: int
    request: str
    """Digest of the request."""


class AnswerFile:
    """Open for one process at a time. Raises CommandError or OSError."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        """`fresh` drops what is there, once there is something to put in its place."""
        self.path = path
        self.num_kept = 0
        """Answers of earlier runs."""
        self.num_written = 0
        """Answers of this run."""
        self._whole = 0
        """Bytes of them that are kept; what is behind goes when the first answer is appended, not before."""
        if path.exists() and not path.is_file():
            raise CommandError(f"{path} is not a file: name one for the answers")
        # Unbuffered: each answer is with the kernel as soon as it is appended, whatever happens to this process.
        self._file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise CommandError(f"{path} is being written by another process: wait for it, or name another") from None
        self._fresh = fresh

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def resume(self, requests: Iterable[tuple[int, str]]) -> int:
        """Keep the answers to the first of `requests` (line number and digest) and return how many there are.

        A torn last line is cut off: a process that is killed can leave one, and only there. Anything else that is not
        an answer to its request means that the file is of another run, and nothing is touched.
        """
        if self._fresh:
            return 0
        expected = iter(requests)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            for number, line in enumerate(file, 1):
                answer = _head(line)
                if answer is None:
                    if self._whole + len(line) == size:
                        break
                    raise self._foreign(f"line {number} is not an answer")
                request = next(expected, None)
                if request is None:
                    raise self._foreign(f"it has more answers than there are requests ({number - 1})")
                if request != (answer.line, answer.request):
                    raise self._foreign(f"line {number} answers another request than line {request[0]} of the input")
                self._whole += len(line)
                self.num_kept += 1
        return self.num_kept

    def _foreign(self, reason: str) -> CommandError:
        return CommandError(
            f"{self.path} does not hold the answers to this input: {reason}; name "
            "another file, or begin anew with --force"
        )

    def append(self, line: bytes) -> None:
        """One answer with its newline."""
        if not self.num_written:
            self._file.truncate(self._whole)
            self._file.seek(self._whole)
        view = memoryview(line)
        while view:  # a raw write may take less than it was given, as when the disk is nearly full
            view = view[self._file.write(view) :]
        self.num_written += 1


def _head(line: bytes) -> _Head | None:
    """None if the line is not a whole answer."""
    if not line.endswith(b"\n"):
        return None
    try:
        return msgspec.json.decode(line, type=_Head)
    except msgspec.DecodeError:
        return None
