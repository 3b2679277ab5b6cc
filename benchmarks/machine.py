"""What this machine can do: float32 GEMM rate, memory read bandwidth, and what it is.

    python benchmarks/machine.py            one JSON object

Both rates are of torch's own kernels on every core that the process may use; they are the yardsticks that the engines'
work is divided by. They are measured in a process of their own: threads of torch's OpenMP pool would otherwise spin
beside the engine that is measured next.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GEMM_SIZE = 2048
"""M = N = K: 17 GFLOP, far beyond any cache of a core."""
READ_BYTES = 1 << 30
"""Several times the last-level cache that a virtual machine is likely to hold for itself."""
SIMD_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")


def measure(repeats: int = 9) -> dict[str, float]:
    """`gemm_gflops` (10^9 float32 operations a second) and `read_gbps` (10^9 bytes a second); medians."""
    import torch

    torch.set_num_threads(num_cores())
    a_MK, b_KN = torch.rand(GEMM_SIZE, GEMM_SIZE), torch.rand(GEMM_SIZE, GEMM_SIZE)
    out_MN = torch.empty(GEMM_SIZE, GEMM_SIZE)
    gemm_s = _median_seconds(lambda: torch.mm(a_MK, b_KN, out=out_MN), repeats)
    values = torch.ones(READ_BYTES // 4)
    # No single reduction is known to be bound by memory on every CPU: the fastest of several is nearest to it.
    reads: list[Callable[[], Any]] = [values.sum, values.amax, lambda: torch.dot(values, values)]
    read_s = min(_median_seconds(read, repeats) for read in reads)
    return {"gemm_gflops": 2 * GEMM_SIZE**3 / gemm_s / 1e9, "read_gbps": READ_BYTES / read_s / 1e9}


def _median_seconds(operation: Callable[[], Any], repeats: int) -> float:
    operation()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        operation()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def describe() -> dict[str, Any]:
    """CPU, memory, system, versions of Python and torch."""
    import torch

    cpu = _proc_fields("/proc/cpuinfo")
    flags = set(cpu.get("flags", "").split())
    memory_kib = int(_proc_fields("/proc/meminfo").get("MemTotal", "0 kB").split()[0])
    return {
        "cpu": cpu.get("model name", platform.processor() or "unknown"),
        "cores": num_cores(),
        "simd": [flag for flag in SIMD_FLAGS if flag in flags],
        "cache_per_socket": cpu.get("cache size", "unknown"),
        "memory_gib": round(memory_kib / 2**20, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


class ForeignLoad:
    """How many cores were busy, since this object was made, with what is not part of the benchmark.

    A barrier of two threads on two cores waits whenever anything else runs, so a busy neighbour costs more than its
    share: a run with a foreign load is not a result. Includes time that the hypervisor stole.
    """

    def __init__(self, measured: int | None = None) -> None:
        """`measured`: a process that counts as the benchmark with all its descendants, as do this process and the
        children that it has waited for.
        """
        self._measured = measured
        self._began = time.monotonic()
        self._foreign_seconds = self._read()

    def cores(self) -> float:
        return max(0.0, self._read() - self._foreign_seconds) / (time.monotonic() - self._began)

    def _read(self) -> float:
        return _busy_seconds() - sum(os.times()[:4]) - tree_seconds(self._measured)


def wait_until_quiet(most_cores: float, patience: float, interval: float = 2.0) -> bool:
    """Sleep until others kept no more than `most_cores` busy over one `interval`. False if they never did.

    Gives up after `patience` seconds; 0 does not look at all.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        foreign = ForeignLoad()
        time.sleep(interval)
        if foreign.cores() <= most_cores:
            return True
    return False


def _busy_seconds() -> float:
    """CPU seconds of all cores since boot, idle and waiting for disks left out."""
    user, nice, system, _, _, irq, soft_irq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")


def tree_seconds(root: int | None) -> float:
    """CPU seconds of a process and its descendants, and of the children that they have waited for."""
    if root is None:
        return 0.0
    ticks: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # proc(5): behind the command's name, which may hold anything, come state, parent, group, ...
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        ticks[int(entry.name)] = sum(map(int, fields[11:15]))
        children.setdefault(int(fields[1]), []).append(int(entry.name))
    total, left = 0, [root]
    while left:
        process = left.pop()
        total += ticks.get(process, 0)
        left += children.get(process, [])
    return total / os.sysconf("SC_CLK_TCK")


def _proc_fields(path: str) -> dict[str, str]:
    """`key : value` lines, the first of each key."""
    fields: dict[str, str] = {}
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


if __name__ == "__main__":
    print(json.dumps({"machine": describe(), "rates": measure()}))
