"""Small sums in one shot: which messages go that way, that ranks agree whether any do, and what happens if none can.

Torch's symmetric memory needs two GPUs: `tests/engine/test_gpu.py`. Here ranks are threads that lay their parts side by
side in one tensor, which is what mapped memory is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.distributed
from torch import Tensor

from shoal.engine.comm.one_shot import (
    Group,
    OneShotSums,
    Share,
    SumInto,
    default_limit,
    open_sums,
    register,
    try_sums,
)
from shoal.engine.comm.process_group import ProcessGroupComm, make_group, open_group

Result = TypeVar("Result")
CUDA = torch.device("cuda", 0)
"""By its name alone: each rank's only device, as it is with a launcher that shows a process one."""


class SharedParts:
    """Ranks' buffers, and the meeting of all before and after they are read."""

    def __init__(self, size: int, limit: int = 1024) -> None:
        self.buffers = [torch.zeros(limit, dtype=torch.uint8) for _ in range(size)]
        self.meeting = threading.Barrier(size, timeout=20.0)
        self.sizes: list[int] = []
        self.closed = 0

    def sums(self, rank: int) -> tuple[Tensor, SumInto, Callable[[], None]]:
        def sum_into(shared: Tensor, own: Tensor) -> None:
            shared.copy_(own)
            self.meeting.wait()
            total = sum(buffer[: own.nbytes].view(own.dtype).float() for buffer in self.buffers)
            self.meeting.wait()
            own.copy_(total)
            if rank == 0:
                self.sizes.append(own.nbytes)

        return self.buffers[rank], sum_into, self.close

    def close(self) -> None:
        self.closed += 1


def ranks(size: int, body: Callable[[int], Result]) -> list[Result]:
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(body, range(size)))


def opened(
    path: Path, size: int, share: Callable[[int], Share], device: torch.device = CUDA, limit: int | None = None
) -> list[OneShotSums | str]:
    def rank(number: int) -> OneShotSums | str:
        store = torch.distributed.FileStore(str(path / "store"))
        return try_sums(Group(None, store, "test", number, size, device), limit, share(number))

    return ranks(size, rank)


# --- which messages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "offset", "is_taken"),
    [
        ((1, 8), torch.bfloat16, 0, True),
        ((64, 8), torch.bfloat16, 0, True),
        ((64, 8), torch.float32, 0, False),
        ((32, 8), torch.float32, 0, True),
        ((65, 8), torch.bfloat16, 0, False),
        ((0, 8), torch.bfloat16, 0, False),
        ((3, 5), torch.bfloat16, 0, False),
        ((1, 8), torch.bfloat16, 4, False),
        ((1, 8), torch.bfloat16, 8, True),
        ((4,), torch.int32, 0, False),
        ((4,), torch.int64, 0, False),
    ],
)
def test_what_is_taken_is_small_and_whole(
    shape: tuple[int, ...], dtype: torch.dtype, offset: int, is_taken: bool
) -> None:
    sums = OneShotSums(torch.zeros(1024, dtype=torch.uint8), lambda shared, own: None)
    count = torch.Size(shape).numel()
    assert sums.takes(torch.zeros(count + offset, dtype=dtype)[offset:].view(shape)) is is_taken


def test_limits_by_the_number_of_ranks() -> None:
    assert [default_limit(size) for size in (2, 3, 4, 5, 8)] == [1 << 19] * 3 + [1 << 18] * 2


def test_small_sums_go_one_way_and_all_others_the_other(tmp_path: Path) -> None:
    parts = SharedParts(2)

    def rank(number: int) -> list[Tensor]:
        store = torch.distributed.FileStore(str(tmp_path / "store"))
        group = make_group("gloo", number, 2, store, name="test", host="127.0.0.1", timeout=20.0)
        buffer, sum_into, close = parts.sums(number)
        small = OneShotSums(buffer, sum_into, close)
        comm = ProcessGroupComm(group, "gloo", timeout=20.0, small=small)
        sent = [torch.full((n,), float(number + 1), dtype=torch.bfloat16) for n in (8, 512, 520, 5, 16)]
        summed = [comm.all_reduce_(x) for x in sent]
        votes = comm.all_reduce_(torch.tensor([number], dtype=torch.int32))
        assert all(x is y for x, y in zip(sent, summed, strict=True)), "in place"
        comm.close()
        return [*summed, votes]

    for found in ranks(2, rank):
        assert all(bool((x == 3).all()) for x in found[:-1]) and found[-1].tolist() == [1]
    assert parts.sizes == [16, 1024, 32] and parts.closed == 2


