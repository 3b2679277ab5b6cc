"""Processes that the journal's tests kill or let race: `python -m tests.serve.journal_writer write|claim ...`."""

from __future__ import annotations

import asyncio
import sys
import time
from itertools import count

from shoal.core.types import Request, Sampling
from shoal.serve.journal import Journal, open_store
from shoal.serve.journal_sqlite import SqliteStore
from shoal.serve.journal_store import JournalConfig, JournalEntry, Store


def entry(request_id: str, tenant: str = "t", n: int = 1) -> JournalEntry:
    request = Request(id=request_id, prompt=[1, 2, 3], max_tokens=10**6, n=n, sampling=Sampling(seed=7))
    return JournalEntry(
        request_id=request_id,
        tenant=tenant,
        model="m",
        route="chat",
        body=b'{"messages": []}',
        request=request,
        created=1.5,
    )


def token(index: int, position: int) -> int:
    """What a sequence has there, always."""
    return (index * 7919 + position * 104729) % 50000


def journal(location: str, gateway: str, **changes: object) -> Journal:
    config = JournalConfig(**{"location": location, "commit_seconds": 0.002, **changes})  # type: ignore[arg-type]
    return Journal(store_of(config, gateway), config, clock=now)


def store_of(config: JournalConfig, gateway: str) -> Store:
    return open_store(config, gateway) if "://" in config.location else SqliteStore(config, gateway, now)


def now() -> float:
    """By its name at the time of the call: tests/virtual_time.py puts another clock there."""
    return time.monotonic()


async def write(location: str) -> None:
    """Many requests of two sequences until killed; prints what is settled, a line each."""
    subject = journal(location, "writer", round_seconds=0.03, lease_seconds=0.3)
    await subject.open()
    names = [f"r{number}" for number in range(20)]
    for name in names:
        subject.accepted(entry(name, n=2))
    for step in count():
        for name in names:
            for index in range(2):
                subject.progress(name, index, [token(index, 2 * step), token(index, 2 * step + 1)])
        if step % 5 == 0:
            await subject.settled()
            print(2 * step + 2, flush=True)
        await asyncio.sleep(0.0005)


async def claim(location: str, gateway: str, number: int) -> None:
    """Waits for a line, claims all requests, prints which it got."""
    subject = journal(location, gateway)
    await subject.open()
    print("ready", flush=True)
    sys.stdin.readline()
    claims = [subject.claim(f"r{i}", "t") for i in range(number)]
    won = [one.entry.request_id for one in await asyncio.gather(*claims) if one is not None]
    print(" ".join(won), flush=True)
    sys.stdin.readline()  # lives on, so that its leases do


if __name__ == "__main__":
    if sys.argv[1] == "write":
        asyncio.run(write(sys.argv[2]))
    else:
        asyncio.run(claim(sys.argv[2], sys.argv[3], int(sys.argv[4])))
