"""Collectives over shared memory against the same sums in one process, and what happens when ranks do not come."""

from __future__ import annotations

import os
import resource
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.comm import shared_memory
from shoal.engine.comm.base import Comm, CommError
from shoal.engine.comm.shared_memory import SharedMemoryComm
from shoal.engine.native import unavailable_reason
from tests.engine.comm import operations
from tests.engine.comm.operations import Operation, all_reduce_ones, check, receive_one, reduce_until
from tests.engine.comm.ranks import IMPATIENT, PATIENT, Ranks, wait_for_files
from tests.engine.comm.ranks import shared_memory as shared_memory_group

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """A whole group. A test that breaks it makes its own."""
    path = tmp_path_factory.mktemp("comm") / "group"
    with Ranks(shared_memory_group(path, request.param), request.param) as ranks:
        assert set(ranks.opened.values()) == {None}
        yield ranks


# --- results --------------------------------------------------------------------------------------------------------


def test_every_operation_gives_what_one_process_computes(ranks: Ranks) -> None:
    results = ranks.run(check, operations.every_operation(ranks.size))
    assert [wrong for wrong, _ in results] == [None] * ranks.size


def test_thousands_of_operations_leave_all_ranks_with_the_same_bits(ranks: Ranks) -> None:
    results = ranks.run(check, operations.random_operations(seed=7, count=3000))
    assert [wrong for wrong, _ in results] == [None] * ranks.size
    assert len({digest for _, digest in results}) == 1


ANY_OPERATION = st.builds(
    Operation,
    kind=st.sampled_from(operations.KINDS),
    dtype=st.sampled_from(list(operations.DTYPES)),
    length=st.integers(0, 300) | st.sampled_from(operations.LENGTHS),
    seed=st.integers(0, 1000),
    rank=st.integers(0, 3),
)


@settings(max_examples=40, deadline=None)
@given(program=st.lists(ANY_OPERATION, min_size=1, max_size=12))
def test_any_sequence_of_operations_is_right(ranks: Ranks, program: list[Operation]) -> None:
    results = ranks.run(check, program)
    assert [wrong for wrong, _ in results] == [None] * ranks.size
    assert len({digest for _, digest in results}) == 1


def by_pairs(comm: Comm, count: int) -> int:
    """Everybody sends short messages of growing length to everybody; how many came as they should, in order."""
    others = [r for r in range(comm.size) if r != comm.rank]
    right = 0
    for number in range(0, count, 4):  # a queue holds some
        for other in others:
            for i in range(number, number + 4):
                comm.send(torch.full((i,), comm.rank * 1000 + i), other)
        for other in others:
            for i in range(number, number + 4):
                received = comm.receive_(torch.empty(i, dtype=torch.int64), other)
                right += bool((received == other * 1000 + i).all())
    return right


def test_messages_come_in_the_order_in_which_each_rank_sent_them(ranks: Ranks) -> None:
    assert ranks.run(by_pairs, 100) == [100 * (ranks.size - 1)] * ranks.size


def check_beside_another_group(comm: Comm, path: str, seed: int) -> list[str | None]:
    second = SharedMemoryComm(path, comm.rank, comm.size, timeout=PATIENT)
    with ThreadPoolExecutor(2) as threads:
        programs = [operations.random_operations(seed, 300), operations.random_operations(seed + 1, 300)]
        results = list(threads.map(check, [comm, second], programs))
    second.close()
    return [wrong for wrong, _ in results]


def test_two_groups_of_the_same_processes_do_not_meet(ranks: Ranks, tmp_path: Path) -> None:
    SharedMemoryComm.create(str(tmp_path / "second"), ranks.size, 1 << 16)
    assert ranks.run(check_beside_another_group, str(tmp_path / "second"), 11) == [[None, None]] * ranks.size


def cpu_share_of_waiting(comm: Comm, seconds: float) -> float:
    """Rank 0 comes late. The share of a core that this rank used while it waited, which a busy machine makes less."""
    comm.all_reduce_(torch.ones(1))
    wall, cpu = time.monotonic(), time.process_time()
    if comm.rank == 0:
        time.sleep(seconds)
    comm.all_reduce_(torch.ones(1))
    return (time.process_time() - cpu) / (time.monotonic() - wall)


def test_whoever_waits_leaves_the_core_to_others(ranks: Ranks) -> None:
    assert max(ranks.run(cpu_share_of_waiting, 1.0)) < 0.25


