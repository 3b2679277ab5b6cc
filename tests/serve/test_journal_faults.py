"""The journal when its store is full, slow, gone or broken: serving goes on, and the journal does once it can."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import msgspec
import pytest

from shoal.bench.faults.deployment import free_port
from shoal.serve.journal import Journal
from shoal.serve.journal_store import Batch, JournalConfig, StoreError
from tests.serve.journal_stores import redis_server, run, tokens
from tests.serve.journal_writer import entry, journal, now, store_of, token
from tests.serve.running import until


def test_a_full_disk_turns_the_journal_off_and_serving_goes_on_and_room_turns_it_on(tmp_path: Path) -> None:
    config = JournalConfig(
        location=str(tmp_path / "journal.db"),
        max_bytes=400_000,
        commit_seconds=0.002,
        patience_seconds=0.05,
        retry_seconds=0.2,
        lease_seconds=0.2,
    )

    async def body() -> None:
        subject = Journal(store_of(config, "a"), config, clock=now)
        await subject.open()
        big = msgspec.structs.replace(entry("big"), body=b" " * 600_000)
        subject.accepted(entry("small"))
        subject.progress("small", 0, tokens(0, 5))
        await subject.settled()
        assert subject.state == "ok"
        subject.accepted(big)
        await subject.settled()
        assert subject.state == f"off: journal {config.location}: database or disk is full"
        subject.progress("small", 0, tokens(0, 6, 5))  # ignored, not raised
        subject.accepted(entry("while off"))
        subject.ended("small")
        await subject.settled()
        found = await subject.load("small", "t")
        assert found is not None and found.sequences[0].token_ids == tokens(0, 5) and not found.ended
        await asyncio.sleep(0.25)
        subject.accepted(entry("later"))
        await subject.settled()
        assert subject.state == "ok"
        assert await subject.load("later", "t") is not None and await subject.load("while off", "t") is None
        other = journal(config.location, "b")
        await other.open()
        assert await other.claim("small", "t") is not None  # released, though this gateway lives
        await other.close()
        await subject.close()

    run(body)


def test_without_redis_serving_goes_on_and_with_it_again_the_journal_does(tmp_path: Path) -> None:
    async def body() -> None:
        port = free_port()
        url = f"redis://127.0.0.1:{port}/0"
        with redis_server(tmp_path, port) as server:
            subject = journal(url, "a", patience_seconds=0.05, retry_seconds=0.2)
            await subject.open()
            subject.accepted(entry("before"))
            await subject.settled()
            assert subject.state == "ok" and await subject.load("before", "t") is not None
            server.kill()
            server.wait()
        subject.progress("before", 0, tokens(0, 1))
        await subject.settled()
        assert subject.state.startswith(f"off: journal {url}: ")
        with pytest.raises(StoreError):
            await subject.load("before", "t")
        assert await subject.reserve("t", "k", "r") is None
        with redis_server(tmp_path, port):
            await asyncio.sleep(0.25)
            subject.accepted(entry("after"))
            await subject.settled()
            assert subject.state == "ok" and await subject.load("after", "t") is not None
            await subject.close()

    run(body)


def test_an_error_that_nobody_expected_turns_it_off_too() -> None:
    class Broken(Slow):
        def commit(self, batch: Batch) -> list[str]:
            raise RuntimeError("unforeseen")

    async def body() -> None:
        subject = Journal(Broken(), JournalConfig(location="", commit_seconds=0.001))  # type: ignore[arg-type]
        await subject.open()
        subject.accepted(entry("r"))
        await subject.settled()
        assert subject.state == "off: unforeseen"
        await subject.settled()
        await subject.close()

    run(body)


def test_what_ended_first_makes_room(tmp_path: Path) -> None:
    config = JournalConfig(location=str(tmp_path / "journal.db"), max_bytes=1_000_000, commit_seconds=0.002)

    async def body() -> None:
        subject = Journal(store_of(config, "a"), config, clock=now)
        await subject.open()
        for number in range(60):
            name = f"r{number}"
            subject.accepted(msgspec.structs.replace(entry(name), body=b"x" * 60_000))
            await subject.settled()
            if name != "r0":
                subject.ended(name)
        await subject.settled()
        assert subject.state == "ok"
        assert await subject.load("r0", "t") is not None and await subject.load("r59", "t") is not None
        assert await subject.load("r1", "t") is None
        await subject.close()

    run(body)


class Slow:
    """A store whose commits wait for an event; of the rest nothing is asked."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.batches: list[Batch] = []

    def open(self) -> None: ...

    def commit(self, batch: Batch) -> list[str]:
        self.batches.append(batch)
        self.may.wait()
        return []

    def close(self) -> None: ...


def test_what_comes_during_a_commit_is_one_batch_and_too_much_turns_it_off() -> None:
    async def body() -> None:
        config = JournalConfig(location="", commit_seconds=0.001, max_pending=20_000)
        store = Slow()
        subject = Journal(store, config)  # type: ignore[arg-type]
        await subject.open()
        subject.accepted(entry("r"))
        await until(lambda: len(store.batches) == 1, "the first commit")
        for position in range(1000):
            subject.progress("r", 0, [token(0, position)])
        await asyncio.sleep(0.02)
        assert len(store.batches) == 1 and subject.state == "ok"
        store.may.set()
        await subject.settled()
        assert [fragment.token_ids for fragment in store.batches[1].log] == [tokens(0, 1000)]
        store.may.clear()
        subject.progress("r", 0, [1])
        await until(lambda: len(store.batches) == 3, "the third commit")
        for position in range(3000):
            subject.progress("r", 0, [token(0, position)])
        assert subject.state == "off: the store is too slow for this load"
        store.may.set()
        await subject.close()

    asyncio.run(body())  # by the real clock: a thread waits for what happens here


def test_an_idle_gateway_writes_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        store = Slow()
        store.may.set()
        config = JournalConfig(location="", commit_seconds=0.001, lease_seconds=0.03)
        subject = Journal(store, config)  # type: ignore[arg-type]
        await subject.open()
        subject.accepted(entry("r"))
        await until(lambda: len(store.batches) >= 4, "its lease to be renewed")
        subject.ended("r")
        await subject.settled()
        before = len(store.batches)
        await asyncio.sleep(0.1)
        assert len(store.batches) <= before + 1
        await subject.close()

    run(body)


def test_a_store_that_cannot_be_used_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is no database, and long enough to be taken for one" * 20)
    cases = {
        str(tmp_path): "cannot be written: Is a directory",
        str(tmp_path / "text"): "file is not a database; remove it or name another file",
        "redis://user:secret@127.0.0.1:1/0": "journal redis://127.0.0.1:1/0: ",
    }

    async def body(location: str, message: str) -> None:
        with pytest.raises(StoreError) as error:
            await journal(location, "a").open()
        assert message in str(error.value) and "secret" not in str(error.value)

    for location, message in cases.items():
        if location.startswith("redis"):
            pytest.importorskip("redis")
        asyncio.run(body(location, message))
