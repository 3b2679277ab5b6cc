"""`shoal bench faults` as a person types it. What it does is tested in tests/faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.bench.faults.catalogue import KINDS
from shoal.cli import main


def test_faults_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "faults", "--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [kind.name for kind in KINDS]
    assert len(set(listed)) == len(listed)


@pytest.mark.parametrize(
    ("content", "flags", "status", "said"),
    [
        (None, [], 1, "cannot be read"),
        ("models: 3", [], 1, "has no list `models`"),
        ("models: []", ["--faults", "kil"], 1, "there is no fault 'kil'; there are kill, "),
    ],
)
def test_mistakes_are_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, flags: list[str], status: int, said: str
) -> None:
    file = tmp_path / "fleet.yaml"
    if content is not None:
        file.write_text(content)
    assert main(["bench", "faults", "--deployment", str(file), *flags]) == status
    written = capsys.readouterr()
    assert said in written.err and written.err.count("\n") == 1
    assert written.out == ""


def test_a_deployment_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "faults"]) == 2
    assert "--deployment" in capsys.readouterr().err
