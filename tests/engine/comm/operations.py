"""Operations on a Comm beside what they must give, computed in one process from every rank's values.

Tests send lists of operations to all ranks of a group; each performs them and knows what should come out.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shoal.engine.comm.base import Comm

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int32": torch.int32, "int64": torch.int64}
LENGTHS = (0, 1, 7, 15, 16, 17, 1000, 4095, 4096, 4097, 8193, 40_000)
"""Around vectors, the size up to which sums take one phase, half a buffer of 64 KiB, and several of them."""


@dataclass(frozen=True)
class Operation:
    kind: str
    dtype: str
    length: int
    seed: int
    rank: int = 0
    """The source of a broadcast; how far a message goes. Modulo the size of the group."""


def every_operation(size: int) -> list[Operation]:
    return [
        Operation(kind, dtype, length, seed=length, rank=rank)
        for kind in KINDS
        for dtype in DTYPES
        for length in LENGTHS
        for rank in (range(size) if kind in ("broadcast", "send") and length in (7, 40_000) else [0])
    ]


def random_operations(seed: int, count: int) -> list[Operation]:
    """Mostly short ones, as they follow each other closest."""
    draw = random.Random(seed)
    return [
        Operation(
            kind=draw.choice(KINDS),
            dtype=draw.choice(list(DTYPES)),
            length=draw.choice(LENGTHS) if draw.random() < 0.1 else draw.randrange(50),
            seed=draw.randrange(1 << 30),
            rank=draw.randrange(4),
        )
        for _ in range(count)
    ]


def values(operation: Operation, rank: int, shape: Sequence[int]) -> Tensor:
    """Of a rank. Integers of the whole range, so that sums wrap around; some floats are the negative zero."""
    generator = torch.Generator().manual_seed(operation.seed * 64 + rank)
    dtype = DTYPES[operation.dtype]
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        return torch.randint(limits.min, limits.max, tuple(shape), generator=generator, dtype=dtype)
    x = torch.randn(tuple(shape), generator=generator) * 100
    return torch.where(x.abs() < 10, -0.0, x).to(dtype)


def ordered_sum(parts: Sequence[Tensor]) -> Tensor:
    """Rank 0, then 1, ...; bfloat16 is rounded once, at the end."""
    wide = [part.float() if part.dtype == torch.bfloat16 else part for part in parts]
    return functools.reduce(torch.add, wide).to(parts[0].dtype)


def counts_of(operation: Operation, size: int) -> list[list[int]]:
    """Rows that each rank sends to each, some none, all together about the operation's length."""
    generator = torch.Generator().manual_seed(operation.seed)
    most = 2 * operation.length // size // size + 1
    counts = torch.randint(0, most + 1, (size, size), generator=generator)
    return (counts * (torch.rand(size, size, generator=generator) < 0.7)).tolist()


def perform(comm: Comm, operation: Operation) -> tuple[Tensor, Tensor]:
    """What came out, and what should."""
    size, own = comm.size, comm.rank
    parts = [values(operation, r, (operation.length,)) for r in range(size)]
    other = operation.rank % size
    if operation.kind == "all_reduce":
        return comm.all_reduce_(parts[own].clone()), ordered_sum(parts)
    if operation.kind == "all_gather":
        return comm.all_gather(parts[own]), torch.stack(parts)
    if operation.kind == "reduce_scatter":
        blocks = [values(operation, r, (size, operation.length)) for r in range(size)]
        return comm.reduce_scatter(blocks[own]), ordered_sum([block[own] for block in blocks])
    if operation.kind == "broadcast":
        return comm.broadcast_(parts[own].clone(), other), parts[other]
    if operation.kind == "all_to_all":
        return _all_to_all(comm, operation)
    return _pass_on(comm, parts, 1 + operation.rank % (size - 1))


def _all_to_all(comm: Comm, operation: Operation) -> tuple[Tensor, Tensor]:
    counts, own = counts_of(operation, comm.size), comm.rank
    rows = [values(operation, r, (sum(counts[r]), 3)) for r in range(comm.size)]
    received = comm.all_to_all(rows[own], counts[own], [counts[r][own] for r in range(comm.size)])
    return received, torch.cat([rows[r].split(counts[r])[own] for r in range(comm.size)])


def _pass_on(comm: Comm, parts: list[Tensor], distance: int) -> tuple[Tensor, Tensor]:
    """Every rank to the one `distance` further. Not all send first: the queue need not hold a long message."""
    to, source = (comm.rank + distance) % comm.size, (comm.rank - distance) % comm.size
    received = torch.empty_like(parts[source])
    # Ranks pass on in circles, each holding the lowest rank of its own; that one sends first.
    begins = comm.rank == min((comm.rank + distance * step) % comm.size for step in range(comm.size))
    if begins:
        comm.send(parts[comm.rank], to)
    comm.receive_(received, source)
    if not begins:
        comm.send(parts[comm.rank], to)
    return received, parts[source]


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape or not a.is_contiguous():
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


# --- bodies of ranks ------------------------------------------------------------------------------------------------


def check(comm: Comm, operations: list[Operation]) -> tuple[str | None, str]:
    """What was wrong first, if anything; and a digest of what all ranks must have alike."""
    digest = hashlib.sha256()
    for number, operation in enumerate(operations):
        found, expected = perform(comm, operation)
        if not same_bits(found, expected):
            return f"{number}: {operation} gave {found}, not {expected}", ""
        if operation.kind in ("all_reduce", "all_gather", "broadcast"):
            digest.update(found.reshape(-1).view(torch.uint8).numpy().tobytes())
    return None, digest.hexdigest()


def reduce_until(comm: Comm, directory: str) -> int:
    """All-reduces until there is a file `stop`, seen by any rank; says by a file that it has begun. How many."""
    x, count = torch.ones(1000), 0
    while True:
        stop = torch.tensor([os.path.exists(f"{directory}/stop")], dtype=torch.int32)
        if comm.all_reduce_(stop).item():
            return count
        comm.all_reduce_(x.fill_(1.0))
        if not bool((x == comm.size).all()):
            raise AssertionError(f"the sum of {comm.size} ones is {x}")
        count += 1
        if count == 10:
            Path(f"{directory}/began-{comm.rank}").touch()


def all_reduce_ones(comm: Comm, length: int = 1) -> float:
    return float(comm.all_reduce_(torch.ones(length)).sum())


def receive_one(comm: Comm, source: int) -> float:
    return float(comm.receive_(torch.zeros(1), source))
