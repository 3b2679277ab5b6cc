"""Reading ahead: the right bytes in the right order, no more of them than the ring holds, and errors that arrive."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shoal.checkpoint.errors import CheckpointError
from shoal.engine import read_ahead
from shoal.engine.read_ahead import Extent, ReadAhead, Ring

SIZE = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[Path, int, bytes]]:
    """A file of random bytes: its path, a descriptor, what is in it."""
    data = random.Random(1).randbytes(SIZE)
    path = tmp_path / "weights"
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    yield path, descriptor, data
    os.close(descriptor)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 1000)


def random_groups(path: Path, descriptor: int, seed: int, count: int = 60) -> list[list[Extent]]:
    """Of up to four extents each, empty ones among them, and groups of nothing else."""
    draw = random.Random(seed)
    groups = []
    for _ in range(count):
        lengths = [draw.choice([0, 1, 63, 64, 65, 999, 1000, 1001, 5000]) for _ in range(draw.randint(1, 4))]
        groups.append([Extent(path, descriptor, draw.randrange(SIZE - length), length) for length in lengths])
    return groups


@pytest.mark.parametrize("ring_bytes", [1, 25_000, SIZE])
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("small_pieces")
def test_groups_come_whole_and_in_order(
    file: tuple[Path, int, bytes], ring_bytes: int, threads: int, seed: int
) -> None:
    path, descriptor, data = file
    groups = random_groups(path, descriptor, seed)
    seen: list[tuple[int, int]] = []
    with ReadAhead(
        groups, progress=lambda *counts: seen.append(counts), threads=threads, ring_bytes=ring_bytes
    ) as ahead:
        for group in groups:
            for extent, found in zip(group, ahead.take(), strict=True):
                assert bytes(found.numpy()) == data[extent.offset : extent.offset + extent.length]
    total = sum(extent.length for group in groups for extent in group)
    assert seen == sorted(seen) and seen[-1] == (total, total)
    assert ahead.figures.bytes_read == total


@pytest.mark.usefixtures("small_pieces")
def test_it_reads_ahead_and_no_further_than_the_ring_goes(
    file: tuple[Path, int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, descriptor, _ = file
    num_read = 0
    lock = threading.Lock()
    original = read_ahead._read_into

    def counted(target: memoryview, extent: Extent, start: int) -> None:
        nonlocal num_read
        original(target, extent, start)
        with lock:
            num_read += len(target)

    monkeypatch.setattr(read_ahead, "_read_into", counted)
    groups = [[Extent(path, descriptor, 6400 * i, 6400)] for i in range(20)]
    with ReadAhead(groups, ring_bytes=4 * 6400) as ahead:
        for taken in range(20):
            # As many groups as fit the ring, one of which is the taken one's until the next is taken.
            expected = min(20, taken + (4 if taken == 0 else 3)) * 6400
            wait_for(lambda expected=expected: num_read == expected)
            time.sleep(0.005)
            assert num_read == expected, "it reads no further"
            ahead.take()
            if taken == 0:
                wait_for(lambda: num_read == 4 * 6400)
    assert ahead._data.nbytes == 4 * 6400


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_group_larger_than_the_ring_makes_it_larger(file: tuple[Path, int, bytes]) -> None:
    path, descriptor, data = file
    groups = [[Extent(path, descriptor, 0, 100)], [Extent(path, descriptor, 0, 5000), Extent(path, descriptor, 7, 64)]]
    with ReadAhead(groups, ring_bytes=256) as ahead:
        ahead.take()
        first, second = ahead.take()
        assert (bytes(first.numpy()), bytes(second.numpy())) == (data[:5000], data[7:71])
        assert ahead._data.nbytes == 5056 + 64  # each extent begins at a multiple of 64


def test_a_file_that_is_cut_while_it_is_read_is_named(file: tuple[Path, int, bytes]) -> None:
    path, descriptor, _ = file
    groups = [[Extent(path, descriptor, start, SIZE // 4)] for start in range(0, SIZE, SIZE // 4)]
    with ReadAhead(groups, ring_bytes=SIZE // 4) as ahead:
        ahead.take()  # nothing else fits beside it
        os.truncate(path, SIZE // 2)
        with pytest.raises(CheckpointError, match="weights: is truncated"):
            for _ in range(3):
                ahead.take()
    assert not reading_threads()


def test_what_fails_in_a_thread_reaches_the_taker_and_ends_the_others(
    file: tuple[Path, int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, descriptor, _ = file

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with (
        pytest.raises(CheckpointError, match="weights: cannot be read: Input/output error"),
        ReadAhead([[Extent(path, descriptor, 0, SIZE)]]) as ahead,
    ):
        ahead.take()
    assert not reading_threads()


def test_leaving_early_ends_the_threads(file: tuple[Path, int, bytes]) -> None:
    path, descriptor, _ = file
    with ReadAhead([[Extent(path, descriptor, 0, 64)]] * 100, ring_bytes=128) as ahead:
        ahead.take()
        assert reading_threads(), "control: they wait for room"
    assert not reading_threads()


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("shoal-read")]


def test_waiting_and_reading_are_told_apart(file: tuple[Path, int, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow reads, a ring of one group, and a taker with nothing else to do: it waits while they read, or not much less
    on a machine that lets it come late."""
    path, descriptor, _ = file
    original = read_ahead._read_into

    def slow(target: memoryview, extent: Extent, start: int) -> None:
        time.sleep(0.01)
        original(target, extent, start)

    monkeypatch.setattr(read_ahead, "_read_into", slow)
    groups = [[Extent(path, descriptor, 0, 1000)]] * 20
    began = time.monotonic()
    with ReadAhead(groups, threads=1, ring_bytes=1000) as ahead:
        for _ in groups:
            ahead.take()
    figures, elapsed = ahead.figures, time.monotonic() - began
    assert 20 * 0.01 <= figures.reading_seconds <= elapsed
    assert figures.reading_seconds / 2 <= figures.waited_seconds <= elapsed


@pytest.mark.parametrize("seed", range(20))
def test_places_of_a_ring_never_overlap(seed: int) -> None:
    draw = random.Random(seed)
    ring = Ring(100)
    live: list[tuple[int, int]] = []
    placed = 0
    for _ in range(500):
        length = draw.randint(1, 60)
        start = ring.place(length)
        if start is None:
            assert live, "an empty ring has room for all that fits it"
            ring.give_back_oldest()
            live.pop(0)
            continue
        placed += 1
        assert start >= 0 and start + length <= 100
        assert all(start + length <= other or end <= start for other, end in live)
        live.append((start, start + length))
    assert placed > 100
