"""`shoal generate` with a real engine: answers in order, bad lines, interruption."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from shoal.checkpoint.tokenizer import load_tokenizer
from tests.cli.conftest import SHOAL, run_shoal

GREEDY = {"temperature": 0, "ignore_eos": True}


def write(path: Path, requests: list[Any]) -> Path:
    """Strings go in as they are."""
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in requests), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def generate(checkpoint: Path, source: Path, target: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return run_shoal(["generate", checkpoint, "--input", source, "--output", target, *more])


def test_answers_in_order_and_bad_lines_among_them(tmp_path: Path, checkpoint: Path) -> None:
    source = write(
        tmp_path / "in.jsonl",
        [
            {"prompt": "a shoal of fish", "max_tokens": 40, "id": "long", **GREEDY},
            {"messages": [{"role": "user", "content": "who gives the order?"}], "max_tokens": 3, "id": 7, **GREEDY},
            "\n",
            "{not json}\n",
            {"prompt": [5, 6, 7], "max_tokens": 4, "logprobs": 1, "seed": 1},
            {"prompt": "many", "n": 2, "max_tokens": 2, "seed": 3},
            {"prompt": "x", "max_token": 3, "id": "typo"},
            {"prompt": "x", "messages": []},
            {"max_tokens": 2},
            {"prompt": "x", "temperature": -1},
            {"prompt": ["x", "y"]},
            {"prompt": "x", "guided_regex": "("},
            {"prompt": "default length", **GREEDY},
        ],
    )
    target = tmp_path / "out.jsonl"
    done = generate(checkpoint, source, target, "--max-tokens", 5, "--block-size", 16, "--kv-cache-memory", "16MiB")
    assert done.returncode == 0, done.stderr
    answers = read(target)
    assert [answer["line"] for answer in answers] == [1, 2, *range(4, 14)]
    assert [answer["finish_reason"] for answer in answers if "finish_reason" in answer] == ["length"] * 4
    assert [len(answers[i]["token_ids"]) for i in (0, 1, 3, 11)] == [40, 3, 4, 5]
    assert (answers[0]["id"], answers[1]["id"]) == ("long", 7)
    assert answers[0]["usage"]["completion_tokens"] == 40
    assert answers[0]["text"] == load_tokenizer(checkpoint).decode(answers[0]["token_ids"])
    assert len(answers[3]["logprobs"]["token_logprobs"]) == 4
    assert [len(choice["token_ids"]) for choice in answers[4]["choices"]] == [2, 2]
    messages = [answer["error"]["message"] for answer in answers if "error" in answer]
    for message, part in zip(
        messages,
        [
            "not valid JSON",
            "did you mean 'max_tokens'",
            "messages or prompt, not both",
            "add one of them",
            "temperature",
            "2 prompts",
            "regex",
        ],
        strict=True,
    ):
        assert part in message
    assert "7 of them are errors" in done.stderr
    assert done.stdout == ""


def test_what_was_interrupted_goes_on(tmp_path: Path, checkpoint: Path) -> None:
    requests = [{"prompt": f"fish number {n}", "max_tokens": 120 + 40 * (n % 5), **GREEDY} for n in range(60)]
    source = write(tmp_path / "in.jsonl", requests)
    target = tmp_path / "out.jsonl"
    command = [*SHOAL, "generate", str(checkpoint), "-i", str(source), "-o", str(target), "--max-num-seqs", "1"]

    def interrupt(number: int, at_least: int) -> tuple[int, str]:
        """End the command with a signal once so many answers are there."""
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL) as process:
            while process.poll() is None and (not target.exists() or target.read_bytes().count(b"\n") < at_least):
                time.sleep(0.005)
            assert process.poll() is None, "it ended before it could be interrupted"
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    status, errors = interrupt(signal.SIGINT, 2)
    assert status == 130
    first = target.read_bytes()
    assert f"{len(first.splitlines())} of 60 answers are in" in errors
    status, _ = interrupt(signal.SIGKILL, len(first.splitlines()) + 2)
    assert status == -signal.SIGKILL
    second = target.read_bytes()
    assert second.startswith(first)
    target.write_bytes(second[:-7])  # a torn line, wherever the kill fell
    finished = generate(checkpoint, source, target)
    assert finished.returncode == 0, finished.stderr
    assert "of 60 answers are there already" in finished.stderr
    assert target.read_bytes().startswith(first)
    whole = read(target)
    assert [answer["line"] for answer in whole] == list(range(1, 61))
    # Greedy answers do not depend on where the run was cut.
    assert [len(answer["token_ids"]) for answer in whole] == [request["max_tokens"] for request in requests]
    at_once = tmp_path / "at_once.jsonl"
    assert generate(checkpoint, source, at_once).returncode == 0
    assert [answer["token_ids"] for answer in read(at_once)] == [answer["token_ids"] for answer in whole]


def test_nothing_left_to_do_starts_no_engine(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [])
    done = run_shoal(["generate", "no-such-model", "-i", source, "-o", tmp_path / "out.jsonl"])
    assert done.returncode == 0
    assert "all 0 answers are there already" in done.stderr


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("in.jsonl", "in.jsonl"), "is the input"),
        (("none.jsonl", "out.jsonl"), "none.jsonl: No such file"),
        (("in.jsonl", "none/out.jsonl"), "out.jsonl: No such file"),
        (("in.jsonl", "."), "is not a file"),
        ((".", "out.jsonl"), "Is a directory"),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, names: tuple[str, str], message: str) -> None:
    write(tmp_path / "in.jsonl", [{"prompt": "x"}])
    done = run_shoal(["generate", "smollm2-135m", "-i", tmp_path / names[0], "-o", tmp_path / names[1]])
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_force_keeps_the_old_answers_until_there_are_new_ones(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "x"}])
    target = tmp_path / "out.jsonl"
    target.write_text("precious\n")
    done = run_shoal(["generate", "no-such-model", "-i", source, "-o", target, "--force"])
    assert done.returncode == 1
    assert target.read_text() == "precious\n"
