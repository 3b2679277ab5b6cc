"""Every edit of a log is found, and the untouched log is genuine."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.serve.audit.chain import Head, chains, checkpoint_files, decode_link, segments
from shoal.serve.audit.note import AuditError, PublicKey, SigningKey
from shoal.serve.audit.verify import ChainReport, Expectation, Report, verify_directory
from tests.serve.audit.logs import completed, lines_of, open_log

edits = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of three processes, in several files, with checkpoints in the midst of them and a copy of those."""
    directory = tmp_path_factory.mktemp("audit") / "log"
    number = 0
    for _ in range(3):
        log = open_log(directory, checkpoint_records=7, rotate_bytes=2500, copy_to=str(directory.parent / "copy"))
        for _ in range(16):
            number += 1
            log.record(completed(number), prompt=[number])
        assert log.close()
    assert len(segments(chains(directory)[0])) >= 5
    return directory


class Workbench:
    """A log that may be edited: its lines, each with the file that it is in."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (self.chain,) = chains(directory)
        self.files = segments(self.chain)
        self.lines = [line for path in self.files for line in path.read_bytes().splitlines(keepends=True)]
        self._counts = [len(path.read_bytes().splitlines()) for path in self.files]

    def write(self, lines: list[bytes]) -> None:
        """Lines in place of those that were there; what is added or missing is so in the last file."""
        start = 0
        for path, count in zip(self.files, self._counts, strict=True):
            end = len(lines) if path == self.files[-1] else start + count
            path.write_bytes(b"".join(lines[start:end]))
            start += count

    def verify(self, **arguments: object) -> Report:
        return verify_directory(self.directory, **arguments)  # type: ignore[arg-type]


@contextmanager
def workbench(genuine: Path) -> Iterator[Workbench]:
    with TemporaryDirectory() as folder:
        shutil.copytree(genuine, Path(folder) / "log")
        yield Workbench(Path(folder) / "log")


def found(report: Report) -> ChainReport:
    """The only chain's, after an edit."""
    (chain,) = report.chains
    assert not report.ok and not chain.ok and chain.problem
    return chain


def test_the_untouched_log_is_genuine(genuine: Path) -> None:
    report = verify_directory(genuine, copy=genuine.parent / "copy")
    (chain,) = report.chains
    assert report.ok and chain.ok, chain.problem
    assert chain.records == len(lines_of(genuine)) == 3 * 18
    assert (chain.unsigned, chain.runs, chain.crashes, chain.gaps, chain.live) == (0, 3, 0, 0, False)
    assert chain.checkpoints >= 6 and chain.copied >= chain.checkpoints


def test_the_last_checkpoint_is_missed(genuine: Path) -> None:
    with workbench(genuine) as bench:
        path = checkpoint_files(bench.chain)[-1]
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-9]))
        assert found(bench.verify()).problem == "the checkpoint of the orderly end is missing"


@edits
@given(data=st.data())
def test_a_changed_byte(genuine: Path, data: st.DataObject) -> None:
    with workbench(genuine) as bench:
        index = data.draw(st.integers(0, len(bench.lines) - 1))
        line = bytearray(bench.lines[index])
        line[data.draw(st.integers(0, len(line) - 1))] ^= data.draw(st.integers(1, 255))
        bench.write([*bench.lines[:index], bytes(line), *bench.lines[index + 1 :]])
        assert found(bench.verify()).record == index


@edits
@given(data=st.data())
def test_removed_records(genuine: Path, data: st.DataObject) -> None:
    with workbench(genuine) as bench:
        first = data.draw(st.integers(0, len(bench.lines) - 1))
        last = data.draw(st.integers(first, min(first + 8, len(bench.lines) - 1)))
        bench.write(bench.lines[:first] + bench.lines[last + 1 :])
        assert found(bench.verify()).record == first


@edits
@given(data=st.data())
def test_a_log_that_was_cut(genuine: Path, data: st.DataObject) -> None:
    with workbench(genuine) as bench:
        size = sum(map(len, bench.lines))
        left = data.draw(st.integers(0, size - 1))
        kept = b"".join(bench.lines)[:left]
        bench.write(kept.splitlines(keepends=True))
        assert found(bench.verify()).record == kept.count(b"\n")


@edits
@given(data=st.data())
def test_exchanged_records(genuine: Path, data: st.DataObject) -> None:
    with workbench(genuine) as bench:
        first = data.draw(st.integers(0, len(bench.lines) - 2))
        second = data.draw(st.integers(first + 1, len(bench.lines) - 1))
        lines = list(bench.lines)
        lines[first], lines[second] = lines[second], lines[first]
        bench.write(lines)
        assert found(bench.verify()).record == first


