"""Fleets in processes of their own: `shoal serve --deployment` as users start it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.serve.running import wait_until

ENGINE = {"dtype": "float32", "threads": 1, "max_sequences": 8, "max_batch_tokens": 128, "check": True}


class RunningFleet:
    def __init__(self, process: subprocess.Popen[str], url: str, key: str = "") -> None:
        self.process = process
        self.url = url
        self.client = self.client_of(key)

    def client_of(self, key: str) -> httpx.Client:
        """Somebody with this key; with none where it is empty."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, timeout=60, headers=headers)

    def model(self, number: int = 0) -> dict[str, Any]:
        """FleetStatus of one model."""
        models: list[dict[str, Any]] = self.client.get("/fleet").json()["models"]
        return models[number]

    def endpoints(self) -> dict[str, dict[str, Any]]:
        return {endpoint["name"]: endpoint for endpoint in self.model()["endpoints"]}

    def busy(self) -> dict[str, Any]:
        """The one endpoint that has requests."""
        (endpoint,) = [endpoint for endpoint in self.endpoints().values() if endpoint["requests"]]
        return endpoint

    def wait_for_state(self, name: str, state: str, seconds: float = 20) -> None:
        wait_until(lambda: self.endpoints()[name]["state"] == state, seconds, f"{name} to be {state}")


def pid_of(endpoint: dict[str, Any]) -> int:
    return int(endpoint["address"].removeprefix("pid "))


@contextlib.contextmanager
def running_fleet(folder: Path, deployment: dict[str, Any], key: str = "") -> Iterator[RunningFleet]:
    """On any free port. Ends with SIGTERM, and with it everything that it started. `key`: of the fleet's own client,
    where the deployment has keys; it needs the scope read, metrics or admin."""
    file = folder / f"fleet-{len(list(folder.glob('fleet-*.yaml')))}.yaml"
    file.write_text(yaml.safe_dump({"port": 0, **deployment}))
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal", "serve", "--deployment", str(file)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": "src", "COLUMNS": "200"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://" in line, f"the fleet did not start: {line!r}"
        fleet = RunningFleet(process, line.split()[-1].removesuffix("/v1"), key)
        wait_until(lambda: fleet.client.get("/ready").status_code == 200, 30, "the fleet to be ready")
        yield fleet
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        assert process.stdout is not None
        process.stdout.close()
