"""Collectives over shared memory against the same sums in one process, and what happens when a rank does not come."""

from __future__ import annotations

import functools
import os
import queue
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shoal.engine.comm.base import Comm, CommError, NullComm
from shoal.engine.comm.shared_memory import SharedMemoryComm
from shoal.engine.native import unavailable_reason
from tests.engine.comm.ranks import Ranks, run_ranks

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

LENGTHS = [0, 1, 7, 1000, 4096, 4097, 40_000]
"""Around the size up to which sums take one phase, and beyond half a buffer of 64 KiB."""
DTYPES = [torch.float32, torch.bfloat16, torch.int32, torch.int64]


def values(rank: int, length: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + 10 * length + rank)
    return (torch.randn(length, generator=generator) * 100).to(dtype)


def ordered_sum(parts: list[Tensor]) -> Tensor:
    """Rank 0, then 1, ...; bfloat16 is rounded once, at the end."""
    wide = [part.float() if part.dtype == torch.bfloat16 else part for part in parts]
    return functools.reduce(torch.add, wide).to(parts[0].dtype)


def every_operation(comm: Comm) -> str | None:
    """What was wrong; None if nothing."""
    size, rank = comm.size, comm.rank
    for dtype in DTYPES:
        for length in LENGTHS:
            parts = [values(r, length, dtype) for r in range(size)]
            what = f"{dtype} x {length}"
            if not torch.equal(comm.all_reduce_(parts[rank].clone()), ordered_sum(parts)):
                return f"all_reduce {what}"
            if not torch.equal(comm.all_gather(parts[rank]), torch.stack(parts)):
                return f"all_gather {what}"
            blocks = [torch.stack([values(r, length, dtype, seed=to) for to in range(size)]) for r in range(size)]
            if not torch.equal(comm.reduce_scatter(blocks[rank]), ordered_sum([block[rank] for block in blocks])):
                return f"reduce_scatter {what}"
            for source in range(size):
                if not torch.equal(comm.broadcast_(parts[rank].clone(), source), parts[source]):
                    return f"broadcast {what} from {source}"
            if length and not torch.equal(_round_trip(comm, parts[rank]), parts[rank - 1]):
                return f"send and receive {what}"
    return _all_to_all(comm)


def _round_trip(comm: Comm, x: Tensor) -> Tensor:
    """To the next rank, from the one before; all send first, which a queue must hold."""
    comm.send(x, (comm.rank + 1) % comm.size)
    return comm.receive_(torch.empty_like(x), (comm.rank - 1) % comm.size)


def _all_to_all(comm: Comm) -> str | None:
    for counts in ([[0, 3, 1, 5], [2, 0, 0, 7], [1, 1, 1, 1], [0, 0, 0, 0]], [[20_000] * 4] * 4):
        size = comm.size
        rows = [torch.full((sum(counts[r][:size]), 3), float(r)) for r in range(size)]
        for r in range(size):
            rows[r][:, 1] = torch.arange(len(rows[r]))
        received = comm.all_to_all(
            rows[comm.rank], counts[comm.rank][:size], [counts[r][comm.rank] for r in range(size)]
        )
        expected = torch.cat([_part(rows[r], counts[r][:size], comm.rank) for r in range(size)])
        if not torch.equal(received, expected):
            return f"all_to_all {counts}"
    return None


def _part(rows: Tensor, counts: list[int], to: int) -> Tensor:
    first = sum(counts[:to])
    return rows[first : first + counts[to]]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_operation_gives_what_one_process_computes(tmp_path: Path, size: int) -> None:
    assert run_ranks(every_operation, tmp_path / "group", size) == [None] * size


def a_thousand_operations(comm: Comm) -> tuple[int, float]:
    """In an order and of sizes that all ranks draw alike; the sums depend on every one."""
    draw, log = random.Random(7), []
    x = values(comm.rank, 5000, torch.float32) / 1000
    for _ in range(1000):
        length = draw.choice([1, 5, 640, 5000])
        kind = draw.randrange(4)
        if kind == 0:
            comm.all_reduce_(x[:length])
            x[:length] *= 1 / comm.size
        elif kind == 1:
            x[:length] = comm.all_gather(x[:length])[(comm.rank + 1) % comm.size]
        elif kind == 2:
            comm.broadcast_(x[:length], draw.randrange(comm.size))
        else:
            x[:length] += comm.all_to_all(x[:length, None], *_counts(comm, length))[:, 0].sum()
            x.clamp_(-10, 10)
        log.append(float(x[0]))
    return comm.all_gather(comm.all_reduce_(x)).flatten(1).unique(dim=0).shape[0], log[-1]


