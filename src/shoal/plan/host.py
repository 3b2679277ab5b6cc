"""This host as its kernel shows it: CPU, memory, NUMA nodes, network ports, and where PCI devices sit.

`root` is / on a live system; tests give a recorded tree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

Distance = Literal["PIX", "PXB", "PHB", "NODE", "SYS"]
"""As nvidia-smi names paths: one switch, several, one host bridge, one NUMA node, between NUMA nodes."""


class Cpu(msgspec.Struct, frozen=True):
    model: str
    sockets: int
    cores: int
    """That do not share arithmetic units with another, of those this process's container may use."""
    threads: int
    memory_bytes: int
    vector: str = ""
    """The widest instructions: avx512_vnni, avx512f, avx2, or none of them."""


class NumaNode(msgspec.Struct, frozen=True):
    number: int
    cpus: str
    """As the kernel writes them: 0-55,112-167."""
    memory_bytes: int


class Port(msgspec.Struct, frozen=True):
    """Of a network adapter."""

    name: str
    protocol: Literal["infiniband", "roce", "efa", "ethernet"]
    bits_per_second: float | None
    active: bool
    bus: str = ""
    numa: int = -1
    generation: str = ""
    """Of InfiniBand: NDR."""


def read(file: Path) -> str:
    """Of a kernel's file; empty where there is none or it cannot be read, as many cannot."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(text: str, default: int = 0) -> int:
    match = re.match(r"-?\d+", text)
    return int(match[0]) if match else default


def read_cpu(root: Path) -> Cpu:
    blocks = [_fields(block) for block in read(root / "proc/cpuinfo").split("\n\n") if block.strip()]
    first = blocks[0] if blocks else {}
    # Hosts that do not say which threads share a core (virtual machines, ARM) are taken at one thread a core.
    cores = {(one.get("physical id", "0"), one.get("core id", str(at))) for at, one in enumerate(blocks)}
    sockets = {one.get("physical id", "0") for one in blocks}
    threads = len(blocks) or 1
    flags = first.get("flags", first.get("Features", "")).split()
    total = _number(_fields(read(root / "proc/meminfo")).get("MemTotal", "")) * 1024
    limit = read(root / "sys/fs/cgroup/memory.max")
    quota = re.fullmatch(r"(\d+) (\d+)", read(root / "sys/fs/cgroup/cpu.max"))
    usable = len(cores) or 1
    if quota:
        usable = max(1, min(usable, int(quota[1]) // int(quota[2])))
    return Cpu(
        model=first.get("model name", first.get("CPU part", "unknown")),
        sockets=len(sockets) or 1,
        cores=usable,
        threads=threads,
        memory_bytes=min(total, int(limit)) if limit.isdigit() and total else total,
        vector=next((flag for flag in ("avx512_vnni", "avx512f", "avx2") if flag in flags), ""),
    )


def _fields(text: str) -> dict[str, str]:
    """`name : value` lines."""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def read_numa(root: Path) -> tuple[NumaNode, ...]:
    found = []
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        total = re.search(r"MemTotal:\s+(\d+) kB", read(folder / "meminfo"))
        memory = int(total[1]) * 1024 if total else 0
        found.append(NumaNode(int(folder.name[4:]), read(folder / "cpulist"), memory))
    return tuple(sorted(found, key=lambda node: node.number))


def read_ports(root: Path) -> tuple[Port, ...]:
    """Ports for RDMA, then Ethernet interfaces of adapters that have none."""
    rdma = list(_rdma_ports(root))
    taken = {port.bus for port in rdma}
    ethernet = [port for port in _ethernet_ports(root) if port.bus not in taken]
    return (*rdma, *ethernet)


def _rdma_ports(root: Path) -> Iterator[Port]:
    for adapter in _sorted(root / "sys/class/infiniband"):
        bus, numa = _place(adapter / "device")
        driver = (adapter / "device/driver").resolve().name
        for port in _sorted(adapter / "ports"):
            # "400 Gb/sec (4X NDR)"
            rate = re.match(r"([\d.]+) Gb/sec(?: \(\d+X (\w+)\))?", read(port / "rate"))
            ethernet = read(port / "link_layer").lower() == "ethernet"
            name = adapter.name if port.name == "1" else f"{adapter.name}:{port.name}"
            yield Port(
                name=name,
                protocol="efa" if driver == "efa" else "roce" if ethernet else "infiniband",
                bits_per_second=float(rate[1]) * 1e9 if rate else None,
                active="ACTIVE" in read(port / "state"),
                bus=bus,
                numa=numa,
                generation=(rate[2] or "") if rate and not ethernet else "",
            )


def _ethernet_ports(root: Path) -> Iterator[Port]:
    for interface in _sorted(root / "sys/class/net"):
        if not (interface / "device").exists():
            continue  # loopback, bridges and the like
        bus, numa = _place(interface / "device")
        speed = _number(read(interface / "speed"), -1)
        yield Port(
            name=interface.name,
            protocol="ethernet",
            bits_per_second=speed * 1e6 if speed > 0 else None,
            active=read(interface / "operstate") == "up",
            bus=bus,
            numa=numa,
        )


def _sorted(folder: Path) -> list[Path]:
    def key(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]

    try:
        return sorted(folder.iterdir(), key=key)
    except OSError:
        return []


def _place(device: Path) -> tuple[str, int]:
    """A device's PCI address and NUMA node (-1: the kernel does not say)."""
    name = device.resolve().name
    bus = name if re.fullmatch(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.\d", name) else ""
    return bus, _number(read(device / "numa_node"), -1)


def pci_path(root: Path, bus: str) -> tuple[str, ...]:
    """From the root complex down to a device: ("pci0000:15", "0000:15:01.0", ...); empty if it is not there."""
    entry = root / "sys/bus/pci/devices" / bus.lower()
    if not entry.exists():
        return ()
    return tuple(part for part in entry.resolve().parts if re.fullmatch(r"pci[0-9a-f:]+|[0-9a-f]+:[\w:]+\.\d", part))


def numa_of(root: Path, bus: str) -> int:
    return _number(read(root / "sys/bus/pci/devices" / bus.lower() / "numa_node"), -1)


def pci_distance(root: Path, a: str, b: str) -> Distance:
    """How far two PCI devices are apart. Those of which nothing is known are as far as can be."""
    one, other = pci_path(root, a), pci_path(root, b)
    if not one or not other or one[0] != other[0]:
        near = numa_of(root, a)
        return "NODE" if near >= 0 and near == numa_of(root, b) else "SYS"
    common = next((at for at, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))
    if common == 1:
        return "PHB"
    # Below the shared switch each has a port of it, then itself; more is a further switch.
    return "PIX" if max(len(one), len(other)) - common <= 2 else "PXB"
