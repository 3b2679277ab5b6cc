"""What is compared: the mocks without a router, the Rust routers, and shoal's gateway, each on a core of its own.

Where their cost is compared, all of them take requests in turn: policies differ in what they know, not in what passing
a token on costs. Everything else of a router is as it comes, but for its log, which is kept short.
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
class Cores:
    """Who runs where."""

    router: int
    mocks: int
    load: int

    def __str__(self) -> str:
        shared = "share core" if self.load == self.mocks else f"and core {self.load}: on core"
        return f"mock engines and load generator {shared} {self.mocks}, the router has core {self.router}"


def choose_cores() -> Cores:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("two cores are needed: one for the router, one for the mock engines and the load generator")
    return Cores(cores[-1], cores[0], cores[1] if len(cores) > 2 else cores[0])


@dataclass(frozen=True)
class Router:
    name: str
    version: str
    command: Callable[[int, Sequence[str], Path, str], list[str]] | None
    """From its port, the engines' URLs, a folder of its own and the policy. None: requests go to the engines."""
    policies: tuple[str, ...] = ()
    """That need nothing but requests, the default one first."""


IN_TURN = "round_robin"


def _rust(module: str, peer: Peer, *policies: str) -> Router:
    def command(port: int, engines: Sequence[str], folder: Path, policy: str) -> list[str]:
        line = [str(peer.executable), "-m", f"{module}.launch_router", "--host", "127.0.0.1", "--port", str(port)]
        line += ["--worker-urls", *engines, "--policy", policy]
        # Its metrics listen on a port of their own, which must not be another router's.
        return [*line, "--prometheus-port", str(free_port()), "--log-level", "error"]

    return Router(peer.name, peer.version, command, ("cache_aware", "power_of_two", *policies, IN_TURN))


def _shoal(port: int, engines: Sequence[str], folder: Path, policy: str) -> list[str]:
    model = {
        "name": "mock",
        "model": "smollm2-135m",
        "endpoints": [{"openai": url} for url in engines],
        "routing": {"policy": policy},
    }
    file = folder / "fleet.yaml"
    file.write_text(json.dumps({"port": port, "models": [model]}))  # JSON is YAML
    return [sys.executable, "-m", "shoal", "serve", "--deployment", str(file)]


def find_routers(venvs: Path, pip_options: list[str], say: Say) -> tuple[list[Router], dict[str, str]]:
    """All that are there, and why others are not. The direct way is the first."""
    import shoal

    routers, missing = [Router("direct", "", None)], {}
    more = {"vllm-router": ["sticky_least_loaded"], "sglang-router": []}
    for name, policies in more.items():
        try:
            peer = build(name, venvs, jobs=1, pip_options=pip_options, say=say)
            routers.append(_rust(name.replace("-", "_"), peer, *policies))
        except PeerUnavailable as error:
            missing[name] = str(error)
    shoal_policies = ("predicted_completion", "least_tokens", "prefix_affinity", IN_TURN)
    return [*routers, Router("shoal", f"shoal {shoal.__version__}", _shoal, shoal_policies)], missing


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
def running(
    router: Router, engines: Sequence[str], core: int, folder: Path, policy: str = IN_TURN
) -> Iterator[tuple[list[str], int | None]]:
    """The URLs to ask, and the router's process; both are the engines' own and none for the direct way."""
    if router.command is None:
        yield list(engines), None
        return
    port, log = free_port(), folder / f"{router.name}.log"
    with pinned(router.command(port, engines, folder, policy), core, log) as process:
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
