"""What this machine's devices and links do by themselves: memory, matrix products, launches, all-reduces. Measured.

    python -m shoal.engine.device_timing        a Question as JSON on standard input, DeviceFigures on standard output

It is a program because it must not share a process with an engine: thread pools of torch and of the native kernels
would wait for each other's cores. Ranks of an all-reduce are programs of the same kind (`--rank`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from shoal.core.config import WeightPrecision
from shoal.engine.child import bind_to_parent, first_line, plain

if TYPE_CHECKING:
    import torch

_MATRIX = (512, 2048, 2048)
"""Rows, output and input features: a prompt's chunk times weights that come from memory once."""
_REPEATS = 9
_TIMEOUT = 60.0


class Question(msgspec.Struct, frozen=True, kw_only=True):
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    threads: int = 1
    """Of the CPU, in all."""
    dtypes: tuple[WeightPrecision, ...] = ("float32", "bfloat16", "int8")
    ranks: tuple[int, ...] = ()
    """Sizes of groups to time all-reduces in; each rank has its share of the threads, or a device of its own."""
    sizes: tuple[int, ...] = (256, 4 << 10, 32 << 10, 256 << 10, 1 << 20, 4 << 20)
    """Bytes of the tensor that is reduced."""
    seconds: float = 0.25
    """Of one measurement, about."""
    memory_bytes: int = 512 << 20
    """To read and to copy: several times the last-level cache that a virtual machine is likely to hold for itself."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    message: str


class DeviceFigures(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    name: str
    """Of the device as the system calls it."""
    memory_bytes: int
    read_bandwidth: float
    """Bytes/s of reading alone, as weights are."""
    copy_bandwidth: float
    """Bytes/s read and written together."""
    rates: dict[str, float]
    """Operations/s of large matrix products with weights of each dtype, by the kernels that the engine would use."""
    kernel_seconds: float
    """The least that an operation takes, called from Python."""
    kernels: str
    """Whose: native or torch."""
    all_reduce: dict[int, tuple[tuple[int, float], ...]] = {}
    """By ranks: (bytes, seconds), ascending."""
    all_reduce_by: str = ""


class RankFigures(msgspec.Struct, frozen=True, tag=True):
    seconds: list[float]
    """By size."""


Answer = TypeVar("Answer", DeviceFigures, RankFigures)


def measure(question: Question) -> DeviceFigures:
    """In a process of its own. Raises RuntimeError with what that process said."""
    return _answer(_run([], msgspec.json.encode(question)), DeviceFigures)


def _answer(output: bytes, kind: type[Answer]) -> Answer:
    if not output:
        raise RuntimeError("the device could not be timed: a process that did was killed")
    answer = msgspec.json.decode(output, type=kind | Failed)
    if isinstance(answer, Failed):
        raise RuntimeError(f"the device could not be timed: {answer.message}")
    return cast("Answer", answer)


def _run(arguments: list[str], line: bytes) -> bytes:
    # Standard input stays open until the child ends: its end is how a child learns that its parent is gone.
    child = _start(arguments)
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(line + b"\n")
        child.stdin.flush()
        output = child.stdout.read()
        child.wait()
    finally:
        child.kill()
        child.stdin.close()
        child.stdout.close()
    return output


def _start(arguments: list[str]) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-m", "shoal.engine.device_timing", *arguments]
    return subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


# --- one device -------------------------------------------------------------------------------------------------------


def figures(question: Question) -> DeviceFigures:
    import torch

    from shoal.engine.memory import available_memory
    from shoal.engine.native import unavailable_reason
    from shoal.engine.native_ops import NativeOps
    from shoal.engine.ops import TorchOps

    device = torch.device(question.device)
    on_cpu = device.type == "cpu"
    torch.set_num_threads(question.threads)
    seconds = question.seconds
    read, copy = _bandwidths(device, question.memory_bytes, seconds)
    native = on_cpu and unavailable_reason() is None
    if native:
        torch.set_num_threads(1)
    rates: dict[str, float] = {}
    kernel = 0.0
    for dtype in question.dtypes:
        activations = _activations(on_cpu, dtype)
        ops: Any = NativeOps(threads=question.threads) if native else TorchOps(device, activations)
        rates[dtype] = _rate(ops, device, dtype, activations, seconds)
        x, weight = (torch.ones(shape, dtype=activations, device=device) for shape in ((1, 64), (64,)))
        kernel = _seconds(lambda: ops.rms_norm(x, weight, 1e-6), device, seconds, most=200_000)  # noqa: B023  (called now)
        if native:
            ops.close()
    reduces = {ranks: _all_reduces(question, ranks) for ranks in question.ranks if ranks > 1}
    return DeviceFigures(
        name=device_name(question.device),
        memory_bytes=_memory_bytes() if on_cpu else available_memory(device),
        read_bandwidth=read,
        copy_bandwidth=copy,
        rates=rates,
        kernel_seconds=kernel,
        kernels="native" if native else "torch",
        all_reduce=reduces,
        all_reduce_by=_backend(question.device) if reduces else "",
    )


def _activations(on_cpu: bool, dtype: WeightPrecision) -> torch.dtype:
    """As the worker chooses them."""
    import torch

    return torch.float32 if on_cpu or dtype == "float32" else torch.bfloat16


def _bandwidths(device: torch.device, num_bytes: int, seconds: float) -> tuple[float, float]:
    import torch

    values = torch.ones(num_bytes // 4, device=device)
    # No single reduction is known to be bound by memory on every device: the fastest of several is nearest to it.
    reads: list[Callable[[], Any]] = [values.sum, values.amax, lambda: torch.dot(values, values)]
    read = num_bytes / min(_seconds(operation, device, seconds) for operation in reads)
    target = torch.empty_like(values)
    return read, 2 * num_bytes / _seconds(lambda: target.copy_(values), device, seconds)


def _rate(ops: Any, device: torch.device, dtype: WeightPrecision, activations: torch.dtype, seconds: float) -> float:
    import torch

    rows, n, k = _MATRIX
    x = torch.randn(rows, k, dtype=activations, device=device)
    packed = ops.pack(torch.randn(n, k, device=device), None, dtype)
    return 2 * rows * n * k / _seconds(lambda: ops.linear(x, packed), device, seconds)


def _seconds(operation: Callable[[], Any], device: torch.device, seconds: float, most: int = 1000) -> float:
    """Of one call: the fastest of several loops, each ended by waiting for the device. What disturbs only adds."""
    synchronise = _synchroniser(device)

    def loop(count: int) -> float:
        synchronise()
        began = time.perf_counter()
        for _ in range(count):
            operation()
        synchronise()
        return (time.perf_counter() - began) / count

    loop(2)
    count = max(1, min(most, int(seconds / max(loop(2), 1e-9))))
    return min(loop(max(1, count // _REPEATS)) for _ in range(_REPEATS))


def _synchroniser(device: torch.device) -> Callable[[], None]:
    import torch

    if device.type == "cpu":
        return lambda: None
    module = torch.get_device_module(device)
    return lambda: module.synchronize(device)


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_name(device: str) -> str:
    """As the system calls it: of a device as torch names them."""
    import torch

    kind = torch.device(device)
    return _cpu_name() if kind.type == "cpu" else str(torch.get_device_module(kind).get_device_name(kind))


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    import platform

    return platform.processor() or platform.machine() or "CPU"


# --- several ranks ----------------------------------------------------------------------------------------------------


class RankQuestion(msgspec.Struct, frozen=True, kw_only=True):
    directory: str
    rank: int
    size: int
    device: str
    bytes: tuple[int, ...]
    seconds: float


def _all_reduces(question: Question, ranks: int) -> tuple[tuple[int, float], ...]:
    """Of the slowest rank, by size."""
    from shoal.engine.groups import SHARED_BUFFER_BYTES

    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
        if _backend(question.device) == "shared memory":
            from shoal.engine.comm.shared_memory import SharedMemoryComm

            SharedMemoryComm.create(f"{directory}/shared", ranks, SHARED_BUFFER_BYTES)
        children = [_start(["--rank"]) for _ in range(ranks)]
        try:
            for rank, child in enumerate(children):
                own = RankQuestion(
                    directory=directory,
                    rank=rank,
                    size=ranks,
                    device=question.device,
                    bytes=question.sizes,
                    seconds=question.seconds,
                )
                assert child.stdin is not None
                child.stdin.write(msgspec.json.encode(own) + b"\n")
                child.stdin.flush()
            answers = [child.stdout.read() for child in children if child.stdout is not None]
        finally:
            for child in children:
                child.kill()
                child.wait()
    measured = [_answer(answer, RankFigures).seconds for answer in answers]
    return tuple((size, max(column)) for size, column in zip(question.sizes, zip(*measured, strict=True), strict=True))


def _backend(device: str) -> str:
    from shoal.engine.native import unavailable_reason

    if device.startswith("cuda"):
        return "nccl"
    return "gloo" if unavailable_reason() else "shared memory"


def _rank_seconds(question: RankQuestion) -> list[float]:
    import torch
    import torch.distributed

    from shoal.engine.comm.process_group import open_group
    from shoal.engine.comm.shared_memory import SharedMemoryComm

    torch.set_num_threads(1)
    rank, size, backend = question.rank, question.size, _backend(question.device)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "shared memory":
        comm: Any = SharedMemoryComm(f"{question.directory}/shared", rank, size, timeout=_TIMEOUT)
    else:
        distributed: Any = torch.distributed  # its stubs leave this class out
        store = distributed.FileStore(f"{question.directory}/store")
        comm = open_group(backend, rank, size, store, name="timing", host="127.0.0.1", timeout=_TIMEOUT)
    synchronise = _synchroniser(device)
    seconds = []
    for num_bytes in question.bytes:
        x = torch.zeros(max(1, num_bytes // 4), device=device)
        count = torch.full((1,), 20, dtype=torch.int64, device=device)
        for _ in range(2):  # how often is long enough, as the first rank finds it
            taken = _loop(comm, x, int(count), synchronise)
            count.fill_(max(3, min(10_000, int(question.seconds / _REPEATS / max(taken, 1e-9)))))
            comm.broadcast_(count, 0)
        seconds.append(min(_loop(comm, x, int(count), synchronise) for _ in range(_REPEATS)))
    return seconds


def _loop(comm: Any, x: torch.Tensor, count: int, synchronise: Callable[[], None]) -> float:
    comm.all_reduce_(x)  # all begin together
    synchronise()
    began = time.perf_counter()
    for _ in range(count):
        comm.all_reduce_(x)
    synchronise()
    return (time.perf_counter() - began) / count


def main() -> None:
    line = first_line()
    if not line:
        return
    bind_to_parent()
    try:
        if "--rank" in sys.argv[1:]:
            answer: Any = RankFigures(_rank_seconds(msgspec.json.decode(line, type=RankQuestion)))
        else:
            answer = figures(msgspec.json.decode(line, type=Question))
    except Exception as error:  # whatever it is, the parent says it
        answer = Failed(plain(error))
    sys.stdout.buffer.write(msgspec.json.encode(answer))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