def _counts(comm: Comm, length: int) -> tuple[list[int], list[int]]:
    share = [length * (r + 1) // comm.size - length * r // comm.size for r in range(comm.size)]
    return share, [share[comm.rank]] * comm.size


@pytest.mark.parametrize("size", [2, 4])
def test_many_operations_one_after_the_other_leave_all_ranks_with_the_same_bits(tmp_path: Path, size: int) -> None:
    results = run_ranks(a_thousand_operations, tmp_path / "group", size)
    assert [different for different, _ in results] == [1] * size


def test_a_null_group_has_everything_already() -> None:
    comm, x = NullComm(), torch.arange(3.0)
    assert comm.all_reduce_(x) is x and comm.broadcast_(x, 0) is x
    assert torch.equal(comm.all_gather(x), x[None]) and torch.equal(comm.reduce_scatter(x[None]), x)
    with pytest.raises(ValueError, match="nobody to send to"):
        comm.send(x, 1)


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[SharedMemoryComm]:
    """The one rank of two that came."""
    SharedMemoryComm.create(str(tmp_path / "group"), 2, 1 << 16)
    comm = SharedMemoryComm(str(tmp_path / "group"), 0, 2, timeout=0.2)
    yield comm
    comm.close()


def test_bad_tensors_are_refused(alone: SharedMemoryComm) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        alone.all_reduce_(torch.ones(4, 4).T[:2])
    with pytest.raises(ValueError, match="not torch.float16"):
        alone.all_reduce_(torch.ones(4, dtype=torch.float16))
    with pytest.raises(ValueError, match="do not fit"):
        alone.all_to_all(torch.ones(4, 1), [1, 1], [1, 1])
    with pytest.raises(ValueError, match="each of 2 ranks"):
        alone.reduce_scatter(torch.ones(3, 1))
    with pytest.raises(ValueError, match="rank 0 is not another"):
        alone.send(torch.ones(1), 0)


def test_files_that_are_no_group(tmp_path: Path) -> None:
    path = str(tmp_path / "group")
    with pytest.raises(CommError, match="not the shared memory of a group"):
        SharedMemoryComm(path, 0, 2)
    Path(path).write_bytes(b"something else" * 1000)
    with pytest.raises(CommError, match="not the shared memory of a group of 2"):
        SharedMemoryComm(path, 0, 2)
    with pytest.raises(CommError, match="exists"):
        SharedMemoryComm.create(path, 2, 1 << 16)
    with pytest.raises(ValueError, match="1 to 64"):
        SharedMemoryComm.create(path, 65, 1 << 16)


def test_a_rank_that_never_comes_is_named_and_the_group_is_broken(alone: SharedMemoryComm) -> None:
    with pytest.raises(CommError, match=r"rank 1 of 2 did not come within 0.2 s"):
        alone.all_reduce_(torch.ones(1))
    with pytest.raises(CommError, match="given up"):
        alone.all_reduce_(torch.ones(1))
    alone.close()
    with pytest.raises(CommError, match="was closed"):
        alone.all_reduce_(torch.ones(1))


def reduce_for_ever(comm: Comm) -> None:
    x = torch.ones(1000)
    while True:
        comm.all_reduce_(x)


def receive(comm: Comm) -> None:
    if comm.rank == 0:
        comm.receive_(torch.ones(1), 1)
    time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_is_named_by_the_others(tmp_path: Path, number: signal.Signals) -> None:
    ranks = Ranks(reduce_for_ever, tmp_path / "group", 3, timeout=1.0)
    try:
        with pytest.raises(queue.Empty):
            ranks.results.get(timeout=3.0)  # the control: left alone they go on
        victim = ranks.processes[1].pid
        assert victim is not None
        os.kill(victim, number)
        errors = [str(error) for error in ranks.collect(2).values()]
    finally:
        ranks.end()
    assert any("rank 1 of 3 did not come within 1 s" in error for error in errors), errors
    assert all("did not come" in error or "given up" in error for error in errors)


def test_abort_wakes_whoever_waits_however_patiently(tmp_path: Path) -> None:
    path = tmp_path / "group"
    ranks = Ranks(receive, path, 2, timeout=1.0)
    try:
        time.sleep(3.0)  # longer than the timeout: a receiver waits as long as it takes
        assert ranks.results.empty()
        SharedMemoryComm(str(path), 1, 2).abort()
        assert "given up" in str(ranks.collect(1)[0])
    finally:
        ranks.end()
