"""What is compared: the mocks without a router, the Rust routers, and shoal's gateway, each on a core of its own.

All of them take requests in turn to two mock engines: policies differ in what they know, not in what passing a token on
costs. Everything else of a router is as it comes, but for its log, which is kept short.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peer_builds import Peer, PeerUnavailable, build

PROGRAM = Path(__file__).parents[1] / "gateway.py"
START_SECONDS = 60.0
Say = Callable[[str], None]


class RouterFailed(Exception):
    """It did not start. The message is for the report."""


@dataclass(frozen=True)
class Router:
    name: str
    version: str
    command: Callable[[int, Sequence[str], Path], list[str]] | None
    """From its port, the engines' URLs and a folder of its own. None: requests go to the engines themselves."""


def _rust(module: str, peer: Peer) -> Router:
    def command(port: int, engines: Sequence[str], folder: Path) -> list[str]:
        line = [str(peer.executable), "-m", f"{module}.launch_router", "--host", "127.0.0.1", "--port", str(port)]
        line += ["--worker-urls", *engines, "--policy", "round_robin"]
        # Its metrics listen on a port of their own, which must not be another router's.
        return [*line, "--prometheus-port", str(free_port()), "--log-level", "error"]

    return Router(peer.name, peer.version, command)


def _shoal(port: int, engines: Sequence[str], folder: Path) -> list[str]:
    model = {
        "name": "mock",
        "model": "smollm2-135m",
        "endpoints": [{"openai": url} for url in engines],
        "routing": {"policy": "round_robin"},
    }
    file = folder / "fleet.yaml"
    file.write_text(json.dumps({"port": port, "models": [model]}))  # JSON is YAML
    return [sys.executable, "-m", "shoal", "serve", "--deployment", str(file)]


def find_routers(venvs: Path, pip_options: list[str], say: Say) -> tuple[list[Router], dict[str, str]]:
    """All that are there, and why others are not. The direct way is the first."""
    import shoal

    routers, missing = [Router("direct", "", None)], {}
    for name, module in (("vllm-router", "vllm_router"), ("sglang-router", "sglang_router")):
        try:
            routers.append(_rust(module, build(name, venvs, jobs=1, pip_options=pip_options, say=say)))
        except PeerUnavailable as error:
            missing[name] = str(error)
    return [*routers, Router("shoal", f"shoal {shoal.__version__}", _shoal)], missing


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def pinned(command: list[str], core: int, log: Path, *, read: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """A process on one core, ended with all that it started. With `read` its standard output is a pipe."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if read else output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def running(router: Router, engines: Sequence[str], core: int, folder: Path) -> Iterator[tuple[list[str], int | None]]:
    """The URLs to ask, and the router's process; both are the engines' own and none for the direct way."""
    if router.command is None:
        yield list(engines), None
        return
    port, log = free_port(), folder / f"{router.name}.log"
    with pinned(router.command(port, engines, folder), core, log) as process:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(router.name, url, process, log)
        yield [url], process.pid


def _wait_until_ready(name: str, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Ready is what answers a request: a router that listens may not have found its engines yet."""
    body = json.dumps({"model": "mock", "prompt": "ready", "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    deadline = time.monotonic() + START_SECONDS
    last = ""
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5.0):
                return
        except (urllib.error.URLError, OSError) as error:
            last = str(error)
            time.sleep(0.2)
    tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-3:]).strip()
    raise RouterFailed(f"{name} was not ready after {START_SECONDS:g} s or ended ({last}); its log ends: {tail}")


@contextlib.contextmanager
def mock_engines(count: int, options: list[str], core: int, folder: Path) -> Iterator[list[str]]:
    """URLs of mock OpenAI engines, all in one process."""
    command = [sys.executable, str(PROGRAM), "mock", "--ports", ",".join(["0"] * count), *options]
    log = folder / "mocks.log"
    with pinned(command, core, log, read=True) as process:
        line = process.stdout.readline() if process.stdout is not None else b""
        if not line:
            raise RouterFailed(f"the mock engines did not start: {log.read_text(errors='replace').strip()[-400:]}")
        yield [f"http://127.0.0.1:{port}" for port in json.loads(line)["ports"]]
