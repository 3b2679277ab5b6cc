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

from tests.serve.running import PATIENCE, wait_until

ENGINE = {"dtype": "float32", "threads": 1, "max_sequences": 8, "max_batch_tokens": 128}
ENGINE |= {"check": True, "kv_cache_bytes": 8 << 20}


class RunningFleet:
    def __init__(self, process: subprocess.Popen[str], url: str, **client: Any) -> None:
        self.process = process
        self.url = url
        self.client = httpx.Client(base_url=url, timeout=60, **client)

    def model(self, number: int = 0) -> dict[str, Any]:
        """FleetStatus of one model."""
        models: list[dict[str, Any]] = self.client.get("/fleet").json()["models"]
        return models[number]

    def endpoints(self, model: int = 0) -> dict[str, dict[str, Any]]:
        return {endpoint["name"]: endpoint for endpoint in self.model(model)["endpoints"]}

    def busy(self) -> dict[str, Any]:
        """The one endpoint that has requests."""
        (endpoint,) = [endpoint for endpoint in self.endpoints().values() if endpoint["requests"]]
        return endpoint

    def wait_for_state(self, name: str, state: str) -> None:
        wait_until(lambda: self.endpoints()[name]["state"] == state, f"{name} to be {state}")


def pid_of(endpoint: dict[str, Any]) -> int:
    return int(endpoint["address"].removeprefix("pid "))


@contextlib.contextmanager
def running_fleet(folder: Path, deployment: dict[str, Any], **client: Any) -> Iterator[RunningFleet]:
    """On any free port. Ends with SIGTERM, and with it everything that it started. `client`: how to speak to it."""
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
        assert "://" in line, f"the fleet did not start: {line!r}"
        fleet = RunningFleet(process, line.split()[-1].removesuffix("/v1"), **client)
        wait_until(lambda: fleet.client.get("/ready").status_code == 200, "the fleet to be ready")
        yield fleet
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        assert process.stdout is not None
        process.stdout.close()
