"""The fault suite against a fleet that keeps the contract, and against fleets that break it each in one way."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml

from shoal.bench.faults.deployment import Deployment, DeploymentError, Server
from shoal.bench.faults.report import Report
from shoal.bench.faults.suite import OPENED_AHEAD, Options, run_suite
from shoal.serve.http_client import SPARE_CONNECTIONS

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.faults.stub_fleet"]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}


def options(*faults: str, kills: int = 1, return_seconds: float = 10.0) -> Options:
    return Options(
        version="test",
        faults=faults,
        streams=8,
        kills=kills,
        requests=16,
        max_tokens=40,
        undisturbed_seconds=0.5,
        warm_seconds=0.3,
        settle_seconds=3.0,
        window=1.5,
        patience=5.0,
        return_seconds=return_seconds,
    )


@contextlib.asynccontextmanager
async def external_engines(count: int, directory: Path) -> AsyncIterator[list[Server]]:
    servers = [Server([*COMMAND, "--engine"], directory / f"engine-{n}.log", ENVIRONMENT) for n in range(count)]
    for server in servers:
        server.start()
    try:
        yield servers
    finally:
        for server in servers:
            await server.stop()


def run(directory: Path, wanted: Options, *, flaws: tuple[str, ...] = (), external: bool = False) -> Report:
    async def act() -> Report:
        async with external_engines(2 * external, directory) as servers:
            model = {"name": "tiny", "replicas": 2}
            if external:
                model = {"name": "tiny", "endpoints": [{"openai": server.url} for server in servers]}
            file = directory / "fleet.yaml"
            file.write_text(yaml.safe_dump({"models": [model]}))
            command = [*COMMAND, *(word for flaw in flaws for word in ("--flaw", flaw))]
            deployment = Deployment(file, command=command, environment=ENVIRONMENT, start_seconds=20)
            try:
                await deployment.start()
                return await run_suite(deployment, wanted, lambda what, done, total: None)
            finally:
                await deployment.stop()

    return asyncio.run(act())


@pytest.mark.full_faults
def test_a_fleet_that_keeps_the_contract(tmp_path: Path) -> None:
    report = run(tmp_path, options("kill", "client-reset"))
    assert not [breach for row in report.rows for breach in row.breaches], report.markdown()
    kill = report.rows[0]
    assert kill.injected == len(kill.evidence) == 1
    assert kill.detection is not None and kill.recovery is not None
    assert "lives on" in kill.control, "the control failed to prove a kill"
    assert all(row.control for row in report.rows)
    assert {row.fault: row.tally.breaks > 0 for row in report.rows} == {
        "kill": False,
        "client-reset": True,
    }
    assert not report.unstable


@pytest.mark.full_faults
def test_a_hang(tmp_path: Path) -> None:
    report = run(tmp_path, options("hang"))
    assert not report.rows[0].breaches, report.markdown()
    assert report.rows[0].detection is not None
    assert "not stopped" in report.rows[0].control


@pytest.mark.full_faults
def test_links(tmp_path: Path) -> None:
    report = run(tmp_path, options("reset", "partition", "kill"), external=True)
    assert not [breach for row in report.rows for breach in row.breaches], report.markdown()
    skipped, *links = sorted(report.rows, key=lambda row: not row.skipped)
    assert skipped.fault == "kill" and "no endpoint is a process" in skipped.skipped
    assert all(row.injected == 1 for row in links)
    assert "not tried" in report.markdown()


@pytest.mark.parametrize(
    ("flaws", "complaints"),
    [
        (("repeat", "leaks"), ("duplicate tokens", "KV blocks were left")),
        pytest.param(("gap", "blind"), ("missing tokens", "never showed"), marks=pytest.mark.full_faults),
        pytest.param(("breaks",), ("lost", "broken off"), marks=pytest.mark.full_faults),
        pytest.param(("fails",), ("failed",), marks=pytest.mark.full_faults),
    ],
)
def test_a_fleet_that_breaks_it_is_found_out(
    tmp_path: Path, flaws: tuple[str, ...], complaints: tuple[str, ...]
) -> None:
    report = run(tmp_path, options("kill", return_seconds=2.0), flaws=flaws)
    assert not report.ok
    for complaint in complaints:
        assert any(complaint in breach for breach in report.rows[0].breaches), report.rows[0].breaches
    assert "**broken**" in report.markdown()


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="no fault 'kil'; there are kill, "):
        run(tmp_path, options("kil"))
    file = tmp_path / "other.yaml"
    file.write_text("model: a")
    with pytest.raises(DeploymentError, match="no list `models`"):
        Deployment(file)
    with pytest.raises(DeploymentError, match="cannot be read"):
        Deployment(tmp_path / "absent.yaml")


def test_connections_that_a_gateway_opens_ahead_are_no_leak() -> None:
    assert OPENED_AHEAD == SPARE_CONNECTIONS