@edits
@given(data=st.data())
def test_a_record_put_in(genuine: Path, data: st.DataObject) -> None:
    """One from elsewhere in the log, arbitrary bytes, or one that follows as it should."""
    with workbench(genuine) as bench:
        index = data.draw(st.integers(0, len(bench.lines)))
        forged = Head()
        for line in bench.lines[:index]:
            forged.append(line[:-1])
        kind = data.draw(st.sampled_from(["log_started", "log_stopped", "request_completed", "endpoint_lost"]))
        follows = forged.line(1, b'{"kind":"%s"}' % kind.encode())
        inserted = data.draw(st.sampled_from([*bench.lines, b"\n"]) | st.just(follows) | st.binary(min_size=1))
        bench.write([*bench.lines[:index], inserted, *bench.lines[index:]])
        assert found(bench.verify()).record in (index, index + 1)


@edits
@given(data=st.data())
def test_an_end_that_was_written_anew(genuine: Path, data: st.DataObject) -> None:
    """With links as they should be: only what was signed gives it away."""
    with workbench(genuine) as bench:
        first = data.draw(st.integers(0, len(bench.lines) - 1))
        head = Head()
        for line in bench.lines[:first]:
            head.append(line[:-1])
        forged = [head.line(1, b'{"kind":"request_completed","n":%d}' % number) for number in range(first, 54)]
        bench.write(bench.lines[:first] + forged)
        record = found(bench.verify()).record
        assert record is not None and record <= first < record + 7, "named to within one checkpoint"


