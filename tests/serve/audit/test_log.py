"""The log of a process: what it writes, what it does when it cannot, and how the next process goes on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.serve.audit import writer as writer_module
from shoal.serve.audit.chain import chains, checkpoint_files, segments
from shoal.serve.audit.events import (
    AuditGap,
    AuthenticationFailed,
    LogStarted,
    LogStopped,
    RequestAccepted,
    RequestCompleted,
    prompt_digest,
)
from shoal.serve.audit.log import AuditConfig
from shoal.serve.audit.note import AuditError
from shoal.serve.audit.verify import ChainReport, verify_directory
from tests.serve.audit.logs import completed, events_of, lines_of, open_log, records_of


def verified(directory: Path) -> ChainReport:
    report = verify_directory(directory)
    assert report.ok, report
    return report.chains[0]


def test_one_record_a_request(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    event = RequestCompleted(
        request_id="r1",
        tenant="acme",
        key_id="k1",
        model="big",
        served_model="small",
        degradation="big is down",
        endpoints=["a", "b"],
        migrations=1,
        status=200,
        finish_reasons=["stop"],
        parameters={"temperature": 0.5},
        duration_ms=12,
    )
    assert log.record(event, prompt=[1, 2, 70000])
    assert log.close() and log.state == "ok"
    assert [type(record.event) for record in records_of(tmp_path)] == [LogStarted, RequestCompleted, LogStopped]
    (written,) = events_of(tmp_path, RequestCompleted)
    digest = hashlib.sha256(struct.pack("<3I", 1, 2, 70000)).hexdigest()
    assert written == msgspec.structs.replace(event, prompt_digest=digest)
    report = verified(tmp_path)
    assert (report.records, report.unsigned, log.written, log.lost) == (3, 0, 3, 0)


def test_times_are_those_of_the_events(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for number in range(100):
        log.record(completed(number))
    assert log.close()
    records = records_of(tmp_path)
    times = [record.time for record in records]
    assert times == sorted(times)
    assert [record.seq for record in records] == list(range(102))
    assert [event.request_id for event in events_of(tmp_path, RequestCompleted)] == [f"r{n}" for n in range(100)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("none", {}),
        ("digest", {"prompt_digest": prompt_digest([4, 5])}),
        ("full", {"prompt_digest": prompt_digest([4, 5]), "prompt": [4, 5], "outputs": [[6], [7, 8]]}),
    ],
)
def test_content(tmp_path: Path, content: str, expected: dict[str, Any]) -> None:
    log = open_log(tmp_path, content=content)
    log.record(completed(1), prompt=[4, 5], outputs=[[6], [7, 8]])
    log.record(RequestAccepted(model="m"), prompt=[4, 5])
    assert log.close()
    event = json.loads(lines_of(tmp_path)[1])["event"]
    assert {key: event[key] for key in event if key in ("prompt_digest", "prompt", "outputs")} == expected
    accepted = json.loads(lines_of(tmp_path)[2])["event"]
    assert accepted.get("prompt_digest") == expected.get("prompt_digest")


def test_records_from_many_threads(tmp_path: Path) -> None:
    log = open_log(tmp_path, fsync="record", checkpoint_records=50)
    threads = [
        threading.Thread(target=lambda: [log.record(completed(number)) for number in range(100)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.close()
    assert len(events_of(tmp_path, RequestCompleted)) == 400
    assert verified(tmp_path).checkpoints >= 8


def test_checkpoints_by_number_and_by_time(tmp_path: Path) -> None:
    log = open_log(tmp_path, checkpoint_records=10, checkpoint_seconds=3600.0)
    assert log.flush()
    for number in range(25):
        log.record(completed(number))
    assert log.flush()
    report = verified(tmp_path)
    assert (report.records, report.unsigned, report.checkpoints) == (26, 5, 3), "at 1 (the start), 11, 21"
    log.close()
    quick = open_log(tmp_path / "quick", checkpoint_seconds=0.05)
    assert quick.flush()
    quick.record(completed(1))
    for _ in range(200):
        if verified(tmp_path / "quick").unsigned == 0 and verified(tmp_path / "quick").records == 2:
            break
        threading.Event().wait(0.02)
    else:
        pytest.fail("no checkpoint came of itself")
    quick.close()


# --- the next process -------------------------------------------------------------------------------------------------


def test_a_restart_continues_the_chain(tmp_path: Path) -> None:
    for run in range(4):
        log = open_log(tmp_path, rotate_bytes=1000)
        for number in range(40):
            log.record(completed(number))
        assert log.close()
        assert len(chains(tmp_path)) == 1
        assert verified(tmp_path).records == 42 * (run + 1)
    assert len(segments(chains(tmp_path)[0])) > 4, "files were rotated"
    assert verified(tmp_path).runs == 4


def test_two_processes_write_two_chains(tmp_path: Path) -> None:
    first, second = open_log(tmp_path), open_log(tmp_path)
    first.record(completed(1))
    second.record(completed(2))
    assert first.close() and second.close()
    assert first.chain != second.chain
    assert len(verify_directory(tmp_path).chains) == 2 and verify_directory(tmp_path).ok
    third = open_log(tmp_path)
    assert third.chain in (first.chain, second.chain)
    assert third.close()
    assert verify_directory(tmp_path).ok


CRASHER = """
import sys
from pathlib import Path
from tests.serve.audit.logs import completed, open_log
log = open_log(Path(sys.argv[1]), checkpoint_records=20, fsync="record")
number = 0
while True:
    for _ in range(50):
        log.record(completed(number))
        number += 1
    assert log.flush()
    print(number, flush=True)
