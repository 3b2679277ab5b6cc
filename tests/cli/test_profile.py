"""`shoal profile` with a real engine on a tiny checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import run_shoal

PARTS = {"linear", "attention", "cache", "norms", "rope", "embedding", "head", "sampling"}


@pytest.mark.parametrize(
    ("phase", "batch", "step"),
    [
        ("decode", 4, "4 decode at 48"),
        ("prefill", 2, "2 x 48 tokens behind 0"),
        ("mixed", 3, "2 decode at 48 + 48 tokens behind 0"),
    ],
)
def test_a_step_of_each_kind(checkpoint: Path, phase: str, batch: int, step: str) -> None:
    done = run_shoal(
        ["profile", checkpoint, "--device", "cpu", "--phase", phase, "--batch", batch, "--input", 48, "--steps", 3]
        + ["--json"]
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rows = {row["part"]: row for row in report["rows"]}
    assert rows.keys() >= PARTS | {"gaps within", "gaps between"}
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1.0)
    assert report["step"] == step and report["profile"]["steps"] == 3
    assert rows["linear"]["bytes"] > 0 and rows["linear"]["operations"] > 0
    median, low, high = report["plain"]
    assert 0 < low <= median <= high


def test_limits_are_measured_and_the_trace_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    done = run_shoal(
        ["profile", checkpoint, "--device", "cpu", "--measure", "--steps", 2, "--input", 32, "--trace", trace]
    )
    assert done.returncode == 0, done.stderr
    assert "of the limit" in done.stdout and "(measured)" in done.stdout and "the cost model says" in done.stdout
    assert str(trace) in done.stdout
    names = {event["name"] for event in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]}
    assert {"shoal::step", "shoal::linear", "shoal::attention"} <= names


def test_a_configuration_is_enough(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoint / "config.json", tmp_path)
    done = run_shoal(
        ["profile", tmp_path, "--random-weights", "--device", "cpu", "--steps", 1, "--input", 16, "--json"]
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["made"]["weights"] == "random"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--phase", "mixed"], "--batch is 1"),
        (["--input", "40000"], "--input is 40000, and the model was made for 32768"),
        (["--trace", "/no/such/directory/trace.json"], "there is no directory"),
        (["--calibration", "/no/such/file.json"], "No such file"),
        (["--steps", "0"], "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(checkpoint: Path, arguments: list[str], message: str) -> None:
    done = run_shoal(["profile", checkpoint, "--device", "cpu", *arguments])
    assert done.returncode in (1, 2)
    assert message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
