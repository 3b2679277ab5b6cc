"""The contract of `shoal serve --deployment`, over engines of a tiny checkpoint: no token lost, repeated or other."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import yaml

from shoal.bench.faults.report import Report
from shoal.bench.faults.suite import Options, run_faults
from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fleet")
    make_checkpoint("llama", directory / "tiny", max_position_embeddings=1024)
    model = {"name": "tiny", "model": str(directory / "tiny"), "replicas": 2, "dtype": "float32"}
    model |= {"threads": 1, "max_sequences": 8, "max_batch_tokens": 64, "kv_cache_bytes": "16MiB"}
    file = directory / "fleet.yaml"
    file.write_text(yaml.safe_dump({"models": [model]}))
    return file


def run(file: Path, *faults: str) -> Report:
    options = Options(
        version="test",
        faults=faults,
        streams=8,
        kills=1,
        requests=16,
        max_tokens=96,
        undisturbed_seconds=1.0,
        warm_seconds=0.5,
        patience=60.0,
        return_seconds=60.0,
        window=4.0,
    )
    return asyncio.run(run_faults(file, options, lambda what, done, total: None, environment=ENVIRONMENT))


def test_engines_that_are_killed_that_hang_and_that_are_drained(deployment: Path) -> None:
    report = run(deployment, "kill", "hang", "drain", "leave")
    assert [row.fault for row in report.rows if row.injected == 1 and row.control] == ["kill", "hang", "drain", "leave"]
    # How long things take is measured by benchmarks/faults.py: here other tests run at the same time.
    assert not [breach for row in report.rows for breach in row.breaches], report.markdown()
    for row in report.rows:
        assert row.tally.completed == row.tally.offered >= 8
    kill, hang, *_ = report.rows
    assert kill.detection is not None and kill.recovery is not None
    assert hang.detection is not None, "it was seen not ready"
