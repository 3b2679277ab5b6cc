"""The deployment under test: gateways started from its file, what they say of endpoints, proxies between the two."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import msgspec
import yaml

from shoal.bench.faults.proxy import ProxyThread
from shoal.bench.http_client import ConnectionLost, fetch
from shoal.bench.processes import Process, descendants, find, open_files
from shoal.core.fleet_types import EndpointStatus, FleetStatus

_POLL_SECONDS = 0.1
_LOG_TAIL = 2000


class DeploymentError(Exception):
    """The deployment cannot be tested. The message is for the user."""


class Server:
    """A server process of ours, over a free port, with its output in a file. It can be started again."""

    def __init__(self, words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        """`words`: the command; its port is appended as `--port N`."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._words = [*words, "--port", str(self.port)]
        self._log = log
        self._environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._kill_rest()
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._words, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )

    @property
    def pid(self) -> int:
        assert self.process is not None, "it was not started"
        return self.process.pid

    @property
    def identity(self) -> Process | None:
        return None if self.status is not None else find(self.pid)

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs. A signal is negative."""
        return None if self.process is None else self.process.poll()

    async def until_answers(self, path: str, seconds: float, headers: Mapping[str, str] | None = None) -> None:
        """Until GET `path` says 200. Raises DeploymentError with what the process said."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(ConnectionLost):
                answer = await fetch(self.url, path, headers=headers or {}, seconds=5)
                if answer.status == 200:
                    return
                if answer.status in (401, 403):
                    text = answer.body.decode("utf-8", "replace")[:200]
                    raise DeploymentError(f"GET {path} answered {answer.status}; give --api-key: {text}")
            if self.status is not None:
                raise DeploymentError(f"{self._command} exited with status {self.status}: {self.tail()}")
            if time.monotonic() > deadline:
                raise DeploymentError(f"{self._command} did not answer {path} within {seconds:g} s: {self.tail()}")
            await asyncio.sleep(_POLL_SECONDS)

    async def keep_running(self) -> None:
        """Start it again whenever it has ended, until cancelled: what an operator's supervisor does."""
        while True:
            if self.status is not None:
                self.start()
            await asyncio.sleep(0.5)

    async def stop(self, seconds: float = 40.0) -> None:
        if self.process is not None and self.status is None:
            self.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + seconds
            while self.status is None and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
        self._kill_rest()

    def _kill_rest(self) -> None:
        """Its whole process group, as the end of a container does: vLLM's engine outlives a server that was killed."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tail(self) -> str:
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        return text[-_LOG_TAIL:].strip() or "it said nothing"

    @property
    def _command(self) -> str:
        return " ".join(self._words[-5:])


class Deployment:
    """Gateways over one deployment file. Proxies stand before endpoints that the file gives by URL."""

    def __init__(
        self,
        file: Path,
        *,
        command: Sequence[str] = (sys.executable, "-m", "shoal", "serve"),
        gateways: int = 1,
        headers: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        start_seconds: float = 600.0,
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="shoal-faults-")
        self.headers = dict(headers or {})
        self._start_seconds = start_seconds
        self.proxies: dict[str, ProxyThread] = {}
        """By the URL that the gateways know, without its path."""
        self.external: dict[str, Server] = {}
        """Servers that whoever runs the suite started, by the same URL: faults of processes reach these too."""
        path = self._interposed(file)
        words = [*command, "--deployment", str(path)]
        here = Path(self._directory.name)
        self.gateways = [Server(words, here / f"gateway-{n}.log", environment) for n in range(gateways)]

    def _interposed(self, file: Path) -> Path:
        """The file, or where it names URLs of endpoints a copy in which proxies stand before them."""
        try:
            tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise DeploymentError(f"{file} cannot be read: {error}") from None
        models = tree.get("models") if isinstance(tree, dict) else None
        if not isinstance(models, list):
            raise DeploymentError(f"{file} has no list `models`: it is not a deployment")
        for endpoint in (e for model in models if isinstance(model, dict) for e in model.get("endpoints") or []):
            if isinstance(endpoint, dict) and isinstance(url := endpoint.get("openai"), str):
                endpoint["openai"] = self._proxied(url)
        if not self.proxies:
            return file.resolve()
        copy = Path(self._directory.name) / file.name
        copy.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        return copy

    def _proxied(self, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            return url  # inside TLS there is nothing to see, and no certificate is made out to a proxy
        proxy = ProxyThread(parts.hostname, parts.port or 80)
        self.proxies[proxy.url] = proxy
        return proxy.url + parts.path

    async def start(self) -> None:
        for gateway in self.gateways:
            gateway.start()
        for gateway in self.gateways:
            await gateway.until_answers("/ready", self._start_seconds, self.headers)

    async def stop(self) -> None:
        await asyncio.gather(*(gateway.stop() for gateway in self.gateways))
        for proxy in self.proxies.values():
            proxy.close()
        self._directory.cleanup()

    def urls(self) -> list[str]:
        """Of gateways that run; of all of them if none does, for clients go on trying."""
        return [g.url for g in self.gateways if g.status is None] or [g.url for g in self.gateways]

    async def status(self, gateway: int = 0) -> FleetStatus:
        """Raises ConnectionLost, or DeploymentError where there is no fleet to ask."""
        answer = await fetch(self.gateways[gateway].url, "/fleet", headers=self.headers, seconds=5)
        if answer.status != 200:
            text = answer.body.decode("utf-8", "replace")[:200]
            raise DeploymentError(f"GET /fleet answered {answer.status}: {text}")
        try:
            return msgspec.json.decode(answer.body, type=FleetStatus)
        except msgspec.DecodeError as error:
            raise DeploymentError(f"GET /fleet is not what this version of shoal knows: {error}") from None

    async def operate(self, verb: str, name: str, *, within: float | None = None) -> str:
        """What an operator asks of an endpoint, at the first gateway that runs: empty, or what was answered instead.

        `within`: seconds after which requests that still run there move.
        """
        path = f"/fleet/endpoints/{quote(name)}/{verb}"
        try:
            body = b"{}" if within is None else msgspec.json.encode({"seconds": within})
            answer = await fetch(
                self.urls()[0], path, method="POST", headers=self.headers, body=body, seconds=self._start_seconds
            )
        except ConnectionLost as error:
            return str(error)
        return "" if answer.status < 300 else f"{path}: {answer.status} {answer.body.decode('utf-8', 'replace')[:200]}"

    def process_of(self, endpoint: EndpointStatus) -> Process | None:
        """What serves as the endpoint now; None where it is not a process that can be reached."""
        word, _, number = endpoint.address.partition(" ")
        if word == "pid" and number.isdigit():
            return find(int(number))
        server = self.external.get(base_of(endpoint.address))
        return None if server is None else server.identity

    async def serves(self, endpoint: EndpointStatus) -> bool:
        """Whether a server that whoever runs the suite started answers; of others the gateway knows it alone."""
        server = self.external.get(base_of(endpoint.address))
        if server is None:
            return True
        try:
            return (await fetch(server.url, "/v1/models", headers={}, seconds=5)).status == 200
        except ConnectionLost:
            return False

    def proxy_of(self, endpoint: EndpointStatus) -> ProxyThread | None:
        return self.proxies.get(base_of(endpoint.address))

    def footprint(self) -> dict[str, int]:
        """What must not grow: processes of all gateways, and files that each gateway holds open."""
        pids = [gateway.pid for gateway in self.gateways if gateway.status is None]
        files = {f"files of gateway {n}": open_files(pid) for n, pid in enumerate(pids)}
        return {"processes": sum(1 + len(descendants(pid)) for pid in pids), **files}


class Sighting(NamedTuple):
    at: float
    state: str
    breaker: str
    epoch: int
    restarts: int
    failures: int

    def shows(self, before: Sighting | None) -> bool:
        """That something happened to the endpoint since `before`."""
        if self.state != "ready" or self.breaker != "closed":
            return True
        counts = self.epoch, self.restarts, self.failures
        return before is not None and any(
            now > then for now, then in zip(counts, (before.epoch, before.restarts, before.failures), strict=True)
        )


class FleetWatch:
    """What the first gateway that runs says of every endpoint, several times a second."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._history: dict[str, list[Sighting]] = {}
        self._task: asyncio.Task[None] | None = None
        self.endpoints: dict[str, EndpointStatus] = {}
        self.status: FleetStatus | None = None
        self.gateway = 0

    async def start(self) -> None:
        await self._look()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            with contextlib.suppress(ConnectionLost, DeploymentError):
                await self._look()

    async def _look(self) -> None:
        running = [n for n, gateway in enumerate(self._deployment.gateways) if gateway.status is None]
        gateway = running[0] if running else 0
        self.status = await self._deployment.status(gateway)
        if gateway != self.gateway:
            self._history.clear()  # another gateway's epochs and restarts are others
            self.gateway = gateway
        now = time.monotonic()
        self.endpoints = {endpoint.name: endpoint for model in self.status.models for endpoint in model.endpoints}
        for name, seen in self.endpoints.items():
            history = self._history.setdefault(name, [])
            sighting = Sighting(now, seen.state, seen.breaker, seen.epoch, seen.restarts, seen.failures)
            if not history or history[-1][1:] != sighting[1:]:
                history.append(sighting)

    @property
    def ready(self) -> list[EndpointStatus]:
        return [endpoint for endpoint in self.endpoints.values() if endpoint.state == "ready" and not endpoint.spare]

    @property
    def all_ready(self) -> bool:
        return bool(self.endpoints) and all(endpoint.state == "ready" for endpoint in self.endpoints.values())

    @property
    def idle(self) -> bool:
        """Nothing is under way, waits, or holds KV blocks, as far as is known."""
        return all(
            not endpoint.requests and not endpoint.num_running and not endpoint.num_waiting and not endpoint.kv_usage
            for endpoint in self.endpoints.values()
        )

    @property
    def kv_usage(self) -> float:
        """The largest share of KV blocks in use at any endpoint."""
        return max((endpoint.kv_usage or 0.0 for endpoint in self.endpoints.values()), default=0.0)

    def noticed(self, name: str, since: float) -> float | None:
        """Monotonic second from which the fleet showed that something had happened to the endpoint after `since`."""
        history = self._history.get(name, [])
        before = [sighting for sighting in history if sighting.at <= since]
        last = before[-1] if before else None
        return next((seen.at for seen in history if seen.at > since and seen.shows(last)), None)

    def restored(self, name: str, since: float) -> float | None:
        """Monotonic second from which it is ready for good, if it was noticed missing after `since`."""
        history = self._history.get(name, [])
        if self.noticed(name, since) is None or not history or history[-1].shows(None):
            return None
        # Failures of single requests may be counted later still; what counts is since when it could serve.
        again = len(history) - 1
        while again > 0 and history[again - 1].at > since and not history[again - 1].shows(None):
            again -= 1
        return history[again].at


def base_of(url: str) -> str:
    parts: Any = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def free_port() -> int:
    """One that nobody has, below those that the system gives to clients: none of them takes it meanwhile."""
    while True:
        port = 15_000 + secrets.randbelow(15_000)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
