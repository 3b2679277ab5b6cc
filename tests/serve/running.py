"""A real server in a process of its own, over a tiny checkpoint: `with running(...) as server`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec

from shoal.checkpoint.resolve import resolve
from shoal.core.config import EngineConfig
from shoal.serve.server import ServeConfig


class RunningServer:
    def __init__(self, process: subprocess.Popen[str], url: str, engine_pid: int) -> None:
        self.process = process
        self.url = url
        self.engine_pid = engine_pid
        self.client = httpx.Client(base_url=url, timeout=60)

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))

    def wait_for_metric(self, name: str, value: float, seconds: float = 20) -> None:
        wait_until(lambda: self.metric(name) == value, seconds, f"{name} to be {value}")


def wait_until(condition: Any, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


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
    values = {"dtype": "float32", "max_sequences": 8, "max_batch_tokens": 128, "threads": 1, "check": True}
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
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main(checkpoint: str, config_json: str) -> int:
    import asyncio

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
