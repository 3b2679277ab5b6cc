"""`shoal topology` as a user starts it, and its tables over recorded hosts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console, RenderableType

from shoal.cli import main
from shoal.cli.topology import LEGEND, cluster_table, detected_table, file_text
from shoal.plan.catalogue import cluster, load
from shoal.plan.detect import detect, topology
from shoal.plan.job_nodes import Job, JobNode
from tests.plan.hosts import bridged_box, hgx_h100


@pytest.fixture(autouse=True)
def _a_plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No job, no hardware of the user who runs this."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("RAY_ADDRESS", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        monkeypatch.delenv(name, raising=False)


def shown(part: RenderableType, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([*map(str, ["topology", *arguments])])
    out, err = capsys.readouterr()
    return status, out, err


def test_this_host(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "found.yaml"
    status, out, err = run(capsys, "--write", file)
    assert (status, out) == (0, "") and f"wrote {file}" in err
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    status, out, _ = run(capsys, "--json")
    answer = json.loads(out)
    assert status == 0 and answer["topology"]["nodes"].keys() == tree["nodes"].keys()
    assert answer["detected"]["cpu"]["cores"] >= 1
    status, out, _ = run(capsys)
    assert status == 0 and f"{answer['detected']['cpu']['cores']} cores" in out
    status, out, _ = run(capsys, file, "--json")
    assert status == 0 and json.loads(out)["devices_per_node"] >= 1


def test_a_clusters_name(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "2x8xH100:ndr")
    assert status == 0
    for text in (
        "2 node(s) of 8 x H100-SXM",
        "79.6 GiB",
        "infiniband-ndr",
        "989 T operations/s",
        "datasheet:",
        "$2.99",
    ):
        assert text in out
    status, out, _ = run(capsys, "2x8xH100:ndr", "--json")
    answer = json.loads(out)
    assert answer["network"]["name"] == "infiniband-ndr" and answer["num_nodes"] == 2


def test_a_users_hardware(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("links: {slow: {kind: network, bandwidth: 1Gbit/s, latency: 1ms}}", encoding="utf-8")
    status, out, _ = run(capsys, "2x8xH100:slow", "--hardware", file, "--json")
    assert status == 0 and json.loads(out)["network"]["bandwidth"] == 125e6


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["8xH1000"], 2, "error: 8xH1000: unknown device H1000; the nearest is H100"),
        (["2x8xH100"], 2, "error: 2x8xH100: 2 nodes need a network"),
        (["absent.yaml"], 2, "error: absent.yaml: No such file"),
        (["8xH100", "--hardware", "absent.yaml"], 2, "error: absent.yaml: No such file"),
        (["8xH100", "--write", "x.yaml"], 2, "error: --write is for what was detected"),
        (["--write", "/nowhere/x.yaml"], 1, "error: /nowhere/x.yaml: No such file or directory"),
        (["--jsn"], 2, "No such option"),
    ],
)
def test_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str) -> None:
    got, out, err = run(capsys, *arguments)
    assert got == status and message in err and out == "" and "Traceback" not in err


def test_a_slurm_job_that_makes_no_sense(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[3-1]")
    status, _, err = run(capsys)
    assert status == 1 and "'3-1' is not a range of numbers" in err
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[1-3]")
    status, out, err = run(capsys)
    assert status == 0 and "slurm job : 3 node(s): gpu1, gpu2, gpu3" in out and "not one of the job's nodes" in err


def recorded(make: Any, root: Path, job: Job | None = None) -> Any:
    return detect(root, make(root), job)


def test_the_table_of_a_big_node(tmp_path: Path) -> None:
    found = recorded(hgx_h100, tmp_path, Job("slurm", "77", tuple(JobNode(f"hgx{at}") for at in range(1, 21))))
    text = shown(detected_table(found))
    lines = [line.split() for line in text.splitlines()]
    header = next(line for line in lines if line[:2] == ["GPU0", "GPU1"])
    assert header == [*(f"GPU{at}" for at in range(8)), *(f"mlx5_{at}" for at in range(9))]
    (row,) = [line for line in lines if line and line[0] == "GPU2" and "X" in line]
    assert row == ["GPU2", "NV18", "NV18", "X", *["NV18"] * 5, "NODE", "NODE", "PIX", "NODE", *["SYS"] * 5]
    assert "18 (450 GB/s)" in text and "gen5 x16" in text and "79.6 GiB" in text and LEGEND in text
    assert "infiniband NDR" in text and "roce" in text and "2 socket(s), 112 cores, 224 threads, 2048.0 GiB" in text
    assert "slurm job 77: 20 node(s): hgx1, " in text and "and 4 more" in text


def test_the_table_of_bridged_pairs(tmp_path: Path) -> None:
    text = shown(detected_table(recorded(bridged_box, tmp_path)))
    (row,) = [line.split() for line in text.splitlines() if line.startswith("GPU3")]
    assert row == ["GPU3", "SYS", "SYS", "NV12", "X"]


def test_what_was_not_seen_is_in_the_file(tmp_path: Path) -> None:
    nvml = hgx_h100(tmp_path)
    nvml.gpus[0].name = "NVIDIA T4"
    result = topology(detect(tmp_path, nvml), load())
    text = file_text(result)
    assert text.startswith("# devices of a node must be equal")
    assert yaml.safe_load(text) == result.tree


def test_names_from_outside_cannot_paint_the_terminal(tmp_path: Path) -> None:
    nvml = hgx_h100(tmp_path)
    nvml.gpus[0].name = "evil \x1b[31m[red]"
    text = shown(detected_table(detect(tmp_path, nvml)))
    assert "\x1b" not in text and "[red]" in text


def test_the_table_of_a_cluster_shows_sources() -> None:
    text = shown(cluster_table(cluster("7xH100:1g.10gb")))
    assert "H100-SXM:1g.10gb" in text and "1/7 of H100-SXM" in text and "9.96" not in text and "10.0 GiB" in text
