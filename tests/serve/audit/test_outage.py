"""What the log does when it cannot be written: it counts, says so, and goes on with a gap that is on record."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shoal.serve.audit import writer as writer_module
from shoal.serve.audit.chain import checkpoint_files
from shoal.serve.audit.events import AuditGap, AuthenticationFailed, RequestCompleted
from shoal.serve.audit.verify import verify_directory
from tests.serve.audit.logs import completed, events_of, open_log, spawn, verified
from tests.serve.running import wait_until


class FullDisk:
    """Takes the place of os.write in the writer: takes `room` bytes, the last write in part."""

    def __init__(self) -> None:
        self.room: int | None = None
        self.refused = 0
        self.moves = threading.Event()
        """Writes wait for it."""
        self.moves.set()
        self._write = os.write

    def __call__(self, descriptor: int, data: Any) -> int:
        self.moves.wait()
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


@pytest.mark.parametrize("room", [0, 1, 100, 1000])
def test_a_full_disk_is_a_gap_once_there_is_room_again(tmp_path: Path, disk: FullDisk, room: int) -> None:
    log = open_log(tmp_path, queue_records=50)
    assert log.flush()
    disk.room = room
    for number in range(80):
        log.record(completed(number))
    wait_until(lambda: disk.refused >= 2, "a write to fail")
    assert "No space left on device" in log.state
    assert log.ready, "requests go on unless fail_closed is set"
    accepted = 80 - log.lost
    assert 50 <= accepted < 80
    disk.room = None
    assert log.flush()
    wait_until(lambda: log.state == "ok", "the log to be well")
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
    wait_until(lambda: disk.refused, "a write to fail")
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
    wait_until(lambda: not log.ready, "the log to fail")
    assert not log.record(completed(3)), "written later all the same, but no reason to take a request"
    disk.room = None
    assert log.flush()
    wait_until(lambda: log.ready, "the log to be well")
    assert log.record(completed(4)) and log.close()
    assert len(events_of(tmp_path, RequestCompleted)) == 4


def test_a_full_queue_refuses(tmp_path: Path, disk: FullDisk) -> None:
    log = open_log(tmp_path, queue_records=3, fail_closed=True)
    assert log.flush()
    disk.moves.clear()
    taken = [log.record(completed(number)) for number in range(20)]
    assert not all(taken) and log.lost > 0
    disk.moves.set()
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


def test_a_last_checkpoint_that_fails_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may come between the end of the log and its signature."""
    log = open_log(tmp_path)
    assert log.flush()
    sign, failures = writer_module.ChainWriter.checkpoint, []

    def checkpoint(self: writer_module.ChainWriter) -> None:
        if len(failures) < 2:
            failures.append(1)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sign(self)

    monkeypatch.setattr(writer_module.ChainWriter, "checkpoint", checkpoint)
    assert log.close() and len(failures) == 2
    assert (verified(tmp_path).unsigned, verified(tmp_path).crashes) == (0, 0)
    assert open_log(tmp_path).close() and verified(tmp_path).runs == 2


LIMITED = """
import resource, signal, sys
from pathlib import Path
from tests.serve.audit.logs import completed, open_log
from tests.serve.running import wait_until
log = open_log(Path(sys.argv[1]), queue_records=100)
assert log.flush()
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
for number in range(300):
    log.record(completed(number))
assert not log.flush(0.1)
wait_until(lambda: "File too large" in log.state, "the kernel's refusal")
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
    wait_until(lambda: "File exists" in log.state, "the copy to fail")
    (copy / log.chain.name).unlink()
    (tmp_path / "kept").rename(copy / log.chain.name)
    log.record(completed(2))
    assert log.close() and log.state == "ok"
    assert verify_directory(tmp_path / "log", copy=copy).ok
    assert len(checkpoint_files(copy / log.chain.name)) == 2
