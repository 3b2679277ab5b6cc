"""Collectives over gloo against the same sums in one process, and what happens when ranks do not come."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed

from shoal.engine.comm.base import Comm, CommError
from shoal.engine.comm.process_group import ProcessGroupComm, make_group, open_group
from tests.engine.comm import operations
from tests.engine.comm.operations import all_reduce_ones, check, receive_one, reduce_until
from tests.engine.comm.ranks import IMPATIENT, PATIENT, Ranks, gloo, open_gloo, wait_for_files


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """A whole group. A test that breaks it makes its own."""
    path = tmp_path_factory.mktemp("comm") / "store"
    with Ranks(gloo(path, request.param), request.param) as ranks:
        assert set(ranks.opened.values()) == {None}
        yield ranks


# --- results --------------------------------------------------------------------------------------------------------


def test_every_operation_gives_what_one_process_computes(ranks: Ranks) -> None:
    results = ranks.run(check, operations.every_operation(ranks.size))
    assert [wrong for wrong, _ in results] == [None] * ranks.size


def test_many_operations_leave_all_ranks_with_the_same_bits(ranks: Ranks) -> None:
    results = ranks.run(check, operations.random_operations(seed=8, count=500))
    assert [wrong for wrong, _ in results] == [None] * ranks.size
    assert len({digest for _, digest in results}) == 1


def send_many(comm: Comm, count: int) -> list[float]:
    """To the next rank, before anything is received; then what came."""
    x = torch.empty(1)
    for i in range(count):
        comm.send(x.fill_(float(i)), (comm.rank + 1) % comm.size)  # at once used again
    return [float(comm.receive_(x, (comm.rank - 1) % comm.size)) for _ in range(count)]


def test_a_tensor_may_be_used_again_when_it_was_sent(ranks: Ranks) -> None:
    assert ranks.run(send_many, 8) == [[float(i) for i in range(8)]] * ranks.size


def check_beside_another_group(comm: Comm, path: str, seed: int) -> list[str | None]:
    second = open_gloo(path, comm.size, PATIENT, "second", comm.rank)
    with ThreadPoolExecutor(2) as threads:
        programs = [operations.random_operations(seed, 100), operations.random_operations(seed + 1, 100)]
        results = list(threads.map(check, [comm, second], programs))
    second.close()
    assert not torch.distributed.is_initialized()
    return [wrong for wrong, _ in results]


def test_two_groups_of_the_same_processes_do_not_meet_and_there_is_no_default_group(
    ranks: Ranks, tmp_path: Path
) -> None:
    assert ranks.run(check_beside_another_group, str(tmp_path / "store"), 11) == [[None, None]] * ranks.size


def torch_sum(comm: ProcessGroupComm) -> bool:
    """By the backend itself: the same up to the order of additions."""
    unordered = ProcessGroupComm(comm._group, "gloo", timeout=60.0, deterministic=False)
    x = torch.randn(1000, generator=torch.Generator().manual_seed(comm.rank))
    expected = comm.all_reduce_(x.clone())
    return torch.allclose(unordered.all_reduce_(x), expected, atol=1e-5)


def test_the_backend_may_add_in_an_order_of_its_own(ranks: Ranks) -> None:
    assert ranks.run(torch_sum) == [True] * ranks.size


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[ProcessGroupComm]:
    """A group of one."""
    store = torch.distributed.FileStore(str(tmp_path / "store"))
    comm = open_group("gloo", 0, 1, store, name="alone", host="127.0.0.1", timeout=1.0)
    yield comm
    comm.close()


def test_a_group_of_one_has_everything_already(alone: ProcessGroupComm) -> None:
    x = torch.arange(3.0)
    assert alone.all_reduce_(x) is x and alone.broadcast_(x, 0) is x
    assert torch.equal(alone.all_gather(x), x[None]) and torch.equal(alone.reduce_scatter(x[None]), x)
    assert torch.equal(alone.all_to_all(x, [3], [3]), x)


# --- what cannot be -------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused(alone: ProcessGroupComm, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        alone.all_reduce_(torch.ones(4, 4).T[:2])
    with pytest.raises(ValueError, match="do not fit"):
        alone.all_to_all(torch.ones(4, 1), [3], [3])
    with pytest.raises(ValueError, match="each of 1 ranks"):
        alone.reduce_scatter(torch.ones(3, 1))
    with pytest.raises(ValueError, match="no rank 1 among 1"):
        alone.broadcast_(torch.ones(1), 1)
    with pytest.raises(ValueError, match="rank 0 is not another"):
        alone.send(torch.ones(1), 0)
    store = torch.distributed.FileStore(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="'mpi' is unknown"):
        make_group("mpi", 0, 1, store, name="x", host="127.0.0.1", timeout=1.0)
    with pytest.raises(CommError, match="rank 0 of 1 could not join"):
        make_group("gloo", 0, 1, store, name="x", host="no.such.host.invalid", timeout=1.0)
    alone.close()
    with pytest.raises(CommError, match="was closed"):
        alone.all_gather(torch.ones(1))


def test_a_rank_that_is_missing_at_the_start_is_named(tmp_path: Path) -> None:
    with Ranks(gloo(tmp_path / "store", 3, timeout=IMPATIENT), 3, only=[0, 2]) as ranks:
        assert all_named(ranks.opened, "rank 1 of 3 did not come within 5 s")


def all_named(answers: dict[int, object], text: str) -> bool:
    return all(isinstance(answer, CommError) and text in str(answer) for answer in answers.values())


def leads_to(answers: dict[int, object], lost: int) -> bool:
    """Whether each rank names the lost one, or one that gave up first and names it: a rank may be a step ahead."""
    blamed: dict[int, int] = {}
    for rank, answer in answers.items():
        found = re.search(r"rank (\d) of 3", str(answer)) if isinstance(answer, CommError) else None
        if found is None:
            return False
        blamed[rank] = int(found[1])
    return all(name == lost or blamed[name] == lost for name in blamed.values())


def test_ranks_that_are_left_alone_go_on_until_they_are_told(tmp_path: Path) -> None:
    """The control of the tests of faults below."""
    with Ranks(gloo(tmp_path / "store", 3), 3) as ranks:
        ranks.start(reduce_until, str(tmp_path))
        wait_for_files(tmp_path / f"began-{rank}" for rank in range(3))
        assert ranks.is_quiet(0.1)
        (tmp_path / "stop").touch()
        counts = ranks.collect()
        assert len(set(counts.values())) == 1 and counts[0] > 10


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_rank_is_named_by_all_others(tmp_path: Path, number: signal.Signals) -> None:
    with Ranks(gloo(tmp_path / "store", 3, timeout=IMPATIENT), 3) as ranks:
        ranks.start(reduce_until, str(tmp_path))
        wait_for_files(tmp_path / f"began-{rank}" for rank in range(3))
        ranks.signal(number, 1)
        answers = ranks.collect([0, 2])
        assert leads_to(answers, 1), answers
        ranks.start(all_reduce_ones, ranks=[0, 2])
        assert {r: str(a) for r, a in ranks.collect([0, 2]).items()} == {r: str(a) for r, a in answers.items()}


def test_the_death_of_a_sender_is_noticed_by_a_patient_receiver(tmp_path: Path) -> None:
    with Ranks(gloo(tmp_path / "store", 2, timeout=1.0), 2) as ranks:
        ranks.start(receive_one, 1, ranks=[0])
        assert ranks.is_quiet(2.0), "receiving is not bound by the timeout"
        ranks.signal(signal.SIGKILL, 1)
        assert all_named(ranks.collect([0]), "receiving from rank 1 of 2")