# --- agreement ------------------------------------------------------------------------------------------------------


def test_all_ranks_have_it_where_all_can(tmp_path: Path) -> None:
    parts, asked = SharedParts(3), []

    def share(rank: int) -> Share:
        def made(group: Group, limit: int) -> tuple[Tensor, SumInto, Callable[[], None]]:
            asked.append((group.name, limit))
            return parts.sums(rank)

        return made

    found = opened(tmp_path, 3, share, limit=1001)
    assert all(isinstance(sums, OneShotSums) and sums.limit_bytes == 1024 for sums in found)
    assert asked == [("test/one-shot", 992)] * 3


@pytest.mark.parametrize("failing", [[1], [0, 2]])
def test_none_has_it_where_one_cannot_and_all_say_why(tmp_path: Path, failing: list[int]) -> None:
    parts = SharedParts(3)

    def share(rank: int) -> Share:
        def made(group: Group, limit: int) -> tuple[Tensor, SumInto, Callable[[], None]]:
            if rank in failing:
                raise RuntimeError("no rights to map\nwhat others have")
            return parts.sums(rank)

        return made

    assert opened(tmp_path, 3, share) == [f"rank {failing[0]} of 3: no rights to map"] * 3
    assert parts.closed == 3 - len(failing), "what some had they gave back"


def refuse(rank: int) -> Share:
    def made(group: Group, limit: int) -> tuple[Tensor, SumInto, Callable[[], None]]:
        raise AssertionError("it is known before that it cannot be")

    return made


def test_what_is_known_before_is_not_tried(tmp_path: Path) -> None:
    on_cpu = opened(tmp_path, 2, refuse, torch.device("cpu"))
    assert on_cpu == ["rank 0 of 2: memory is shared among cuda devices, not cpu"] * 2
    store = torch.distributed.HashStore()
    many = ranks(9, lambda rank: try_sums(Group(None, store, "many", rank, 9, CUDA), None, refuse(rank)))
    assert many == ["rank 0 of 9: a sum in one shot is for up to 8 ranks, not 9"] * 9


def test_ranks_of_several_hosts_share_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = iter(["node-b", "node-a"])
    monkeypatch.setattr("socket.gethostname", lambda: next(hosts))
    assert opened(tmp_path, 2, refuse) == ["the ranks are on 2 hosts: node-a, node-b"] * 2


def test_why_there_is_none_is_said_by_one_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of torch's own way, which fails here: without a GPU it has no memory to share."""

    def rank(number: int) -> OneShotSums | None:
        store = torch.distributed.FileStore(str(tmp_path / "store"))
        backend = make_group("gloo", number, 2, store, name="test", host="127.0.0.1", timeout=20.0)
        return open_sums(Group(backend, store, "test", number, 2, CUDA), None)

    if torch.cuda.is_available():
        pytest.skip("here it might work")
    assert ranks(2, rank) == [None, None]
    (record,) = [record.getMessage() for record in caplog.records]
    assert record.startswith("small sums go through NCCL as all others do: rank 0 of 2: ") and len(record) > 70


def test_a_group_over_cpus_is_not_asked(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"))
    comm = open_group(
        "gloo",
        0,
        1,
        store,
        name="alone",
        host="127.0.0.1",
        timeout=1.0,
        device=torch.device("cpu"),
        one_shot_bytes=None,
    )
    assert not comm.capturable and not torch.distributed.is_initialized()
    comm.close()


def test_a_group_is_in_torchs_registry_while_it_is_needed(tmp_path: Path) -> None:
    """Without a default group, which belongs to whoever embeds this engine."""
    store = torch.distributed.FileStore(str(tmp_path / "store"))
    backend = make_group("gloo", 0, 1, store, name="alone", host="127.0.0.1", timeout=1.0)
    close = register(Group(backend, store, "alone/one-shot", 0, 1, CUDA))
    resolve = torch._C._distributed_c10d._resolve_process_group
    found = resolve("alone/one-shot")
    assert (found.rank(), found.size(), found.group_name) == (0, 1, "alone/one-shot")
    assert not torch.distributed.is_initialized()
    close()
    with pytest.raises(RuntimeError):
        resolve("alone/one-shot")
