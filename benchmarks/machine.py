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

from shoal.bench.foreign_load import ForeignLoad, tree_seconds, wait_until_quiet

__all__ = ["ForeignLoad", "describe", "measure", "num_cores", "tree_seconds", "wait_until_quiet"]

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


def _proc_fields(path: str) -> dict[str, str]:
    """`key : value` lines, the first of each key."""
    fields: dict[str, str] = {}
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


if __name__ == "__main__":
    print(json.dumps({"machine": describe(), "rates": measure()}))