def test_a_group_of_one_has_everything_already(tmp_path: Path) -> None:
    path = str(tmp_path / "group")
    SharedMemoryComm.create(path, 1, 1 << 16)
    comm, x = SharedMemoryComm(path, 0, 1), torch.arange(30_000.0)
    assert comm.all_reduce_(x) is x and comm.broadcast_(x, 0) is x
    assert torch.equal(comm.all_gather(x), x[None]) and torch.equal(comm.reduce_scatter(x[None]), x)
    assert torch.equal(comm.all_to_all(x, [30_000], [30_000]), x)
    comm.close()


# --- the file -------------------------------------------------------------------------------------------------------


def test_the_file_is_for_its_user_alone_and_may_go_once_all_are_there(tmp_path: Path) -> None:
    path = Path(f"/dev/shm/shoal-test-{os.getpid()}")
    with Ranks(shared_memory_group(path, 2), 2) as ranks:
        try:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        finally:
            path.unlink()
        assert ranks.run(check, operations.random_operations(3, 50))[0][0] is None
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(path.name)]


def test_a_file_that_does_not_fit_is_an_error_and_not_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "group"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(CommError, match="too large"):
            SharedMemoryComm.create(str(path), 2, 1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not path.exists()
    SharedMemoryComm.create(str(path), 2, 1 << 20)  # the control


def test_files_that_are_no_group(tmp_path: Path) -> None:
    path = tmp_path / "group"
    with pytest.raises(CommError, match="No such file"):
        SharedMemoryComm(str(path), 0, 2)
    path.write_bytes(b"something else" * 1000)
    with pytest.raises(CommError, match="not the shared memory of a group"):
        SharedMemoryComm(str(path), 0, 2)
    with pytest.raises(CommError, match="not the shared memory of a group"):
        shared_memory.abort(str(path))
    with pytest.raises(CommError, match="exists"):
        SharedMemoryComm.create(str(path), 2, 1 << 16)
    with pytest.raises(ValueError, match="1 to 64"):
        SharedMemoryComm.create(str(tmp_path / "other"), 65, 1 << 16)


@pytest.mark.parametrize(
    ("offset", "written", "message"),
    [
        (0, b"\0", "not the shared memory of a group"),
        (8, b"\x63", "its layout is 99, ours 2"),
        (12, b"\x03", "a group of 3 ranks, not of 2"),
        (12, b"\0", "header is damaged"),
        (19, b"\x01", "cut short"),
    ],
    ids=["magic", "version", "size", "no rank", "buffers"],
)
def test_headers_that_do_not_fit(tmp_path: Path, offset: int, written: bytes, message: str) -> None:
    path = tmp_path / "group"
    SharedMemoryComm.create(str(path), 3 if offset == 12 and written == b"\x03" else 2, 1 << 16)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(written)
    with pytest.raises(CommError, match=message):
        SharedMemoryComm(str(path), 0, 2)


def test_a_seat_is_taken_once(tmp_path: Path) -> None:
    path = str(tmp_path / "group")
    SharedMemoryComm.create(path, 2, 1 << 16)
    first = SharedMemoryComm(path, 0, 2)
    with pytest.raises(CommError, match="rank 0 is taken"):
        SharedMemoryComm(path, 0, 2)
    SharedMemoryComm(path, 1, 2).close()
    with pytest.raises(CommError, match="rank 1 is taken"):
        SharedMemoryComm(path, 1, 2)  # others count on what the first one has read
    first.close()
    with pytest.raises(ValueError, match="no rank 2 among 2"):
        SharedMemoryComm(path, 2, 2)


def test_without_kernels_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "unavailable_reason", lambda: "there is no compiler")
    with pytest.raises(RuntimeError, match="there is no compiler"):
        SharedMemoryComm(str(tmp_path / "group"), 0, 2)
    with pytest.raises(RuntimeError, match="there is no compiler"):
        SharedMemoryComm.create(str(tmp_path / "group"), 2, 1 << 16)


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[SharedMemoryComm]:
    """The one rank of two that came."""
    SharedMemoryComm.create(str(tmp_path / "group"), 2, 1 << 16)
    comm = SharedMemoryComm(str(tmp_path / "group"), 0, 2, timeout=0.2)
    yield comm
    comm.close()


