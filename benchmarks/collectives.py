"""Latency of the collectives by size and backend: shared memory beside gloo, as a Markdown report.

    python benchmarks/collectives.py                 2 and 4 ranks, seven rounds
    python benchmarks/collectives.py --rounds 1      a look

All ranks run on this machine, each a process with one thread. The backends take turns within every round, on the same
processes; while one is measured the others wait for nothing. A figure is wall-clock time of a loop / its calls, on the
slowest rank, with the tensors in the caches: median over rounds, smallest and largest in brackets.

"gloo" is what an engine uses across machines: each rank sends to each, and sums are in the order of ranks. "gloo's own"
is the backend's all-reduce, which adds in an order of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from machine import ForeignLoad, describe, num_cores, wait_until_quiet

SHARED, GLOO, OWN = "shared memory", "gloo", "gloo's own"
ALL_REDUCE_BYTES = (256, 4 << 10, 64 << 10, 1 << 20, 16 << 20)
OTHER_BYTES = (4 << 10, 1 << 20)
"""Of the tensor that each rank hands in."""
OTHERS = ("all-gather", "reduce-scatter", "all-to-all", "broadcast", "send and receive")
BUFFER_BYTES = 4 << 20
"""As an engine takes them."""
SECONDS = 0.2
"""Of one measurement, about."""
QUIET_CORES = 0.1
TIMEOUT = 60.0


# --- a rank ---------------------------------------------------------------------------------------------------------


def serve(directory: str, rank: int, size: int, connection: Connection) -> None:
    """Answers (operation, backend, bytes) with seconds a call on this rank."""
    import torch
    import torch.distributed

    from shoal.engine.comm.process_group import ProcessGroupComm, make_group
    from shoal.engine.comm.shared_memory import SharedMemoryComm

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{directory}/store")
    group = make_group("gloo", rank, size, store, name="gloo", host="127.0.0.1", timeout=TIMEOUT)
    comms = {
        SHARED: SharedMemoryComm(f"{directory}/shared", rank, size, timeout=TIMEOUT),
        GLOO: ProcessGroupComm(group, "gloo", timeout=TIMEOUT),
        OWN: ProcessGroupComm(group, "gloo", timeout=TIMEOUT, deterministic=False),
    }
    connection.send(None)
    while True:
        try:
            name, backend, num_bytes = connection.recv()
        except EOFError:
            return
        connection.send(measure(comms[backend], operation_of(name, comms[backend], num_bytes)))


def operation_of(name: str, comm: Any, num_bytes: int) -> Callable[[], Any]:
    import torch

    size, rank = comm.size, comm.rank
    x = torch.zeros(size, num_bytes // 4 // size)
    share = [1] * size
    after, before = (rank + 1) % size, (rank - 1) % size

    def pass_on() -> None:
        """All send to the next rank; not all at once, for a message may be longer than its queue."""
        if rank % 2 == 0:
            comm.send(x, after)
        comm.receive_(x, before)
        if rank % 2:
            comm.send(x, after)

    operations: dict[str, Callable[[], Any]] = {
        "all-reduce": lambda: comm.all_reduce_(x),
        "all-gather": lambda: comm.all_gather(x),
        "reduce-scatter": lambda: comm.reduce_scatter(x),
        "all-to-all": lambda: comm.all_to_all(x, share, share),
        "broadcast": lambda: comm.broadcast_(x, 0),
        "send and receive": pass_on,
    }
    return operations[name]


def measure(comm: Any, operation: Callable[[], Any]) -> float:
    """As many calls as rank 0 finds to take SECONDS."""
    import torch

    count = torch.ones(1, dtype=torch.int64)
    for _ in range(3):  # how long a call takes, more exactly each time
        comm.all_reduce_(torch.zeros(1))
        began = time.perf_counter()
        for _ in range(int(count)):
            operation()
        taken = time.perf_counter() - began
        count.fill_(max(3, min(20_000, int(SECONDS / taken * int(count)))))
        comm.broadcast_(count, 0)
    comm.all_reduce_(torch.zeros(1))
    began = time.perf_counter()
    for _ in range(int(count)):
        operation()
    return (time.perf_counter() - began) / int(count)


# --- the report -----------------------------------------------------------------------------------------------------


class Group:
    """Ranks that answer the same question together."""

    def __init__(self, size: int, directory: str) -> None:
        from shoal.engine.comm.shared_memory import SharedMemoryComm

        self.size = size
        SharedMemoryComm.create(f"{directory}/shared", size, BUFFER_BYTES)
        context = multiprocessing.get_context("spawn")
        self._connections, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(directory, rank, size, theirs), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        for connection in self._connections:
            connection.recv()

    def seconds(self, name: str, backend: str, num_bytes: int) -> float:
        """A call of the slowest rank."""
        for connection in self._connections:
            connection.send((name, backend, num_bytes))
        return max(float(connection.recv()) for connection in self._connections)

    def close(self) -> None:
        for connection, process in zip(self._connections, self._processes, strict=True):
            connection.close()
            process.join()


Case = tuple[str, str, int]
"""Operation, backend, bytes."""


def cases() -> list[Case]:
    reductions = [("all-reduce", backend, n) for n in ALL_REDUCE_BYTES for backend in (SHARED, GLOO, OWN)]
    return reductions + [(name, backend, n) for name in OTHERS for n in OTHER_BYTES for backend in (SHARED, GLOO)]


def compare(size: int, rounds: int) -> dict[Case, list[float]]:
    found: dict[Case, list[float]] = {case: [] for case in cases()}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        group = Group(size, directory)
        for number in range(rounds):
            wait_until_quiet(QUIET_CORES, 30)
            for case in found:
                found[case].append(group.seconds(*case))
            print(f"{size} ranks, round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        group.close()
    return found


def print_tables(size: int, found: dict[Case, list[float]]) -> None:
    print(f"\n## {size} ranks on {num_cores()} cores\n")
    print("| all-reduce, float32 | shared memory µs | gloo µs | gloo's own µs | gloo / shared memory |")
    print("|---|--:|--:|--:|--:|")
    for num_bytes in ALL_REDUCE_BYTES:
        ours, gloo, own = (found["all-reduce", backend, num_bytes] for backend in (SHARED, GLOO, OWN))
        print(f"| {named(num_bytes)} | {spread(ours)} | {spread(gloo)} | {spread(own)} | {ratio(gloo, ours)} |")
    print(
        "\n| operation | bytes of a rank | shared memory µs | gloo µs | gloo / shared memory |\n|---|--:|--:|--:|--:|"
    )
    for name in OTHERS:
        for num_bytes in OTHER_BYTES:
            ours, gloo = found[name, SHARED, num_bytes], found[name, GLOO, num_bytes]
            print(f"| {name} | {named(num_bytes)} | {spread(ours)} | {spread(gloo)} | {ratio(gloo, ours)} |")


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e6:.0f} [{min(seconds) * 1e6:.0f}, {max(seconds) * 1e6:.0f}]"


def ratio(theirs: list[float], ours: list[float]) -> str:
    """Round by round."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return f"{statistics.median(ratios):.1f} [{min(ratios):.1f}, {max(ratios):.1f}]"


def named(num_bytes: int) -> str:
    if num_bytes < 1 << 10:
        return f"{num_bytes} B"
    return f"{num_bytes >> 10} KiB" if num_bytes < 1 << 20 else f"{num_bytes >> 20} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    if options.rounds < 1 or min(options.ranks) < 2:
        parser.error("--rounds must be at least 1 and --ranks at least 2")
    if not Path("/dev/shm").is_dir():
        parser.error("there is no /dev/shm on this machine")
    host = describe()
    load = ForeignLoad()
    results = {size: compare(size, options.rounds) for size in options.ranks}
    busy = load.cores()
    command = " ".join(["python benchmarks/collectives.py", *sys.argv[1:]])
    print(
        f"`{command}`: {host['cpu']}, {host['cores']} cores, {host['system']}, torch {host['torch']}, "
        f"{datetime.now(UTC):%Y-%m-%d}; median of {options.rounds} rounds, smallest and largest in brackets"
    )
    for size, found in results.items():
        print_tables(size, found)
    print(f"\n{busy:.2f} cores were busy with something else meanwhile.")


if __name__ == "__main__":
    main()
