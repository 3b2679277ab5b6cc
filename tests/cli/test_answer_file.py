"""The output file of `shoal generate`: whatever a crash left of it, it goes on from the last whole answer."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.cli.answer_file import AnswerFile
from shoal.cli.errors import CommandError

REQUESTS = [(number, f"digest-{number}") for number in (1, 2, 4, 7)]


def answer(number: int, digest: str) -> bytes:
    return b'{"line":%d,"request":"%s","text":"caf\xc3\xa9"}\n' % (number, digest.encode())


WHOLE = b"".join(answer(*request) for request in REQUESTS)


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, len(WHOLE)), torn=st.sampled_from([b"", b"\x00\x00", b"{", b"garbage\n"]))
def test_any_cut_is_repaired(cut: int, torn: bytes) -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "answers.jsonl"
        path.write_bytes(WHOLE[:cut] + torn)
        with AnswerFile(path, fresh=False) as file:
            kept = file.resume(REQUESTS)
            for request in REQUESTS[kept:]:
                file.append(answer(*request))
        assert kept <= WHOLE[:cut].count(b"\n")
        assert kept == WHOLE[:cut].count(b"\n") or torn
        assert path.read_bytes() == (WHOLE if kept < len(REQUESTS) else WHOLE[:cut] + torn)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (answer(1, "other"), "line 1 answers another request"),
        (answer(2, "digest-2"), "line 1 answers another request"),
        (b"not an answer\n" + answer(1, "digest-1"), "line 1 is not an answer"),
        (b'{"text":"x"}\n' + WHOLE, "line 1 is not an answer"),
        (WHOLE + answer(9, "digest-9"), "more answers than there are requests (4)"),
    ],
)
def test_a_file_of_another_run_is_left_alone(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with AnswerFile(path, fresh=False) as file, pytest.raises(CommandError) as caught:
        file.resume(REQUESTS)
    assert reason in str(caught.value)
    assert "--force" in str(caught.value)
    assert path.read_bytes() == content


def test_fresh_drops_the_old_answers_with_the_first_new_one(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(WHOLE)
    with AnswerFile(path, fresh=True) as file:
        assert file.resume(REQUESTS) == 0
        assert path.read_bytes() == WHOLE
        file.append(answer(1, "digest-1"))
    assert path.read_bytes() == answer(1, "digest-1")


def test_an_answer_is_there_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, fresh=False) as file:
        file.resume(REQUESTS)
        file.append(answer(*REQUESTS[0]))
        assert path.read_bytes() == answer(*REQUESTS[0])


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, fresh=False), pytest.raises(CommandError, match="written by another process"):
        AnswerFile(path, fresh=False)
    AnswerFile(path, fresh=False).__exit__()


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="is not a file"):
        AnswerFile(tmp_path, fresh=False)
