"""Scripts that were exported, run with programs that only write down what they were asked for."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

_RECORDER = (
    f"#!{sys.executable}\n"
    + """\
import json, os, sys
kept = {k: v for k, v in os.environ.items() if k.endswith("_DEVICES") or k.startswith("VLLM_") or k == "START_RANK"}
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:], kept]) + "\\n")
"""
)


def record(directory: Path, script: str, *arguments: str, programs: tuple[str, ...], **variables: str) -> list[list]:
    """Every call of the programs: their words, and last the variables that they saw."""
    tools = directory / "tools"
    tools.mkdir(exist_ok=True)
    for program in programs:
        path = tools / program
        path.write_text(_RECORDER)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    file, log = directory / "script.sh", directory / "record"
    file.write_text(script)
    log.write_text("")
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "RECORD": str(log), **variables}
    done = subprocess.run(
        ["bash", str(file), *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in log.read_text().splitlines()]


def flags(words: list[str]) -> dict[str, str]:
    """--flag: value; of a flag without one, the empty string."""
    found: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if isinstance(word, str) and word.startswith("--"):
            found[word] = following if isinstance(following, str) and not following.startswith("--") else ""
    return found