def test_bad_arguments_are_refused(alone: SharedMemoryComm) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        alone.all_reduce_(torch.ones(4, 4).T[:2])
    with pytest.raises(ValueError, match="not torch.float16"):
        alone.all_reduce_(torch.ones(4, dtype=torch.float16))
    for send_counts, receive_counts in [([1, 1], [1, 1]), ([4], [4]), ([-1, 5], [-1, 0]), ([2, 2], [1, 2])]:
        with pytest.raises(ValueError, match="do not fit"):
            alone.all_to_all(torch.ones(4, 1), send_counts, receive_counts)
    for x in (torch.ones(3, 1), torch.ones(())):
        with pytest.raises(ValueError, match="each of 2 ranks"):
            alone.reduce_scatter(x)
    with pytest.raises(ValueError, match="no rank 2 among 2"):
        alone.broadcast_(torch.ones(1), 2)
    with pytest.raises(ValueError, match="rank 0 is not another"):
        alone.send(torch.ones(1), 0)
    with pytest.raises(ValueError, match="rank 2 is not another"):
        alone.receive_(torch.ones(1), 2)
    with pytest.raises(ValueError, match="moves CPU tensors"):
        alone.all_gather(torch.ones(1, device="meta"))


def test_a_rank_that_never_comes_is_named_and_the_group_is_broken(alone: SharedMemoryComm) -> None:
    for _ in range(2):
        with pytest.raises(CommError, match=r"rank 1 of 2 did not come within 0.2 s"):
            alone.all_reduce_(torch.ones(1))
    with pytest.raises(CommError, match=r"rank 1 of 2 did not come"):
        alone.receive_(torch.ones(1), 1)
    alone.close()
    with pytest.raises(CommError, match="was closed"):
        alone.all_reduce_(torch.ones(1))


def all_named(answers: dict[int, object], text: str) -> bool:
    return all(isinstance(answer, CommError) and text in str(answer) for answer in answers.values())


def test_ranks_that_are_left_alone_go_on_until_they_are_told(tmp_path: Path) -> None:
    """The control of the tests of faults below."""
    with Ranks(shared_memory_group(tmp_path / "group", 3), 3) as ranks:
        ranks.start(reduce_until, str(tmp_path))
        wait_for_files(tmp_path / f"began-{rank}" for rank in range(3))
        assert ranks.is_quiet(0.1)
        (tmp_path / "stop").touch()
        counts = ranks.collect()
        assert len(set(counts.values())) == 1 and counts[0] > 10


@pytest.mark.parametrize(
    ("number", "timeout", "message"),
    [
        (signal.SIGKILL, PATIENT, "rank 1 of 3 is gone"),
        (signal.SIGSTOP, IMPATIENT, "rank 1 of 3 did not come within 5 s"),
    ],
    ids=["killed", "stopped"],
)
def test_a_lost_rank_is_named_by_all_others(
    tmp_path: Path, number: signal.Signals, timeout: float, message: str
) -> None:
    """The death of one is noticed long before the timeout."""
    with Ranks(shared_memory_group(tmp_path / "group", 3, timeout=timeout), 3) as ranks:
        ranks.start(reduce_until, str(tmp_path))
        wait_for_files(tmp_path / f"began-{rank}" for rank in range(3))
        ranks.signal(number, 1)
        assert all_named(ranks.collect([0, 2]), message)
        ranks.start(all_reduce_ones, ranks=[0, 2])
        assert all_named(ranks.collect([0, 2]), message), "broken from then on"


def test_the_death_of_a_sender_is_noticed_by_a_patient_receiver(tmp_path: Path) -> None:
    with Ranks(shared_memory_group(tmp_path / "group", 2), 2) as ranks:
        ranks.start(receive_one, 1, ranks=[0])
        assert ranks.is_quiet(0.5)
        ranks.signal(signal.SIGKILL, 1)
        assert all_named(ranks.collect([0]), "rank 1 of 2 is gone")


def leave(comm: Comm) -> None:
    comm.all_reduce_(torch.ones(1))
    comm.close()


def test_a_rank_that_left_is_not_waited_for(tmp_path: Path) -> None:
    with Ranks(shared_memory_group(tmp_path / "group", 2), 2) as ranks:
        ranks.start(leave, ranks=[1])
        ranks.start(all_reduce_ones, ranks=[0])
        assert ranks.collect() == {0: 2.0, 1: None}
        ranks.start(all_reduce_ones, ranks=[0])
        assert all_named(ranks.collect([0]), "rank 1 of 2 is gone")