"""


def spawn(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])


def test_a_killed_writer_loses_nothing_that_was_flushed(tmp_path: Path) -> None:
    for crash in range(3):
        with spawn(CRASHER, tmp_path) as process:
            assert process.stdout is not None
            flushed = [int(process.stdout.readline()) for _ in range(3 + crash)][-1]
            process.kill()
            assert process.wait() == -signal.SIGKILL
        log = open_log(tmp_path)
        assert log.flush()
        started = [index for index, event in enumerate(events_of(tmp_path, LogStarted, RequestCompleted))
                   if isinstance(event, LogStarted)]  # fmt: skip
        assert started[-1] - started[-2] - 1 >= flushed
        assert log.close()
    report = verified(tmp_path)
    assert (report.runs, report.crashes) == (6, 3)


@pytest.mark.parametrize("cut", [1, 40, "newline"])
def test_a_torn_record_is_cut_off_and_said_so(tmp_path: Path, cut: int | str) -> None:
    """As a kernel that died in the midst of a write leaves it."""
    log = open_log(tmp_path)
    assert log.flush()
    log.record(completed(1))
    log.record(completed(2))
    assert log.flush()
    (chain,) = chains(tmp_path)
    taken = segments(chain)[0].read_bytes(), checkpoint_files(chain)[0].read_bytes()
    log.close()
    whole, last = taken[0], taken[0].splitlines(keepends=True)[-1]
    torn = whole[:-1] if cut == "newline" else whole[: -len(last) + int(cut)]
    segments(chain)[0].write_bytes(torn)
    checkpoint_files(chain)[0].write_bytes(taken[1])
    report = verify_directory(tmp_path).chains[0]
    assert not report.ok and "record 2 is incomplete" in str(report.problem)

    again = open_log(tmp_path)
    again.record(completed(3))
    assert again.close()
    (gap,) = events_of(tmp_path, AuditGap)
    assert isinstance(gap, AuditGap) and gap.lost == 1 and "incomplete record (SHA-256" in gap.reason
    assert [event.request_id for event in events_of(tmp_path, RequestCompleted)] == ["r1", "r3"]  # type: ignore[union-attr]
    assert verified(tmp_path).lost == 1


def test_a_torn_checkpoint_is_cut_off_and_said_so(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.close()
    (path,) = checkpoint_files(log.chain)
    path.write_bytes(path.read_bytes()[:-20])
    assert not verify_directory(tmp_path).ok
    assert open_log(tmp_path).close()
    (gap,) = events_of(tmp_path, AuditGap)
    assert isinstance(gap, AuditGap) and gap.lost == 0 and ".checkpoints: cut off" in gap.reason
    assert verified(tmp_path).gaps == 1


def damage_record(chain: Path) -> None:
    path = segments(chain)[0]
    path.write_bytes(path.read_bytes().replace(b"r3", b"r4"))
    (notes,) = checkpoint_files(chain)
    notes.write_bytes(b"".join(notes.read_bytes().splitlines(keepends=True)[:8]))


def damage_checkpoint(chain: Path) -> None:
    (path,) = checkpoint_files(chain)
    path.write_bytes(path.read_bytes().replace(b"time 1", b"time 2", 1))


def cut_records(chain: Path) -> None:
    path = segments(chain)[0]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))


def remove_records(chain: Path) -> None:
    segments(chain)[0].unlink()


@pytest.mark.parametrize("damage", [damage_record, damage_checkpoint, cut_records, remove_records])
def test_a_damaged_chain_is_not_continued(tmp_path: Path, damage: Any) -> None:
    log = open_log(tmp_path)
    assert log.flush()  # so that the first checkpoint covers the start alone
    for number in range(6):
        log.record(completed(number))
    assert log.close()
    damage(log.chain)
    before = {path: path.read_bytes() for path in log.chain.iterdir()}
    again = open_log(tmp_path, fail_closed=True)
    assert again.chain != log.chain
    assert "is damaged" in again.state and again.ready and again.record(completed(7))
    assert again.close()
    assert {path: path.read_bytes() for path in log.chain.iterdir()} == before, "evidence is left as it is"
    reports = {report.chain: report for report in verify_directory(tmp_path).chains}
    assert not reports[log.chain.name].ok
    assert reports[again.chain.name].ok and reports[again.chain.name].gaps == 1


def test_a_new_key_begins_a_new_chain(tmp_path: Path) -> None:
    assert open_log(tmp_path).close()
    (tmp_path / "signing.key").unlink()
    log = open_log(tmp_path)
    assert log.state == "ok" and log.close()
    assert len(list(tmp_path.glob("*.pub"))) == len(chains(tmp_path)) == 2
    assert verify_directory(tmp_path).ok


# --- when it cannot be written ----------------------------------------------------------------------------------------


class FullDisk:
    """Takes the place of os.write in the writer: takes `room` bytes, the last write in part."""

    def __init__(self) -> None:
        self.room: int | None = None
        self.refused = 0
        self._write = os.write

    def __call__(self, descriptor: int, data: Any) -> int:
        if self.room is None:
            return self._write(descriptor, data)
        if self.room == 0:
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self._write(descriptor, bytes(data[: self.room]))
        self.room -= taken
        return taken


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    disk = FullDisk()
    monkeypatch.setattr(writer_module.os, "write", disk)
    return disk


def wait_until(condition: Any) -> None:
    """The bound is only for a test that has failed."""
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    pytest.fail("it did not come to be")


@pytest.mark.parametrize("room", [0, 1, 100, 1000])
def test_a_full_disk_is_a_gap_once_there_is_room_again(tmp_path: Path, disk: FullDisk, room: int) -> None:
    log = open_log(tmp_path, queue_records=50)
    assert log.flush()
    disk.room = room
    for number in range(80):
        log.record(completed(number))
    wait_until(lambda: disk.refused >= 2)
    assert "No space left on device" in log.state
    assert log.ready, "requests go on unless fail_closed is set"
    accepted = 80 - log.lost
    assert 50 <= accepted < 80
    disk.room = None
    assert log.flush()
    wait_until(lambda: log.state == "ok")
    log.record(completed(80))
    assert log.close()
    (gap,) = events_of(tmp_path, AuditGap)
    assert isinstance(gap, AuditGap) and gap.lost == log.lost == 80 - accepted and gap.since < gap.until
    numbers = [int(event.request_id[1:]) for event in events_of(tmp_path, RequestCompleted)]  # type: ignore[union-attr]
    assert len(numbers) == accepted + 1 and numbers == sorted(numbers), "none twice, none out of order"
    report = verified(tmp_path)
    assert (report.gaps, report.lost, report.unsigned) == (1, log.lost, 0)


def test_an_outage_without_loss_is_an_event_too(tmp_path: Path, disk: FullDisk) -> None:
    log = open_log(tmp_path)
    assert log.flush()
    disk.room = 0
    log.record(completed(1))
    wait_until(lambda: disk.refused)
    disk.room = None
    assert log.close()
    (gap,) = events_of(tmp_path, AuditGap)
    assert isinstance(gap, AuditGap) and gap.lost == 0 and "No space left" in gap.reason
    assert len(events_of(tmp_path, RequestCompleted)) == 1


def test_without_a_fault_there_is_no_gap(tmp_path: Path, disk: FullDisk) -> None:
    log = open_log(tmp_path, queue_records=50)
    for number in range(20):
        assert log.record(completed(number))
    assert log.close() and disk.refused == 0
    assert not events_of(tmp_path, AuditGap)


def test_fail_closed(tmp_path: Path, disk: FullDisk) -> None:
    log = open_log(tmp_path, fail_closed=True)
    assert log.flush() and log.ready and log.record(completed(1)) and log.flush()
    disk.room = 0
    log.record(completed(2))
    wait_until(lambda: not log.ready)
    assert not log.record(completed(3)), "written later all the same, but no reason to take a request"
    disk.room = None
    assert log.flush()
    wait_until(lambda: log.ready)
    assert log.record(completed(4)) and log.close()
    assert len(events_of(tmp_path, RequestCompleted)) == 4


def test_a_full_queue_refuses(tmp_path: Path) -> None:
    log = open_log(tmp_path, queue_records=3, fail_closed=True)
    assert log.flush()
    taken = [log.record(completed(number)) for number in range(20)]
    assert not all(taken) and log.lost > 0
    assert log.close()
    gaps: Sequence[Any] = events_of(tmp_path, AuditGap)
    assert sum(gap.lost for gap in gaps) == log.lost == 20 - len(events_of(tmp_path, RequestCompleted))
    assert not log.record(completed(99)) and not log.ready, "closed"


def test_failed_authentication_may_fill_half_the_queue(tmp_path: Path, disk: FullDisk) -> None:
    """Anyone can cause it, as fast as they can send."""
    log = open_log(tmp_path, queue_records=20)
    assert log.flush()
    disk.room = 0
    failed = AuthenticationFailed(reason="unknown", status=401)
    assert sum(log.record(failed) for _ in range(30)) == 10
    assert sum(log.record(completed(number)) for number in range(10)) == 10
    disk.room = None
    assert log.close()
    assert len(events_of(tmp_path, RequestCompleted)) == 10
    assert verified(tmp_path).lost == 20


def test_an_event_that_cannot_be_encoded_stops_nothing(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.record(completed(1, refusal="\ud800"))
    log.record(completed(2), prompt=[-1])
    log.record(completed(3))
    assert log.close()
    gaps: Sequence[Any] = events_of(tmp_path, AuditGap)
    assert sum(gap.lost for gap in gaps) == 2 and "RequestCompleted cannot be encoded" in gaps[0].reason
    assert [event.request_id for event in events_of(tmp_path, RequestCompleted)] == ["r3"]  # type: ignore[union-attr]
    verified(tmp_path)


def test_a_closed_log_on_a_full_disk_says_so(tmp_path: Path, disk: FullDisk) -> None:
    log = open_log(tmp_path)
    assert log.flush()
    disk.room = 0
    log.record(completed(1))
    assert not log.close(timeout=0.3)
    report = verify_directory(tmp_path).chains[0]
    assert report.ok and report.crashes == 1


LIMITED = """
import resource, signal, sys
from pathlib import Path
from tests.serve.audit.logs import completed, open_log
log = open_log(Path(sys.argv[1]), queue_records=100)
assert log.flush()
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
for number in range(300):
    log.record(completed(number))
