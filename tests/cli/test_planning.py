"""`shoal plan` and `shoal explain` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from shoal.cli import main
from shoal.config import load_config
from shoal.plan.planner import Plan
from shoal.serve.deployment import Deployment

CHAT = ["--rate", "1/s", "--input", "1000", "--output", "200", "--ttft-p99", "2s", "--itl-p99", "60ms"]
SMALL = ["plan", "llama-3.1-8b", "--on", "8xH100", *CHAT]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_a_plan_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, *SMALL)
    assert status == 0
    assert "tp1 on 1 x H100-SXM" in out
    for title in ("Is distribution needed?", "Answer", "Predicted", "Why not"):
        assert title in out


def test_a_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, *SMALL, "--json")
    found = msgspec.json.decode(out, type=Plan)
    assert status == 0 and found.answer is not None and found.answer.setup.devices == 1


def test_a_plan_as_a_page_and_a_deployment(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page, file = tmp_path / "plan.html", tmp_path / "deployment.yaml"
    status, _, err = run(capsys, *SMALL, "--html", page, "--write", file)
    assert status == 0 and str(page) in err.replace("\n", "") and page.read_text().startswith("<!doctype html>")
    (model,) = load_config(Deployment, file, {}).models
    assert (model.name, model.model, model.dtype) == ("llama-3.1-8b", "meta-llama/Llama-3.1-8B", "bfloat16")


def test_an_impossible_goal_is_exit_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "plan", "llama-3.1-405b", "--on", "8xH100", *CHAT)
    assert status == 1 and "memory: llama-3.1-405b" in out and "at least" in out


def test_a_trace_gives_rate_and_lengths(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{number * 0.5},{900 + number},200\n" for number in range(100))
    trace.write_text("arrival_time_s,input_toks,output_toks\n" + rows)
    status, out, _ = run(
        capsys, "plan", "llama-3.1-8b", "--on", "H100", "--trace", trace, "--itl-p99", "60ms", "--json"
    )
    asked = json.loads(out)["asked"]
    assert status == 0 and asked["rate"] == pytest.approx(2.0) and asked["input"] == pytest.approx(949.5)


def test_a_price_and_a_precision_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, *SMALL, "--price", "$1.50/h", "--precision", "int8,bfloat16", "--json")
    answer = json.loads(out)["answer"]["setup"]
    assert answer["dollars_per_hour"] == pytest.approx(1.5)
    assert answer["pools"][0]["engine"]["weights"] in ("int8", "bfloat16")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["plan", "llama-3.1-9b", "--on", "H100", *CHAT], 2, "llama-3.1-8b"),
        (["plan", "llama-3.1-8b", "--on", "8xH1000", *CHAT], 2, "H100"),
        (["plan", "llama-3.1-8b", *CHAT], 2, "--on 8xH100"),
        (["plan"], 2, "--list models"),
        (["plan", "llama-3.1-8b", "--on", "H100", "--rate", "1/s"], 2, "--input is missing"),
        (["plan", "llama-3.1-8b", "--on", "H100", "--rate", "20/fortnight"], 2, "'20/fortnight' is not a rate"),
        ([*SMALL, "--tpot", "500"], 2, "500ms or 0.5s"),
        ([*SMALL, "--survive", "2 racks"], 2, "1gpu, 1node or none"),
        ([*SMALL, "--precision", "fp8"], 2, "the nearest is float8"),
        ([*SMALL, "--survive", "1node"], 2, "needs two nodes"),
        ([*SMALL, "--trace", "missing.csv"], 2, "--input and --trace both"),
        ([*SMALL, "--precision", "float8", "--write", "x.yaml"], 1, "plan with --precision int8"),
        ([*SMALL, "--memory-share", "0%"], 2, "above 0 and at most 100%"),
        ([*SMALL, "--engine", "vlm"], 2, "'--engine': 'vlm' is not one of"),
        (["explain", "llama-3.1-8b", "--on", "H100", "--context", "0"], 2, "--context is 0: llama-3.1-8b takes 1 to"),
        (["explain", "llama-3.1-8b", "--on", "H100", "--prompt", "1m"], 2, "1 to 131,072 tokens"),
        (["explain", "llama-3.1-8b", "--on", "H100", "--layout", "tp0"], 2, "tp4, tp8xpp2"),
        (["explain", "llama-3.1-8b", "--on", "H100", "--layout", "tp2"], 2, "2 GPUs"),
        (["explain", "llama-3.1-8b", "--on", "8x8xH100:ndr", "--layout", "tp64"], 2, "the model has 32"),
    ],
)
def test_mistakes_are_said_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (status, "")
    assert message in err and "Traceback" not in err and len(err.splitlines()) == 1


def test_explain_for_people_and_machines(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["explain", "llama-3.1-70b", "--on", "8xH100", "--layout", "tp4", "--batch", "8", "--context", "4k"]
    status, out, _ = run(capsys, *line)
    assert status == 0 and "Memory of a GPU" in out and "Where the limit is" in out
    status, out, _ = run(capsys, *line, "--json")
    assert status == 0 and json.loads(out)["devices"] == 4


@pytest.mark.parametrize(("what", "name"), [("models", "deepseek-v3"), ("devices", "H100-SXM")])
def test_what_is_known_is_listed(capsys: pytest.CaptureFixture[str], what: str, name: str) -> None:
    status, out, _ = run(capsys, "plan", "--list", what)
    assert status == 0 and name in out
    status, out, _ = run(capsys, "plan", "--list", what, "--json")
    assert name in {one["name"] for one in json.loads(out)}


def test_a_calibration_of_the_device_is_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps({"device": "H100-SXM", "factors": {"linear": 2.0}}))
    seconds = []
    for more in ([], ["--calibration", file]):
        _, out, _ = run(capsys, "explain", "llama-3.1-8b", "--on", "H100", "--json", *more)
        seconds.append(json.loads(out)["steps"][0]["seconds"])
    assert seconds[1] > 1.5 * seconds[0]
    file.write_text('{"factors": {"linear": -1}}')
    status, _, err = run(capsys, "explain", "llama-3.1-8b", "--on", "H100", "--calibration", file)
    assert status == 1 and "factors.linear" in err
    file.write_text(json.dumps({"device": "A100-SXM"}))
    status, _, err = run(capsys, "explain", "llama-3.1-8b", "--on", "H100", "--calibration", file)
    assert status == 1 and "measured on A100-SXM, and --on has H100-SXM" in " ".join(err.split())
