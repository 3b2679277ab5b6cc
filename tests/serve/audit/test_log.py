"""The log of a process: what it writes, what it does when it cannot, and how the next process goes on."""

from __future__ import annotations

import hashlib
import json
import signal
import struct
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.serve.audit.chain import chains, checkpoint_files, segments
from shoal.serve.audit.events import (
    AuditGap,
    LogStarted,
    LogStopped,
    RequestAccepted,
    RequestCompleted,
    prompt_digest,
)
from shoal.serve.audit.log import AuditConfig
from shoal.serve.audit.note import AuditError
from shoal.serve.audit.verify import verify_directory
from tests.serve.audit.logs import completed, events_of, lines_of, open_log, records_of, spawn, verified
from tests.serve.running import wait_until


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

    def is_signed() -> bool:
        found = verified(tmp_path / "quick")
        return (found.unsigned, found.records) == (0, 2)

    wait_until(is_signed, "a checkpoint of itself")
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
    notes.write_bytes(b"".join(notes.read_bytes().splitlines(keepends=True)[:9]))


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


def test_a_log_put_back_is_not_continued_where_there_is_a_copy(tmp_path: Path) -> None:
    def run(copy: str | None) -> Path:
        log = open_log(tmp_path / "log", copy_to=copy)
        log.record(completed(1))
        assert log.close()
        return log.chain

    chain = run(str(tmp_path / "copy"))
    earlier = {path: path.read_bytes() for path in chain.iterdir()}
    assert run(str(tmp_path / "copy")) == chain
    for path in chain.iterdir():
        path.unlink()
    for path, content in earlier.items():
        path.write_bytes(content)
    again = open_log(tmp_path / "log", copy_to=str(tmp_path / "copy"))
    assert again.chain != chain and "it ends with 3 records, and" in again.state
    assert again.close()
    verdicts = {report.chain: report.ok for report in verify_directory(tmp_path / "log").chains}
    assert verdicts == {chain.name: True, again.chain.name: True}, "without the copy nothing can tell"
    verdicts = {report.chain: report.ok for report in verify_directory(tmp_path / "log", copy=tmp_path / "copy").chains}
    assert verdicts == {chain.name: False, again.chain.name: True}
