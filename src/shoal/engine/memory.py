"""How many KV blocks an engine gets: what was asked for, or what the machine has room for.

What a GPU has room for is measured (`sizing.py`). Sizes are bytes. On a CPU the cache is allocated but not touched:
pages that no sequence ever uses cost nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch

from shoal.core.config import EngineConfig

DEFAULT_CPU_KV_BYTES = 4 * 1024**3
"""Most that a CPU engine takes for its KV cache unasked."""
CPU_KV_FRACTION = 0.4
"""Of the memory that is available once the weights are loaded: others use the machine too."""
DEVICE_KV_FRACTION = 0.9
"""Of an accelerator's memory that weights leave, where no step has been measured: an estimate for people."""

_CGROUP_V2 = ("memory.max", "memory.current")
_CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


class OutOfMemory(RuntimeError):
    """The model or its KV cache does not fit. The message says what would."""


class Room(NamedTuple):
    """For a KV cache."""

    available: int
    """What can be asked for at the most."""
    default: int
    """What is taken unasked."""
    why: str = ""
    """How that came about, for people."""


def room_on_host(available: int) -> Room:
    return Room(available, min(int(available * CPU_KV_FRACTION), DEFAULT_CPU_KV_BYTES))


def estimated_room(available: int) -> Room:
    """On an accelerator, before anything is loaded; `available` is what the weights leave."""
    return Room(available, int(available * DEVICE_KV_FRACTION))


def available_memory(device: torch.device, *, root: Path = Path("/")) -> int:
    """Bytes that can be allocated now: a device's free memory; on a CPU what the host and every control group leave.

    `root` is where /proc and /sys are looked for.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return min([_host_available(root), *_cgroup_available(root)])


def _host_available(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # Not Linux: half of the physical memory is a fair guess of what is not in use.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroup_available(root: Path) -> list[int]:
    """What is left under the memory limit of this process's control group and of each one above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, (limit_name, usage_name) = root / "sys/fs/cgroup", _CGROUP_V2
        elif "memory" in controllers.split(","):
            base, (limit_name, usage_name) = root / "sys/fs/cgroup/memory", _CGROUP_V1
        else:
            continue
        # In a container the path is often that of the host and does not exist; the mount's root is then the group.
        group = base / path.lstrip("/")
        for directory in [group, *group.parents]:
            if not directory.is_relative_to(base):
                break
            limit, usage = _read_int(directory / limit_name), _read_int(directory / usage_name)
            if limit is not None and usage is not None:
                reclaimable = _reclaimable(directory / "memory.stat")
                left.append(max(0, limit - max(0, usage - reclaimable)))
    return left


def _read_int(path: Path) -> int | None:
    """A number, or None where there is no such file or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _reclaimable(stat: Path) -> int:
    """File pages that the kernel drops on demand, a mapped checkpoint's among them: usage counts them."""
    try:
        fields = dict(line.split(maxsplit=1) for line in stat.read_text().splitlines())
        return int(fields.get("inactive_file", fields.get("total_inactive_file", "0")))
    except (OSError, ValueError):
        return 0


def plan_blocks(config: EngineConfig, *, block_bytes: int, max_len: int, room: Room) -> int:
    """Number of KV blocks. `block_bytes` is one block of all layers on this rank; `max_len` the longest sequence
    wanted, in tokens.

    Never more than `max_sequences` of `max_len` tokens can use. Raises OutOfMemory if not even one sequence of
    `config.max_len` fits; where that is None the caller may shorten sequences, so one block is enough.
    """
    blocks_per_sequence = -(-max_len // config.block_tokens)
    available, why = room.available, f" ({room.why})" if room.why else ""
    budget = room.default if config.kv_cache_bytes is None else config.kv_cache_bytes
    if budget > available:
        raise OutOfMemory(
            f"kv_cache_bytes asks for {format_bytes(budget)} and {format_bytes(available)} are available{why}; "
            f"set it to at most {available}"
        )
    num_blocks = min(budget // block_bytes, blocks_per_sequence * config.max_sequences)
    needed = 1 if config.max_len is None else blocks_per_sequence
    if num_blocks < needed:
        fits = num_blocks * config.block_tokens
        advice = (
            f"set max_len to at most {fits}" if fits else "raise kv_cache_bytes, free memory or take a smaller model"
        )
        raise OutOfMemory(
            f"the KV cache of one sequence of {needed * config.block_tokens} tokens needs "
            f"{format_bytes(needed * block_bytes)}, and there is room for {format_bytes(budget)} "
            f"({room.why or format_bytes(available) + ' are available'}): {advice}"
        )
    return num_blocks


def format_bytes(count: int) -> str:
    """For people: 512 B, 1.5 MiB, 2.0 GiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