@edits
@given(data=st.data())
def test_a_changed_checkpoint(genuine: Path, data: st.DataObject) -> None:
    with workbench(genuine) as bench:
        path = data.draw(st.sampled_from(checkpoint_files(bench.chain)))
        notes = bytearray(path.read_bytes())
        notes[data.draw(st.integers(0, len(notes) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(notes)
        assert found(bench.verify()).file == path.name


@pytest.mark.parametrize("index", range(5))
def test_a_removed_file(genuine: Path, index: int) -> None:
    with workbench(genuine) as bench:
        record = decode_link(bench.files[index].read_bytes().splitlines()[0]).seq
        bench.files[index].unlink()
        assert found(bench.verify()).record == record


def test_a_record_moved_to_the_next_file(genuine: Path) -> None:
    with workbench(genuine) as bench:
        first, second = (path.read_bytes().splitlines(keepends=True) for path in bench.files[:2])
        bench.files[0].write_bytes(b"".join(first[:-1]))
        bench.files[1].write_bytes(first[-1] + b"".join(second))
        assert "moved between files" in str(found(bench.verify()).problem)


@pytest.mark.parametrize("theft", ["nothing", "copied", "moved"])
def test_a_process_that_never_was(genuine: Path, theft: str) -> None:
    """A file after the last one, which follows as it should: even with a checkpoint of its size from elsewhere."""
    with workbench(genuine) as bench:
        head = Head()
        for line in bench.lines:
            head.append(line[:-1])
        stem = f"{head.size:012d}-20990101T000000Z-1"
        forged = [head.line(1, b'{"kind":"log_started"}'), head.line(2, b'{"kind":"request_completed"}')]
        (bench.chain / f"{stem}.jsonl").write_bytes(b"".join(forged))
        last = checkpoint_files(bench.chain)[-1]
        lines = last.read_bytes().splitlines(keepends=True)
        if theft != "nothing":
            (bench.chain / f"{stem}.checkpoints").write_bytes(b"".join(lines[-9:]))
        if theft == "moved":
            last.write_bytes(b"".join(lines[:-9]))
        assert ("was moved here" if theft != "nothing" else "record 54 was put in") in str(
            found(bench.verify()).problem
        )


def test_a_file_that_is_none_of_the_log(genuine: Path) -> None:
    with workbench(genuine) as bench:
        (bench.chain / "zzz.jsonl").write_bytes(b"")
        assert "zzz.jsonl is no file of an audit log" in str(found(bench.verify()).problem)


def test_everything_signed_by_someone_else(genuine: Path, tmp_path: Path) -> None:
    """Who can write everything can make another log, with another key: --public-key is against that."""
    other = open_log(tmp_path)
    other.record(completed(1))
    assert other.close()
    assert verify_directory(tmp_path).ok
    (public,) = genuine.glob("*.pub")
    (chain,) = verify_directory(tmp_path, keys=[PublicKey.parse(public.read_text())]).chains
    assert not chain.ok and "none of the given keys" in str(chain.problem)


def test_a_log_made_anew_does_not_have_the_key_of_the_copy(genuine: Path, tmp_path: Path) -> None:
    other = open_log(tmp_path)
    other.record(completed(1))
    assert other.close()
    (chain,) = verify_directory(tmp_path, copy=genuine.parent / "copy").chains
    assert not chain.ok and "none of the given keys" in str(chain.problem)


# --- log and checkpoints put back together ----------------------------------------------------------------------------


def rolled_back(bench: Workbench) -> int:
    """To the state of an earlier checkpoint, files and checkpoints alike; its size."""
    first, *others = checkpoint_files(bench.chain)
    notes = first.read_bytes().splitlines(keepends=True)
    first.write_bytes(b"".join(notes[:18]))
    size = int(notes[10])
    for path in others:
        path.unlink()
    bench.write(bench.lines[:size])
    for file in bench.files:
        if not file.stat().st_size:
            file.unlink()
    return size


def test_a_log_put_back_is_found_with_the_copy_or_a_noted_root(genuine: Path) -> None:
    (chain,) = verify_directory(genuine).chains
    noted = Expectation.parse(chain.expect)
    with workbench(genuine) as bench:
        size = rolled_back(bench)
        assert bench.verify().ok, "nothing that is left there can tell"
        assert found(bench.verify(copy=genuine.parent / "copy")).record == size
        assert found(bench.verify(expected=[(None, noted)])).record == size
    assert verify_directory(genuine, expected=[(None, noted)], copy=genuine.parent / "copy").ok


def test_a_noted_root_of_another_log(genuine: Path) -> None:
    (report,) = verify_directory(genuine, expected=[(None, Expectation(20, bytes(32)))]).chains
    assert not report.ok and report.record is not None and report.record < 20


@pytest.mark.parametrize("text", ["", "12", "12:abc", "x:" + "00" * 32, "12:" + "00" * 31])
def test_an_expectation_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not SIZE:ROOT"):
        Expectation.parse(text)


def test_a_removed_chain_is_missed(genuine: Path, tmp_path: Path) -> None:
    """By the copy, and by the other chains of the directory."""
    first, second = open_log(tmp_path / "log", copy_to=str(tmp_path / "copy")), None
    try:
        assert first.flush()
        first.record(completed(1))
        second = open_log(tmp_path / "log", copy_to=str(tmp_path / "copy"))
    finally:
        assert first.close() and (second is None or second.close())
    assert verify_directory(tmp_path / "log", copy=tmp_path / "copy").ok
    shutil.rmtree(first.chain)
    assert verify_directory(tmp_path / "log").problems == [
        f"{first.chain.name} is missing: {second.chain.name} says that it had 1 records"
    ]
    assert f"{first.chain.name} is missing: the copy has checkpoints of it" in (
        verify_directory(tmp_path / "log", copy=tmp_path / "copy").problems
    )


# --- what is no edit --------------------------------------------------------------------------------------------------


def test_old_files_may_be_removed_if_that_is_said(genuine: Path) -> None:
    with workbench(genuine) as bench:
        kept = decode_link(bench.files[2].read_bytes().splitlines()[0]).seq
        for path in bench.files[:2] + checkpoint_files(bench.chain)[:2]:
            path.unlink()
        assert f"--retained-from {kept}" in str(found(bench.verify()).problem)
        report = bench.verify(retained_from=kept)
        assert report.ok and report.chains[0].first == kept
        lines = bench.files[3].read_bytes().splitlines(keepends=True)
        bench.files[3].write_bytes(lines[0].replace(b"acme", b"acne") + b"".join(lines[1:]))
        assert found(bench.verify(retained_from=kept)).record == decode_link(lines[0]).seq


def test_a_log_that_is_being_written(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    assert log.flush()
    for number in range(20):
        log.record(completed(number))
    assert log.flush()
    (report,) = verify_directory(tmp_path).chains
    assert report.ok and report.live and report.records == 21 and report.unsigned > 0
    assert report.crashes == 0
    with segments(log.chain)[-1].open("ab") as file:
        file.write(b'{"seq":21,"ti')  # as a reader may see a write that is under way
    assert verify_directory(tmp_path).ok
    log.close()


def test_nothing_to_verify(tmp_path: Path, genuine: Path) -> None:
    with pytest.raises(AuditError, match="no audit log here"):
        verify_directory(tmp_path)
    with pytest.raises(AuditError, match="no copy of this log's checkpoints here"):
        verify_directory(genuine, copy=tmp_path)
    (tmp_path / "chain-00000000").mkdir()
    with pytest.raises(AuditError, match="no public key"):
        verify_directory(tmp_path)
    key = SigningKey.load_or_create(tmp_path / "k").public
    (report,) = verify_directory(tmp_path, keys=[key]).chains
    assert report.problem == "there is no signed checkpoint"


@pytest.mark.parametrize("change", [lambda text: text[:-9], lambda text: "x" + text])
def test_a_broken_public_key(genuine: Path, change: Callable[[str], str]) -> None:
    with workbench(genuine) as bench:
        (public,) = bench.directory.glob("*.pub")
        public.write_text(change(public.read_text()))
        with pytest.raises(AuditError, match="a public key there is not one"):
            bench.verify()
