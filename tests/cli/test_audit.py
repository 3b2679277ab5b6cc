"""`shoal audit` as users type it: exit statuses, what is printed, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.cli import main
from shoal.serve.audit.chain import segments
from tests.serve.audit.logs import completed, open_log


@pytest.fixture
def log(tmp_path: Path) -> Path:
    directory = tmp_path / "log"
    audit = open_log(directory, copy_to=str(tmp_path / "copy"))
    for number in range(5):
        audit.record(completed(number))
    assert audit.close()
    return directory


def edit(log: Path) -> None:
    (chain,) = log.glob("chain-*")
    path = segments(chain)[0]
    path.write_bytes(path.read_bytes().replace(b'"r3"', b'"rX"'))


@pytest.mark.parametrize("command", ["verify", "export", "prove", "check"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples" in text and f"shoal audit {command}" in text


def test_verify(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "verify", str(log)]) == 0
    text = capsys.readouterr().out
    assert "genuine, 7 records" in text and "all signed" in text
    assert "--public-key" in text, "whose keys were trusted is said"
    expect = text.split("--expect ")[1].split()[0]
    (public,) = log.glob("*.pub")
    copy = log.parent / "copy"
    assert (
        main(["audit", "verify", str(log), "--public-key", str(public), "--copy", str(copy), "--expect", expect]) == 0
    )
    assert "keep a copy" not in capsys.readouterr().out
    assert main(["audit", "verify", str(log), "--expect", expect.partition(":")[2]]) == 0


def test_an_edit_is_named(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(log)
    assert main(["audit", "verify", str(log)]) == 1
    text = capsys.readouterr().out
    assert "NOT GENUINE" in text and "record 4 was changed" in text
    assert main(["audit", "verify", str(log), "--json"]) == 1
    (chain,) = json.loads(capsys.readouterr().out)["chains"]
    assert (chain["ok"], chain["record"]) == (False, 4)


def test_export(log: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["audit", "export", str(log)]) == 0
    records = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert [record["seq"] for record in records] == list(range(7))
    assert main(["audit", "export", str(log), "--format", "ocsf", "--since", "2020-01-01"]) == 0
    events = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert [event["class_uid"] for event in events] == [6002, *[6003] * 5, 6002]
    assert main(["audit", "export", str(log), "--until", "2020-01-01T00:00:00.5+02:00"]) == 0
    assert capfdbinary.readouterr().out == b""


def test_a_record_and_its_proof(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "prove", str(log), "4"]) == 0
    proof = tmp_path / "proof"
    proof.write_text(capsys.readouterr().out)
    (public,) = log.glob("*.pub")
    checking = ["audit", "check", str(proof), "--public-key", str(public)]
    assert main(checking) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["event"]["request_id"] == "r3"
    assert "proven: record 4 of chain-" in printed.err
    assert main([*checking, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["record"]["seq"] == 4
    proof.write_text(proof.read_text().replace("index 4", "index 5"))
    assert main(checking) == 1
    assert "not proven: the record is not the one that was signed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["verify", "{log}/nowhere"], 1, "nowhere: there is no audit log here"),
        (["verify", "{log}", "--expect", "12"], 1, "--expect: '12' is not SIZE:ROOT"),
        (["verify", "{log}", "--public-key", "{log}/signing.key"], 1, "is not a public key of an audit log"),
        (["verify", "{log}", "--public-key", "{log}/nowhere"], 1, "nowhere: No such file"),
        (["verify", "{log}", "--copy", "{log}"], 1, "is the log itself"),
        (["verify", "{log}", "--copy", "{log}/.."], 1, "there is no copy of this log's checkpoints here"),
        (["verify", "{log}/.."], 1, "there is no audit log here"),
        (["prove", "{log}", "99"], 1, "no checkpoint covers record 99"),
        (["prove", "{log}", "1", "--chain", "chain-x"], 1, "no directory named chain-x"),
        (["check", "{log}/signing.key"], 2, "Missing option '--public-key'"),
        (["export", "{log}", "--since", "yesterday"], 1, "--since: 'yesterday' is not a time: write 2026-11-21"),
        (["export", "{log}", "--format", "csv"], 2, "'csv' is not one of 'jsonl', 'ocsf'"),
        (["export", "{log}/.."], 1, "there is no audit log here"),
    ],
)
def test_mistakes(
    log: Path, arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", *(word.format(log=log) for word in arguments)]) == status
    errors = capsys.readouterr().err
    assert message in errors and len(errors.splitlines()) == 1