def test_who_waits_itself_is_not_blamed(tmp_path: Path) -> None:
    """Rank 0 waits for rank 1, which waits for rank 2, which does nothing."""
    with Ranks(shared_memory_group(tmp_path / "group", 3, timeout=IMPATIENT), 3) as ranks:
        ranks.start(receive_one, 2, ranks=[1])
        ranks.start(all_reduce_ones, ranks=[0])
        assert all_named(ranks.collect([0, 1]), "rank 2 of 3 did not come")


def test_time_in_which_a_rank_was_itself_stopped_does_not_count(tmp_path: Path) -> None:
    with Ranks(shared_memory_group(tmp_path / "group", 2, timeout=3.0), 2) as ranks:
        ranks.start(reduce_until, str(tmp_path))
        wait_for_files(tmp_path / f"began-{rank}" for rank in range(2))
        ranks.signal(signal.SIGSTOP, 0, 1)
        time.sleep(4.0)
        ranks.signal(signal.SIGCONT, 0, 1)
        (tmp_path / "stop").touch()
        counts = ranks.collect()
        assert counts[0] == counts[1]


def test_ranks_that_compute_different_things_are_told(tmp_path: Path) -> None:
    with Ranks(shared_memory_group(tmp_path / "group", 2), 2) as ranks:
        ranks.start(all_reduce_ones, 3, ranks=[0])
        ranks.start(all_reduce_ones, 4, ranks=[1])
        assert all_named(ranks.collect(), "ranks 0 and 1 of 2 called different operations")


def send_three_floats(comm: Comm, to: int) -> None:
    comm.send(torch.ones(3), to)


def all_to_all_of(comm: Comm, sent: list[int], received: list[int]) -> float:
    return float(comm.all_to_all(torch.ones(sum(sent), 2), sent, received).sum())


def test_messages_of_another_size_than_expected_are_told(tmp_path: Path) -> None:
    with Ranks(shared_memory_group(tmp_path / "messages", 2), 2) as ranks:
        ranks.start(send_three_floats, 1, ranks=[0])
        ranks.start(receive_one, 0, ranks=[1])
        assert all_named({1: ranks.collect()[1]}, "ranks 0 and 1 of 2 called different operations")
    with Ranks(shared_memory_group(tmp_path / "rows", 2), 2) as ranks:
        ranks.start(all_to_all_of, [1, 5], [1, 2], ranks=[0])
        ranks.start(all_to_all_of, [3, 0], [5, 0], ranks=[1])  # rank 0 expects 2 of them
        assert all_named({0: ranks.collect()[0]}, "ranks 1 and 0 of 2 called different operations")


# --- giving up ------------------------------------------------------------------------------------------------------


def test_abort_from_outside_wakes_whoever_waits_however_patiently(tmp_path: Path) -> None:
    path = tmp_path / "group"
    with Ranks(shared_memory_group(path, 3, timeout=1000.0), 3) as ranks:
        ranks.start(receive_one, 1, ranks=[0])
        ranks.start(all_reduce_ones, ranks=[2])
        assert ranks.is_quiet(1.5)
        shared_memory.abort(str(path))
        assert all_named(ranks.collect([0, 2]), "the group of 3 ranks was aborted")
        ranks.start(all_reduce_ones, ranks=[1])
        assert all_named(ranks.collect([1]), "was aborted")


def test_abort_from_another_thread_wakes_a_receiver(alone: SharedMemoryComm) -> None:
    timer = threading.Timer(0.5, alone.abort)
    timer.start()
    with pytest.raises(CommError, match="was aborted"):
        alone.receive_(torch.ones(1), 1)
    timer.join()


def test_a_signal_reaches_python_while_a_rank_receives(alone: SharedMemoryComm) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    receiver = threading.get_ident()

    def send() -> None:
        """Once the receiver waits in native code."""
        while sys._current_frames()[receiver].f_code.co_name != "_patiently":
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGUSR1)

    sender = threading.Thread(target=send)
    try:
        sender.start()
        with pytest.raises(Interrupted):
            alone.receive_(torch.ones(1), 1)
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, before)
    with pytest.raises(CommError, match="was aborted"):  # a message may have come in part
        alone.receive_(torch.ones(1), 1)
