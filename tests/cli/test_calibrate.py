"""`shoal calibrate` with a real engine on a tiny checkpoint: its files serve the cost model and the catalogue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.core.cost.calibration import decode
from shoal.plan.catalogue import cluster
from tests.cli.conftest import run_shoal


def test_files_are_written_that_others_read(tmp_path: Path, checkpoint: Path) -> None:
    output, hardware = tmp_path / "calibration.json", tmp_path / "own" / "machine.yaml"
    done = run_shoal(
        ["calibrate", checkpoint, "--device", "cpu", "--quick", "--rounds", 1, "--tensor-parallel-size", 1]
        + ["--output", output, "--hardware", hardware, "--json"]
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    calibration = decode(output.read_bytes())
    assert calibration.device == report["device"]["name"] and calibration.provenance == "calibrated"
    assert calibration.residuals["step"].rows == len(report["outcome"]["steps"]) == 13
    assert calibration.made["command"].startswith("shoal calibrate")
    assert cluster(calibration.device, files=[hardware]).device.memory_bandwidth > 0
    assert report["files"] == [str(output), str(hardware)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensor-parallel-size", "two"], "is no list of numbers"),
        (["--tensor-parallel-size", "0"], "the least is 1"),
        (["--tensor-parallel-size", "4096"], "4096"),
        (["--output", "/no/such/directory/file.json"], "there is no directory"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(checkpoint: Path, arguments: list[str], message: str) -> None:
    done = run_shoal(["calibrate", checkpoint, "--device", "cpu", "--quick", *arguments])
    assert done.returncode in (1, 2)
    assert message in done.stderr and "Traceback" not in done.stderr
