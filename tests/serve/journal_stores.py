"""What the journal's tests share: a Redis of their own, and what sequences consist of."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import virtual_time
from tests.serve.journal_writer import token
from tests.serve.running import wait_until


def tokens(index: int, end: int, start: int = 0) -> list[int]:
    return [token(index, position) for position in range(start, end)]


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    virtual_time.run(body())


@contextlib.contextmanager
def redis_server(directory: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    pytest.importorskip("redis", reason="the extra redis is not installed")
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:

        def answers() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        try:
            wait_until(answers, "redis-server to answer")
            yield server
        finally:
            server.terminate()