assert not log.flush(1.0)
print(log.state, flush=True)
assert log.lost > 0
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
assert log.flush() and log.close()
print(log.lost)
"""


def test_a_real_limit_on_the_file(tmp_path: Path) -> None:
    """The kernel's own refusal, in the midst of a record."""
    with spawn(LIMITED, tmp_path) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    state, lost = out.splitlines()
    assert "File too large" in state
    assert verified(tmp_path).lost == int(lost) > 0


def test_a_copy_that_cannot_be_written_is_shown(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    log = open_log(tmp_path / "log", copy_to=str(copy), checkpoint_records=1)
    assert log.flush()
    log.record(completed(1))
    assert log.flush()
    assert log.state == "ok" and len(checkpoint_files(copy / log.chain.name)) == 1
    assert log.close()
    (copy / log.chain.name).rename(tmp_path / "kept")
    (copy / log.chain.name).write_text("in the way")
    log = open_log(tmp_path / "log", copy_to=str(copy))
    assert log.flush()
    wait_until(lambda: "File exists" in log.state)
    (copy / log.chain.name).unlink()
    (tmp_path / "kept").rename(copy / log.chain.name)
    log.record(completed(2))
    assert log.close() and log.state == "ok"
    assert verify_directory(tmp_path / "log", copy=copy).ok
    assert len(checkpoint_files(copy / log.chain.name)) == 2


# --- settings ---------------------------------------------------------------------------------------------------------


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AuditError, match=r"file.*the audit log cannot be opened: "):
        open_log(tmp_path / "file")
    with pytest.raises(AuditError, match=r"is the log's own directory"):
        open_log(tmp_path / "log", copy_to=str(tmp_path / "x" / ".." / "log"))


@pytest.mark.parametrize("name", ["checkpoint_records", "checkpoint_seconds", "queue_records", "rotate_bytes"])
def test_settings_that_make_no_sense(name: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=f"{name} must be more than 0, not 0"):
        msgspec.convert({"directory": "d", name: 0}, AuditConfig)


def test_a_signing_key_elsewhere(tmp_path: Path) -> None:
    log = open_log(tmp_path / "log", signing_key=str(tmp_path / "my.key"))
    assert log.close()
    assert (tmp_path / "my.key").exists() and not (tmp_path / "log" / "signing.key").exists()
    verified(tmp_path / "log")
