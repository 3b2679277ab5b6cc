"""The journal: whoever reopens it finds prefixes of what was generated, and one gateway goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shoal.core.types import TokenLogprobs
from shoal.serve.journal import Journal, open_store
from shoal.serve.journal_sqlite import SqliteStore
from shoal.serve.journal_store import (
    Batch,
    Fragment,
    JournalConfig,
    JournaledRequest,
    StoreError,
    assembled,
)
from tests.serve.journal_writer import entry, journal, token

ROOT = Path(__file__).parent.parent.parent


def tokens(index: int, end: int, start: int = 0) -> list[int]:
    return [token(index, position) for position in range(start, end)]


@contextlib.contextmanager
def redis_server(directory: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    pytest.importorskip("redis", reason="the extra redis is not installed")
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        for _ in range(500):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        yield server
        server.terminate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    with redis_server(tmp_path_factory.mktemp("redis"), port):
        yield f"redis://127.0.0.1:{port}/0"


@pytest.fixture(params=["sqlite", "redis"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return str(tmp_path / "journal.db")
    url: str = request.getfixturevalue("redis_url")
    import redis

    redis.Redis.from_url(url).flushall()
    return url


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(body())


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("did not happen")


@pytest.mark.parametrize("round_seconds", [0.0, 100.0])
def test_another_gateway_finds_what_was_said(location: str, round_seconds: float) -> None:
    logprobs = [TokenLogprobs(-0.5, [3, 4], [-0.5, -1.0]), TokenLogprobs(-0.25, [5], [-0.25])]

    async def body() -> None:
        a, b = journal(location, "a", round_seconds=round_seconds), journal(location, "b")
        await a.open()
        await b.open()
        a.accepted(entry("r", n=2))
        await a.settled()
        a.progress("r", 0, tokens(0, 1), logprobs[:1])
        await a.settled()
        a.progress("r", 0, tokens(0, 2, 1), logprobs[1:])
        a.progress("r", 1, tokens(1, 5))
        a.finished("r", 1, "stop", stop_token=9, num_cached=2)
        await a.settled()
        found = await b.load("r", "t")
        assert found is not None and not found.ended
        assert found.entry == entry("r", n=2)
        assert found.sequences[0].token_ids == tokens(0, 2) and found.sequences[0].finish is None
        assert found.sequences[0].logprobs == logprobs
        second = found.sequences[1]
        assert (second.token_ids, second.finish, second.stop_token, second.num_cached) == (tokens(1, 5), "stop", 9, 2)
        assert await b.load("r", "another") is None and await b.load("s", "t") is None
        a.progress("r", 0, tokens(0, 3, 2), logprobs[1:])
        a.finished("r", 0, "length")
        a.ended("r")
        await a.settled()
        found = await b.load("r", "t")
        assert found is not None and found.ended and found.sequences[0].finish == "length"
        assert found.sequences[0].token_ids == tokens(0, 3) and len(found.sequences[0].logprobs) == 3
        assert await b.claim("r", "t") is None  # nothing is left to do
        await a.close()
        await b.close()

    run(body)


def test_one_that_lost_its_lease_is_told_and_writes_no_more(location: str) -> None:
    async def body() -> None:
        lost: list[str] = []
        config = JournalConfig(location=location, commit_seconds=0.002, lease_seconds=0.2)
        a = Journal(open_store(config, "a"), config, on_lost=lost.append)
        b, c = journal(location, "b", lease_seconds=0.2), journal(location, "c", lease_seconds=0.2)
        for one in (a, b, c):
            await one.open()
        for name in ("r", "kept"):
            a.accepted(entry(name))
            a.progress(name, 0, tokens(0, 4))
        await a.settled()
        await asyncio.sleep(0.5)
        assert await b.claim("r", "t") is None  # leases are renewed though nothing comes
        assert a._timer is not None
        a._timer.cancel()  # as of a process that was stopped
        a._timer = None
        await asyncio.sleep(0.4)
        assert await b.claim("r", "other tenant") is None
        claimed = await b.claim("r", "t")
        assert claimed is not None and claimed.sequences[0].token_ids == tokens(0, 4)
        assert await c.claim("r", "t") is None
        assert await b.claim("r", "t") is None  # it goes on there already
        a.progress("r", 0, [1, 1, 1, 1])
        a.progress("kept", 0, tokens(0, 6, 4))
        await a.settled()
        assert lost == ["r"]
        a.progress("r", 0, [1, 1])
        a.ended("r")
        b.progress("r", 0, tokens(0, 8, 4))
        await a.settled()
        await b.settled()
        found = await c.load("r", "t")
        assert found is not None and found.sequences[0].token_ids == tokens(0, 8) and not found.ended
        kept = await c.load("kept", "t")
        assert kept is not None and kept.sequences[0].token_ids == tokens(0, 6)
        await a.close()
        taken = await b.claim("kept", "t")  # closing releases
        assert taken is not None and taken.sequences[0].token_ids == tokens(0, 6)
        b.released("r")
        await b.settled()
        assert await c.claim("r", "t") is not None
        await b.close()
        await c.close()

    run(body)


def test_an_idempotency_key_belongs_to_the_first_request_of_its_tenant(location: str) -> None:
    async def body() -> None:
        a, b = journal(location, "a"), journal(location, "b")
        await a.open()
        await b.open()
        answers = await asyncio.gather(*(one.reserve("t", "k", f"{i}") for i, one in enumerate([a, b] * 10)))
        assert answers.count(None) == 1 and set(answers) == {None, str(answers.index(None))}
        assert await b.reserve("u", "k", "z") is None
        await b.unreserve("u", "k", "not z")
        assert await a.reserve("u", "k", "y") == "z"
        await b.unreserve("u", "k", "z")
        assert await a.reserve("u", "k", "y") is None
        await a.close()
        await b.close()

    run(body)


def test_of_processes_that_claim_the_same_exactly_one_wins(location: str) -> None:
    number = 60

    async def leave() -> None:
        a = journal(location, "gone")
        await a.open()
        for i in range(number):
            a.accepted(entry(f"r{i}"))
        await a.close()

    run(leave)
    command = [sys.executable, "-m", "tests.serve.journal_writer", "claim", location]
    claimers = [
        subprocess.Popen(
            [*command, name, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for name in ("a", "b")
    ]
    try:
        for one in claimers:
            assert one.stdout is not None and one.stdout.readline() == "ready\n"
        for one in claimers:
            assert one.stdin is not None
            one.stdin.write("go\n")
            one.stdin.flush()
        won = [one.stdout.readline().split() for one in claimers if one.stdout is not None]
    finally:
        for one in claimers:
            one.communicate("stop\n", timeout=20)
    assert sorted(won[0] + won[1]) == sorted(f"r{i}" for i in range(number))


@pytest.mark.parametrize("lines", [1, 9])
def test_what_was_settled_survives_a_kill_and_what_is_found_is_a_prefix(location: str, lines: int) -> None:
    command = [sys.executable, "-m", "tests.serve.journal_writer", "write", location]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as writer:
        assert writer.stdout is not None
        settled = [int(writer.stdout.readline()) for _ in range(lines)]
        os.kill(writer.pid, signal.SIGKILL)
        settled += [int(line) for line in writer.stdout if line.endswith("\n")]
    assert writer.returncode == -signal.SIGKILL

    async def body() -> None:
        subject = journal(location, "next", lease_seconds=0.3)
        await subject.open()
        await asyncio.sleep(0.5)  # longer than the writer's lease
        claims = await asyncio.gather(*(subject.claim(f"r{i}", "t") for i in range(20)))
        for claimed in claims:
            assert claimed is not None and not claimed.ended
            for index in range(2):
                found = claimed.sequences[index].token_ids
                assert len(found) >= settled[-1] and found == tokens(index, len(found))
        subject.progress("r0", 0, tokens(0, 10**5, len(claims[0].sequences[0].token_ids)))  # type: ignore[union-attr]
        await subject.settled()
        found_now = await subject.load("r0", "t")
        assert found_now is not None and found_now.sequences[0].token_ids == tokens(0, 10**5)
        await subject.close()

    run(body)


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
        subject = Journal(open_store(config, "a"), config)
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
        subject = Journal(open_store(config, "a"), config)
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
        await eventually(lambda: len(store.batches) == 1)
        for position in range(1000):
            subject.progress("r", 0, [token(0, position)])
        await asyncio.sleep(0.02)
        assert len(store.batches) == 1 and subject.state == "ok"
        store.may.set()
        await subject.settled()
        assert [fragment.token_ids for fragment in store.batches[1].log] == [tokens(0, 1000)]
        store.may.clear()
        subject.progress("r", 0, [1])
        await eventually(lambda: len(store.batches) == 3)
        for position in range(3000):
            subject.progress("r", 0, [token(0, position)])
        assert subject.state == "off: the store is too slow for this load"
        store.may.set()
        await subject.close()

    run(body)


def test_an_idle_gateway_writes_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        store = Slow()
        store.may.set()
        config = JournalConfig(location="", commit_seconds=0.001, lease_seconds=0.03)
        subject = Journal(store, config)  # type: ignore[arg-type]
        await subject.open()
        subject.accepted(entry("r"))
        await eventually(lambda: len(store.batches) >= 4)  # renews its lease
        subject.ended("r")
        await subject.settled()
        before = len(store.batches)
        await asyncio.sleep(0.1)
        assert len(store.batches) <= before + 1
        await subject.close()

    run(body)


def test_the_files_are_the_owners_alone(tmp_path: Path) -> None:
    async def body() -> None:
        path = tmp_path / "new" / "journal.db"
        subject = journal(str(path), "a")
        await subject.open()
        subject.accepted(entry("r"))
        await subject.settled()
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
        assert modes == {"journal.db": 0o600, "journal.db-wal": 0o600, "journal.db-shm": 0o600}
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
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


def test_old_ones_are_purged_and_those_of_a_live_gateway_are_not(tmp_path: Path) -> None:
    now = [1000.0]
    config = JournalConfig(location=str(tmp_path / "journal.db"), retention_seconds=600)
    a, b = SqliteStore(config, "a", lambda: now[0]), SqliteStore(config, "b", lambda: now[0])
    a.open()
    b.open()
    fragments = [Fragment("ended", 0, 0, [1], [])]
    a.commit(Batch(entries=[entry("ended"), entry("running")], filed=fragments, ended=["ended"]))
    b.commit(Batch(entries=[entry("of the dead")], log=[Fragment("of the dead", 0, 0, [1, 2], [])]))
    names = ["ended", "running", "of the dead"]
    now[0] += 590
    a.commit(Batch())
    a.purge()
    assert list(a.load(names)) == names
    now[0] += 20
    a.commit(Batch())
    a.purge()
    assert list(a.load(names)) == ["running"]
    now[0] = 5.0  # the host was started again
    a.purge()
    assert a.load(names) == {}
    a.close()
    b.close()


def test_fragments_join_to_the_longest_prefix_in_any_order() -> None:
    parts = [Fragment("r", 0, 3, [3, 4], []), Fragment("r", 0, 0, [0, 1], []), Fragment("r", 0, 1, [1, 2, 3], [])]
    assert assembled(entry("r"), parts, ended=False).sequences[0].token_ids == [0, 1, 2, 3, 4]
    gap = [Fragment("r", 0, 3, [3, 4], [], finish="stop"), Fragment("r", 0, 0, [0, 1], [])]
    found = assembled(entry("r"), gap, ended=False).sequences[0]
    assert found.token_ids == [0, 1] and found.finish is None


LEASE = 300.0


class Incarnation:
    """One gateway process, as long as it lives."""

    def __init__(self, name: str, subject: Journal, now: float) -> None:
        self.name = name
        self.subject = subject
        self.renewed = now
        self.lost: list[str] = []


class JournalMachine(RuleBasedStateMachine):
    """Two gateways over one store, their clock and their commits in our hand; each may be killed and started anew."""

    names = [f"r{i}" for i in range(4)]

    @initialize()
    def begin(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.loop = asyncio.new_event_loop()
        self.now = 1000.0
        self.started = 0
        self.said: dict[str, int] = {}
        """Tokens of each request that its owner has said."""
        self.settled: dict[str, int] = {}
        self.owner: dict[str, Incarnation] = {}
        self.over: set[str] = set()
        self.gateways = [self.start(), self.start()]

    def teardown(self) -> None:
        for gateway in self.gateways:
            self.loop.run_until_complete(self.abandon(gateway.subject))
        self.loop.close()
        self.directory.cleanup()

    def start(self) -> Incarnation:
        self.started += 1
        config = JournalConfig(
            location=f"{self.directory.name}/j.db", commit_seconds=1e6, round_seconds=200, lease_seconds=LEASE
        )
        name = f"g{self.started}"
        lost: list[str] = []
        store = SqliteStore(config, name, lambda: self.now)
        subject = Journal(store, config, on_lost=lost.append, clock=lambda: self.now)
        self.loop.run_until_complete(subject.open())
        incarnation = Incarnation(name, subject, self.now)
        incarnation.lost = lost
        return incarnation

    async def abandon(self, subject: Journal) -> None:
        """Nothing pending is written. Its thread and connection end only for our own sake."""
        if subject._timer is not None:
            subject._timer.cancel()
        for task in subject._tasks:
            task.cancel()
        await asyncio.gather(*subject._tasks, return_exceptions=True)
        await subject._call(subject._store.close)
        subject._thread.shutdown()

    async def commit(self, subject: Journal) -> None:
        if subject._timer is not None:
            subject._timer.cancel()
        subject._due()
        assert subject._commit is not None
        await subject._commit

    @rule(number=st.integers(0, 1), name=st.sampled_from(names))
    def accept(self, number: int, name: str) -> None:
        if name not in self.said:
            self.gateways[number].subject.accepted(entry(name))
            self.said[name], self.owner[name] = 0, self.gateways[number]
            self.settle(number)  # before its first byte

    @rule(number=st.integers(0, 1), count=st.integers(1, 3))
    def generate(self, number: int, count: int) -> None:
        """Whoever has lost a request without having been told says what must never be found."""
        gateway = self.gateways[number]
        for name in list(gateway.subject._offsets):
            if self.owner[name] is gateway:
                said = self.said[name]
                gateway.subject.progress(name, 0, tokens(0, said + count, said))
                self.said[name] += count
            else:
                gateway.subject.progress(name, 0, [-1] * count)

    @rule(number=st.integers(0, 1))
    def settle(self, number: int) -> None:
        gateway = self.gateways[number]
        believed = set(gateway.subject._offsets)
        self.loop.run_until_complete(self.commit(gateway.subject))
        gateway.renewed = self.now
        owned = {name for name in believed if self.owner[name] is gateway}
        assert set(gateway.subject._offsets) == owned
        assert sorted(gateway.lost) == sorted(believed - owned)
        gateway.lost.clear()
        self.settled |= {name: self.said[name] for name in owned}

    @rule(number=st.integers(0, 1), name=st.sampled_from(names))
    def end(self, number: int, name: str) -> None:
        gateway = self.gateways[number]
        if name in gateway.subject._offsets:
            gateway.subject.finished(name, 0, "stop")
            gateway.subject.ended(name)
            if self.owner[name] is gateway:
                self.over.add(name)
                self.settled[name] = self.said[name]
            self.settle(number)

    @rule(seconds=st.sampled_from([50.0, 200.0, 350.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(number=st.integers(0, 1))
    def kill(self, number: int) -> None:
        self.loop.run_until_complete(self.abandon(self.gateways[number].subject))
        self.gateways[number] = self.start()

    @rule(number=st.integers(0, 1), name=st.sampled_from(names))
    def claim(self, number: int, name: str) -> None:
        gateway = self.gateways[number]
        self.settle(number)
        found = self.loop.run_until_complete(gateway.subject.claim(name, "t"))
        may = name in self.said and name not in self.over and self.owner[name] is not gateway
        assert (found is not None) == (may and self.now - self.owner[name].renewed >= LEASE)
        if found is not None:
            self.said[name] = len(found.sequences[0].token_ids)
            self.owner[name] = gateway

    @invariant()
    def what_is_found_is_a_prefix_with_all_that_was_settled(self) -> None:
        subject = self.gateways[0].subject
        load = subject._call(lambda: subject._store.load(list(self.said)))
        found: dict[str, JournaledRequest] = self.loop.run_until_complete(load)
        for name in self.said:
            got = found[name].sequences[0].token_ids
            assert got == tokens(0, len(got)) and len(got) >= self.settled.get(name, 0), name
            assert found[name].ended == (name in self.over), name


TestJournalMachine = JournalMachine.TestCase
TestJournalMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
