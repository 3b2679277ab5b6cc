"""The contract of `shoal serve --deployment`, over engines of a tiny checkpoint: no token lost, repeated or other.

One fleet has both kinds of endpoints, an engine of each gateway's own and a server that both know by its URL, and two
gateways with one journal. How long things take is measured by benchmarks/faults.py: here other tests run beside.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from shoal.bench.faults.deployment import Deployment, Server
from shoal.bench.faults.report import Report
from shoal.bench.faults.suite import Options, run_suite
from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
ENGINE = {"dtype": "float32", "threads": 1, "max_sequences": 16, "max_len": 1024, "kv_cache_bytes": "16MiB"}
FLAGS = ["--dtype", "float32", "--threads", "1", "--max-num-seqs", "16", "--max-model-len", "1024"]
FLAGS += ["--kv-cache-memory", "16MiB", "--prepare-grammars"]
SHORT = Options(
    version="test",
    streams=8,
    kills=1,
    requests=16,
    max_tokens=64,
    undisturbed_seconds=1.0,
    warm_seconds=0.3,
    patience=60.0,
    return_seconds=60.0,
    window=3.5,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    make_checkpoint("llama", path, max_position_embeddings=1024)
    return path


def run(directory: Path, checkpoint: Path, options: Options, *, replicas: int, servers: int, gateways: int) -> Report:
    command = [sys.executable, "-m", "shoal", "serve", str(checkpoint), "--served-model-name", "tiny", *FLAGS]
    external = [Server(command, directory / f"server-{number}.log", ENVIRONMENT) for number in range(servers)]
    model: dict[str, Any] = {"name": "tiny", "model": str(checkpoint), "replicas": replicas, "prepare_grammars": True}
    model |= {**ENGINE, "endpoints": [{"openai": server.url} for server in external]}
    file = directory / "fleet.yaml"
    file.write_text(yaml.safe_dump({"models": [model], "journal": {"location": str(directory / "journal.db")}}))

    async def act() -> Report:
        for server in external:
            server.start()
        deployment = Deployment(file, gateways=gateways, environment=ENVIRONMENT, start_seconds=60)
        deployment.external = dict(zip(deployment.proxies, external, strict=True))
        keepers = []
        try:
            for server in external:
                await server.until_answers("/ready", 60)
            keepers = [asyncio.create_task(server.keep_running()) for server in external]
            await deployment.start()
            return await run_suite(deployment, options, lambda what, done, total: None)
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)
            await deployment.stop()
            await asyncio.gather(*(server.stop() for server in external))

    return asyncio.run(act())


def require_kept(report: Report, *skipped: str) -> None:
    assert [row.fault for row in report.rows if row.skipped] == list(skipped)
    tried = [row for row in report.rows if not row.skipped]
    assert not [breach for row in tried for breach in row.breaches], report.markdown()
    for row in tried:
        assert row.injected and row.control, f"{row.fault}: proved when aimed, not proved when aimed at nothing"


def test_a_fleet_of_both_kinds_of_endpoints(tmp_path: Path, checkpoint: Path) -> None:
    faults = ("kill", "hang", "reset", "drain", "gateway-kill")
    # Long enough that most are in the midst of their answer whenever a gateway is killed.
    options = msgspec.structs.replace(SHORT, faults=faults, max_tokens=256)
    report = run(tmp_path, checkpoint, options, replicas=1, servers=1, gateways=2)
    require_kept(report)
    kill, hang, reset, _drain, gateway = report.rows
    assert [row.fault for row in report.rows] == list(faults)
    assert kill.detection is not None and kill.recovery is not None
    assert hang.detection is not None, "it was seen not ready"
    for row in (kill, hang, reset):
        assert row.tally.completed == row.tally.offered >= 8
    assert gateway.tally.resumed, "clients that lost their gateway went on at the other one"


@pytest.mark.full_faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("replicas", "servers"), [(3, 0), (0, 2)])
def test_every_fault(tmp_path: Path, checkpoint: Path, replicas: int, servers: int) -> None:
    options = msgspec.structs.replace(SHORT, kills=3, window=None, settle_seconds=30.0)
    report = run(tmp_path, checkpoint, options, replicas=replicas, servers=servers, gateways=2)
    links = ("reset", "cut", "partition", "partition-replies", "delay", "throttle")
    require_kept(report, *(("child", *links) if replicas else ("kill-twice",)))
