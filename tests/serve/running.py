"""A real server in a process of its own, over a tiny checkpoint: `with running(...) as server`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec

from shoal.checkpoint.resolve import resolve
from shoal.core.config import EngineConfig
from shoal.serve.server import ServeConfig

PATIENCE = 60.0
"""Seconds for what takes a moment on any machine, but for one that is stopped or very busy meanwhile."""
ENDLESS = 60_000
"""Tokens of a request that is there until it is told to end: of minutes of steps."""
LONG_CONTEXT = 65_536
"""Of a checkpoint that has room for it."""
ROOM = {"check": False, "kv_cache_bytes": 64 << 20}
"""Options of its engine. Checking every step looks at every block, and would take longer than the step."""


class RunningServer:
    def __init__(self, process: subprocess.Popen[str], url: str, engine_pid: int) -> None:
        self.process = process
        self.url = url
        self.engine_pid = engine_pid
        self.client = httpx.Client(base_url=url, timeout=60)

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.url)
        return url.host, url.port or 0

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))

    def wait_for_metric(self, name: str, value: float) -> None:
        wait_until(lambda: self.metric(name) == value, f"{name} to be {value}")


def wire_bytes(client: httpx.Client, path: str, body: dict[str, Any]) -> bytes:
    """A POST as it goes over a connection, for who leaves in the midst of things."""
    request = client.build_request("POST", path, json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + request.content


def wait_until(condition: Callable[[], object], what: str) -> None:
    """The limit is only for what never comes."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        time.sleep(0.01)


async def until(condition: Callable[[], object], what: str) -> None:
    """The same within an asyncio program."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


@contextlib.contextmanager
def running(checkpoint: Path, *, engine: dict[str, Any] | None = None, **changes: Any) -> Iterator[RunningServer]:
    values = {"dtype": "float32", "max_sequences": 8, "max_batch_tokens": 128, "threads": 1}
    values |= {"check": True, "kv_cache_bytes": 8 << 20}
    config = ServeConfig(
        engine=EngineConfig(model=str(checkpoint), **(values | (engine or {}))),
        port=0,
        served_model_name="tiny",
        **changes,
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.running", str(checkpoint), msgspec.json.encode(config).decode()],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["src", "."])},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready "), f"the server did not start: {line!r}"
        _, url, engine_pid = line.split()
        yield RunningServer(process, url, int(engine_pid))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main(checkpoint: str, config_json: str) -> int:
    from shoal.serve.server import listen, serve

    config = msgspec.json.decode(config_json, type=ServeConfig)
    listener = listen(config)
    files = resolve(checkpoint)
    deployment = config.deployment(files)
    return asyncio.run(
        serve(
            deployment,
            {deployment.models[0].name: files},
            listener,
            on_ready=lambda url, session: print("ready", url, session.fleet.members()[0].endpoint.pid, flush=True),
        )
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
