"""The journal: whoever reopens it finds prefixes of what was generated, and one gateway goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.bench.faults.deployment import free_port
from shoal.core.types import TokenLogprobs
from shoal.serve.journal import Journal
from shoal.serve.journal_redis import _PREFIX
from shoal.serve.journal_sqlite import SqliteStore
from shoal.serve.journal_store import (
    Batch,
    Fragment,
    JournalConfig,
    assembled,
)
from tests.serve.journal_stores import redis_server, run, tokens
from tests.serve.journal_writer import entry, journal, now, store_of

ROOT = Path(__file__).parent.parent.parent


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
        config = JournalConfig(location=location, commit_seconds=0.002, lease_seconds=30.0)
        a = Journal(store_of(config, "a"), config, on_lost=lost.append, clock=now)
        b, c = journal(location, "b", lease_seconds=30.0), journal(location, "c", lease_seconds=30.0)
        for one in (a, b, c):
            await one.open()
        for name in ("r", "kept"):
            a.accepted(entry(name))
            a.progress(name, 0, tokens(0, 4))
        await a.settled()
        await asyncio.sleep(75.0)
        assert await b.claim("r", "t") is None  # leases are renewed though nothing comes
        assert a._timer is not None
        a._timer.cancel()  # as of a process that was stopped
        a._timer = None
        await lapse(location, "a")
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


async def lapse(location: str, gateway: str) -> None:
    """Let the lease of a gateway run out that renews it no more: Redis would take its own time."""
    if "://" in location:
        import redis

        assert redis.Redis.from_url(location).delete(f"{_PREFIX}lease:{gateway}") == 1
    else:
        await asyncio.sleep(40.0)


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
            one.communicate("stop\n", timeout=60)
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
        subject = journal(location, "next")
        await subject.open()
        time.sleep(0.5)  # longer than the writer's lease
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


def test_what_was_claimed_outlives_the_log_of_the_gateway_that_had_it(tmp_path: Path) -> None:
    now = [1000.0]
    config = JournalConfig(location=str(tmp_path / "journal.db"), commit_seconds=0.002, retention_seconds=600)

    async def body() -> None:
        a, b = (Journal(SqliteStore(config, name, lambda: now[0]), config, clock=lambda: now[0]) for name in "ab")
        await a.open()
        await b.open()
        a.accepted(entry("r", n=2))
        a.progress("r", 0, tokens(0, 3))
        a.progress("r", 1, tokens(1, 2))
        a.finished("r", 1, "stop", stop_token=7)
        await a.settled()
        now[0] += 4
        assert await b.claim("r", "t") is not None
        for _ in range(2):
            b.progress("r", 0, [])
            await b.settled()
            now[0] += 400
        b.progress("r", 0, tokens(0, 5, 3))
        await b.settled()
        await b._call(b._store.purge)
        found = await b.load("r", "t")
        assert found is not None and found.sequences[0].token_ids == tokens(0, 5)
        assert (found.sequences[1].token_ids, found.sequences[1].stop_token) == (tokens(1, 2), 7)
        a.progress("r", 0, [1, 1, 1])
        await a.settled()  # is told that it lost it, and clears its log
        found = await b.load("r", "t")
        assert found is not None and found.sequences[0].token_ids == tokens(0, 5)
        await a.close()
        await b.close()

    run(body)


def test_fragments_join_to_the_longest_prefix_in_any_order() -> None:
    parts = [Fragment("r", 0, 3, [3, 4], []), Fragment("r", 0, 0, [0, 1], []), Fragment("r", 0, 1, [1, 2, 3], [])]
    assert assembled(entry("r"), parts, ended=False).sequences[0].token_ids == [0, 1, 2, 3, 4]
    gap = [Fragment("r", 0, 3, [3, 4], [], finish="stop"), Fragment("r", 0, 0, [0, 1], [])]
    found = assembled(entry("r"), gap, ended=False).sequences[0]
    assert found.token_ids == [0, 1] and found.finish is None
