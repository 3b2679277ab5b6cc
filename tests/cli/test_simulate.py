"""`shoal simulate` as it is typed: reports, mistakes, and the commands of its page."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.cli import FAILURE, USAGE, main

PAGE = Path(__file__).parents[2] / "docs" / "simulate.md"
FLEET = """
models:
  - name: llama-3.1-8b
    dtype: bfloat16
    replicas: 2
    max_sequences: 64
    max_batch_tokens: 2048
"""
LOAD = ["--rate", "6/s", "--input", "500", "--output", "60", "--requests", "60"]


@pytest.fixture
def fleet(tmp_path: Path) -> str:
    return written(tmp_path, FLEET)


def written(tmp_path: Path, text: str) -> str:
    file = tmp_path / "fleet.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["simulate", *arguments, "--json"]) == 0
    return msgspec.json.decode(capsys.readouterr().out)


def test_json_and_csv_agree_and_a_seed_makes_them_equal(
    fleet: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "requests.csv"
    arguments = [fleet, "--on", "8xH100", *LOAD, "--ttft", "500ms"]
    first = report(capsys, *arguments, "--requests-csv", str(file))
    assert first == report(capsys, *arguments)
    assert first != report(capsys, *arguments, "--seed", "1")
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    summary = first["summary"]
    assert len(rows) == summary["requests"] == summary["completed"] == 60
    assert sum(int(row["output_tokens"]) for row in rows) == summary["output_tokens"]
    assert max(float(row["e2e"]) for row in rows) == pytest.approx(summary["e2e"]["greatest"], abs=1e-5)
    assert first["setup"]["replicas"] == 2
    assert summary["gpus"] == 2
    assert summary["dollars"] > 0


def test_for_people(fleet: str, capsys: pytest.CaptureFixture[str]) -> None:
    fault = ["--fault", "kill,replica=0,at=3s,for=2s"]
    assert main(["simulate", fleet, "--on", "8xH100", *LOAD, *fault, "--course", "--tpot", "50ms"]) == 0
    out = capsys.readouterr().out
    for word in ("TTFT", "ITL", "TPOT", "E2E", "60 of 60 completed", "goodput", "endpoint_lost", "GPU-hours", "busy"):
        assert word in out


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = "    failover: {hedge_seconds: 1}\ntenants: {default: {concurrent_requests: 2}}\n"
    for text, notes in ((FLEET, 0), (FLEET.rstrip("\n") + "\n" + more, 2)):
        arguments = ["simulate", written(tmp_path, text), "--on", "8xH100", "--rate", "1/s", "--requests", "3"]
        assert main([*arguments, "--input", "100", "--output", "4"]) == 0
        assert capsys.readouterr().err.count("the simulation leaves out") == notes


def test_fewer_bits_are_faster_and_leave_more_room(fleet: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [fleet, "--on", "8xH100", *LOAD]
    wide = report(capsys, *arguments)
    narrow = report(capsys, *arguments, "--weights", "float8", "--cache", "float8")
    assert narrow["summary"]["tpot"]["p50"] < wide["summary"]["tpot"]["p50"]
    assert narrow["setup"]["kv_tokens"] > 2 * wide["setup"]["kv_tokens"]


def test_slower_links_make_steps_longer_where_there_are_links(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = ["--fault", "link,replica=all,at=0s,factor=20"]
    for layout, longer in (("{tp: 4}", True), ("{tp: 1}", False)):
        file = written(tmp_path, FLEET + f"    layout: {layout}\n")
        plain = report(capsys, file, "--on", "8xH100", *LOAD)["summary"]["ttft"]["p50"]
        slow = report(capsys, file, "--on", "8xH100", *LOAD, *link)["summary"]["ttft"]["p50"]
        assert (slow > 1.05 * plain) == longer
        assert longer or slow == plain


def test_scaling_is_bounded_by_what_is_there(fleet: str, capsys: pytest.CaptureFixture[str]) -> None:
    heavy = ["--rate", "60/s", "--input", "1000", "--output", "200", "--requests", "600"]
    scale = ["--scale-on", "queue", "--scale-target", "2", "--start", "5s"]
    summary = report(capsys, fleet, "--on", "4xL40S", *heavy, *scale)["summary"]
    assert summary["gpus"] == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--on", "8xH101", *LOAD], "H100"),
        (["--on", "1xH100", *LOAD], "room for 1"),
        (["--on", "8xH100"], "give a --trace, or --rate"),
        (["--on", "8xH100", "--rate", "5", "--input", "9"], "give a --trace, or --rate"),
        (["--on", "8xH100", *LOAD, "--ttft", "500"], "--ttft: '500' is not a duration"),
        (["--on", "8xH100", *LOAD, "--fault", "kill,replica=9,at=1s"], "there are 2"),
        (["--on", "8xH100", *LOAD, "--weights", "float7"], "--weights: 'float7' is none of"),
        (["--on", "8xH100", *LOAD, "--profile", "vlm"], "vllm"),
        (["--on", "8xH100", *LOAD, "--model", "other"], "has no 'other'"),
        (["--on", "8xH100", *LOAD, "--trace", "nowhere.csv"], "--input and --output are of a load without a trace"),
        (["--on", "8xH100", "--trace", "nowhere.csv"], "nowhere.csv: cannot be read"),
        (["--on", "8xH100", *LOAD, "--scale-on", "kv", "--scale-target", "3"], "at most 1"),
        (["--on", "8xH100", *LOAD, "--scale-on", "kv", "--max-replicas", "20"], "room for 8"),
        (["--on", "8xH100", *LOAD, "--scale-target", "3"], "say with --scale-on"),
        (["--on", "8xH100", *LOAD, "--max-replicas", "3"], "say with --scale-on"),
        (["--on", "8xH100", *LOAD, "--interval", "10ms"], "--interval is 10ms: it must be at least 100"),
        (["--on", "8xH100", *LOAD, "--duration", "0s"], "no request comes within --duration 0s"),
        (["--on", "8xH100", *LOAD, "--requests-csv", "nowhere/requests.csv"], "nowhere/requests.csv: No such file"),
        (["--on", "8xH100", *LOAD, "--faults", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--on", "8xL4", "--replicas", "1", *LOAD, "--weights", "float32"], "does not fit"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    fleet: str, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(["simulate", fleet, *arguments]) == FAILURE
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1


def test_piped_it_says_its_result_and_nothing_else(fleet: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", fleet, "--on", "8xH100", *LOAD, "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""  # no bar
    assert msgspec.json.decode(printed.out)["summary"]["completed"] == 60


def test_what_is_cut_short_is_said(fleet: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, out = tmp_path / "long.csv", tmp_path / "requests.csv"
    trace.write_text("time,input,output\n0,131000,500\n1,900,10\n2,140000,10\n", encoding="utf-8")
    assert main(["simulate", fleet, "--on", "8xH100", "--trace", str(trace), "--requests-csv", str(out)]) == 0
    assert "2 of 3 completed, 1 refused, 1 cut short" in capsys.readouterr().out
    rows = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    assert [(row["asked_tokens"], row["output_tokens"]) for row in rows] == [("500", "72"), ("10", "10"), ("10", "0")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"", "is empty"),
        (b"time,input,output\n0,5,nan\n", ":2: output is 'nan'"),
        (b"time,input,output\n0,5,5\n99,5,5\n", "allow it with --longest-pause 99s"),
    ],
)
def test_a_trace_that_is_wrong_is_told_alike_by_simulate_and_plan(
    fleet: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, says: str
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_bytes(content)
    messages = []
    for command, status in ((["simulate", fleet], FAILURE), (["plan", "llama-3.1-8b"], USAGE)):
        assert main([*command, "--on", "8xH100", "--trace", str(trace)]) == status
        messages.append(capsys.readouterr().err)
    assert says in messages[0] and messages[0] == messages[1]


def test_files_that_are_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, says in (
        ("models: []", "name at least one"),
        ("models: [{name: llama-3.1-8b, replica: 2}]", "replicas"),
        ("models: [{name: lama-3.1-8b}]", "llama-3.1-8b"),
        ("models: [{name: llama-3.1-8b, endpoints: [{openai: 'http://a:1'}]}]", "--replicas"),
    ):
        assert main(["simulate", written(tmp_path, text), "--on", "8xH100", *LOAD]) == FAILURE
        assert says in capsys.readouterr().err
    assert main(["simulate", str(tmp_path / "none.yaml"), "--on", "8xH100", *LOAD]) == FAILURE
    assert main(["simulate", written(tmp_path, FLEET), *LOAD]) == USAGE  # without --on
    faults = tmp_path / "faults"
    faults.write_bytes(b"\xff")
    assert main(["simulate", written(tmp_path, FLEET), "--on", "8xH100", *LOAD, "--faults", str(faults)]) == FAILURE
    assert "is not UTF-8 text" in capsys.readouterr().err
    faults.write_text("# a comment\nkill,replica=0,at=1s # another\nnonsense\n", encoding="utf-8")
    assert main(["simulate", written(tmp_path, FLEET), "--on", "8xH100", *LOAD, "--faults", str(faults)]) == FAILURE
    assert "nonsense" in capsys.readouterr().err


def test_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the files of the page, in an empty directory."""
    text = PAGE.read_text(encoding="utf-8")
    files = re.findall(r"^`([\w.-]+)`:\n\n```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert {name for name, _ in files} >= {"fleet.yaml", "faults.txt"}
    monkeypatch.chdir(tmp_path)
    for name, content in files:
        (tmp_path / name).write_text(content, encoding="utf-8")
    commands = [
        shlex.split(line.replace("\\\n", " "))
        for fence in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for line in re.split(r"(?<!\\)\n", fence)
        if line.startswith("shoal simulate")
    ]
    assert len(commands) >= 5
    for words in commands:
        assert main(words[1:]) == 0, words
