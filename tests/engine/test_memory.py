"""Sizing the KV cache: what a machine says it has, and what an engine takes of it."""

import pytest
import torch

from shoal.core.config import EngineConfig
from shoal.engine.memory import (
    OutOfMemory,
    Room,
    available_memory,
    estimated_room,
    format_bytes,
    plan_blocks,
    room_on_host,
)

MIB, GIB = 1024**2, 1024**3
CPU = torch.device("cpu")


def machine(root, files):
    """A fake / with the given files."""
    files = {"proc/meminfo": f"MemTotal: {16 * MIB} kB\nMemFree: 1 kB\nMemAvailable: {8 * MIB} kB\n"} | files
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8 * GIB),
        # Unlimited group.
        ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/memory.max": "max\n", f"{V2}/a/memory.current": "5\n"}, 8 * GIB),
        # Limited: a container sees its own group as the root of the mount, whatever path it is told.
        (
            {
                "proc/self/cgroup": "0::/host/path\n",
                f"{V2}/memory.max": f"{4 * GIB}\n",
                f"{V2}/memory.current": f"{GIB}\n",
            },
            3 * GIB,
        ),
        # The tightest group on the way up counts, and file pages that can be dropped are not in use.
        (
            {
                "proc/self/cgroup": "0::/slice/unit\n",
                f"{V2}/slice/memory.max": f"{2 * GIB}\n",
                f"{V2}/slice/memory.current": f"{GIB}\n",
                f"{V2}/slice/memory.stat": f"anon 5\ninactive_file {512 * MIB}\n",
                f"{V2}/slice/unit/memory.max": f"{6 * GIB}\n",
                f"{V2}/slice/unit/memory.current": f"{GIB}\n",
            },
            GIB + 512 * MIB,
        ),
        # Version 1, beside other controllers.
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/job\n0::/\n",
                f"{V1}/job/memory.limit_in_bytes": f"{3 * GIB}\n",
                f"{V1}/job/memory.usage_in_bytes": f"{2 * GIB}\n",
                f"{V1}/memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}/memory.usage_in_bytes": f"{7 * GIB}\n",
            },
            GIB,
        ),
        # More in use than the limit says.
        ({"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "10\n", f"{V2}/memory.current": "20\n"}, 0),
    ],
    ids=["none", "unlimited", "container", "nested", "version 1", "exceeded"],
)
def test_available_memory(tmp_path, files, expected):
    assert available_memory(CPU, root=machine(tmp_path, files)) == expected


def test_available_memory_of_this_machine_is_a_sane_number():
    assert 16 * MIB < available_memory(CPU) < 2**50


def blocks(available, *, room=room_on_host, max_len=1024, block_bytes=MIB, **config):
    return plan_blocks(
        EngineConfig(model="m", **config), block_bytes=block_bytes, max_len=max_len, room=room(available)
    )


def test_default_on_a_cpu_is_the_least_of_three():
    # 64 sequences of 1,024 tokens in blocks of 16 can use 4,096 blocks.
    assert blocks(5 * GIB) == int(5 * 1024 * 0.4)
    assert blocks(100 * GIB) == 4096
    assert blocks(100 * GIB, max_sequences=2) == 128
    assert blocks(100 * GIB, block_bytes=2 * MIB) == 2048


def test_the_estimate_for_a_device_is_most_of_what_is_free():
    assert blocks(2 * GIB, room=estimated_room) == int(2048 * 0.9)


def test_a_measured_room_is_taken_whole_and_told_of():
    def room(available):
        return Room(available, available // 2, "because of this and that")

    assert blocks(2 * GIB, room=room) == 1024
    with pytest.raises(
        OutOfMemory, match=r"room for 10.0 MiB \(because of this and that\): set max_len to at most 160"
    ):
        plan_blocks(EngineConfig(model="m", max_len=1024), block_bytes=MIB, max_len=1024, room=room(20 * MIB))
    with pytest.raises(OutOfMemory, match=r"20.0 MiB are available \(because of this and that\); set it to at most"):
        blocks(20 * MIB, room=room, kv_cache_bytes=GIB)


def test_an_explicit_size_is_taken_as_it_is():
    assert blocks(5 * GIB, kv_cache_bytes=100 * MIB) == 100
    assert blocks(5 * GIB, kv_cache_bytes=5 * GIB, max_sequences=3) == 192


def test_a_cache_that_holds_no_sequence_of_the_length_asked_for_says_what_would_fit():
    with pytest.raises(OutOfMemory, match=r"needs 64.0 MiB.* room for 10.0 MiB.*max_len to at most 160"):
        plan_blocks(
            EngineConfig(model="m", kv_cache_bytes=10 * MIB, max_len=1024),
            block_bytes=MIB,
            max_len=1024,
            room=room_on_host(5 * GIB),
        )


def test_without_an_explicit_length_sequences_may_be_shorter_but_not_empty():
    assert blocks(5 * GIB, kv_cache_bytes=10 * MIB) == 10
    with pytest.raises(OutOfMemory, match="raise kv_cache_bytes"):
        blocks(5 * GIB, kv_cache_bytes=MIB // 2)


def test_more_than_there_is_is_refused():
    with pytest.raises(OutOfMemory, match=r"asks for 6.0 GiB and 5.0 GiB are available"):
        blocks(5 * GIB, kv_cache_bytes=6 * GIB)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * GIB, "3.0 GiB"), (5 * 1024 * GIB, "5.0 TiB")],
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text
