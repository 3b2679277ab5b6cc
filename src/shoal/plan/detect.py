"""What this host is, and the job that it is in, as a topology file: devices, links between them, network ports.

Everything comes through parameters (a root directory, NVML, a job), so that a recorded host is read as a live one is.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from shoal.core.hardware import DeviceSpec
from shoal.plan.catalogue import Catalogue, CatalogueError
from shoal.plan.host import Cpu, NumaNode, Port, numa_of, pci_distance, read, read_cpu, read_numa, read_ports
from shoal.plan.job_nodes import Job, JobNode
from shoal.plan.nvml import Gpu, Gpus, NoNvml, Pair, read_gpus

MIB = 1 << 20
_INFINIBAND = {200e9: "infiniband-hdr", 400e9: "infiniband-ndr", 800e9: "infiniband-xdr"}
_ROCE = {100e9: "roce-100", 200e9: "roce-200", 400e9: "roce-400"}
_EFA = {400e9: "efa-400"}
_TCP = {10e9: "tcp-10", 25e9: "tcp-25", 100e9: "tcp-100"}
_LINKS = {"infiniband": _INFINIBAND, "roce": _ROCE, "efa": _EFA, "ethernet": _TCP}


class Detected(msgspec.Struct, frozen=True, kw_only=True):
    host: str
    cpu: Cpu
    numa: tuple[NumaNode, ...]
    ports: tuple[Port, ...]
    gpus: Gpus | None = None
    gpu_numa: tuple[int, ...] = ()
    gpu_port: tuple[tuple[str, ...], ...] = ()
    """By GPU and by port of `rdma`: how far they are apart (PIX, PXB, PHB, NODE, SYS)."""
    job: Job | None = None
    notes: tuple[str, ...] = ()
    """What could not be seen, and what to do about it."""

    @property
    def rdma(self) -> tuple[Port, ...]:
        return tuple(port for port in self.ports if port.protocol != "ethernet")


def detect(root: Path, nvml: Any | NoNvml, job: Job | None = None) -> Detected:
    """`nvml` is pynvml, an object like it, or why there is none."""
    notes = []
    gpus: Gpus | None = None
    try:
        if isinstance(nvml, NoNvml):
            raise nvml
        gpus = read_gpus(nvml)
    except NoNvml as reason:
        notes.append(str(reason))
    if gpus is not None and not gpus.gpus:
        notes.append(
            "no NVIDIA devices: NVML sees none (is CUDA_VISIBLE_DEVICES or the container's runtime in the way?)"
        )
        gpus = None
    ports = read_ports(root)
    rdma = [port for port in ports if port.protocol != "ethernet"]
    found = gpus.gpus if gpus else ()
    return Detected(
        host=read(root / "proc/sys/kernel/hostname").split(".")[0] or "host",
        cpu=read_cpu(root),
        numa=read_numa(root),
        ports=ports,
        gpus=gpus,
        gpu_numa=tuple(numa_of(root, gpu.bus) for gpu in found),
        gpu_port=tuple(tuple(pci_distance(root, gpu.bus, port.bus) for port in rdma) for gpu in found),
        job=job,
        notes=tuple(notes),
    )


class Topology(msgspec.Struct, frozen=True):
    """What a topology file holds, and what to tell the user about it."""

    tree: dict[str, Any]
    notes: tuple[str, ...]


def topology(detected: Detected, catalogue: Catalogue) -> Topology:
    """As `cluster()` reads it."""
    notes = list(detected.notes)
    node = _gpu_node(detected, catalogue, notes) if detected.gpus else _cpu_node(detected, notes)
    node["host_memory_bytes"] = _mebibytes(detected.cpu.memory_bytes)
    node["facts"] = _facts(detected)
    nodes: dict[str, Any] = {detected.host: node}
    if detected.job is not None:
        nodes = _job_nodes(detected, node, catalogue, notes)
    tree: dict[str, Any] = {"name": detected.host if len(nodes) == 1 else f"{len(nodes)} nodes", "nodes": nodes}
    if len(nodes) > 1:
        tree["links"] = [_network(detected.ports, int(node["count"]), notes)]
    return Topology(tree, tuple(notes))


def _mebibytes(count: int) -> str:
    return f"{max(1, count // MIB)}MiB"


def _cpu_node(detected: Detected, notes: list[str]) -> dict[str, Any]:
    cores = detected.cpu.cores
    notes.append("rates of the CPU are rough: `shoal calibrate` measures them")
    share = {"memory_bytes": _mebibytes(detected.cpu.memory_bytes // cores)} if detected.cpu.memory_bytes else {}
    source = "measured: /proc/meminfo, divided by cores"
    return {"device": {"like": "cpu", **share, "source": source}, "count": cores}


def _gpu_node(detected: Detected, catalogue: Catalogue, notes: list[str]) -> dict[str, Any]:
    gpus = detected.gpus
    assert gpus is not None
    (name, _), *others = Counter(gpu.name for gpu in gpus.gpus).most_common()
    if others:
        rest = ", ".join(f"{count} x {other}" for other, count in others)
        notes.append(f"devices of a node must be equal: of this host only the {name} are written down, not {rest}")
    chosen = [gpu for gpu in gpus.gpus if gpu.name == name]
    device: DeviceSpec | None
    try:
        device = catalogue.device(name)
    except CatalogueError as error:
        device = None
        notes.append(f"{error}; describe it in a hardware file before you plan with it")
    label: Any = name
    if device is not None:
        memory = _mebibytes(min(gpu.memory_bytes for gpu in chosen))
        label = {"like": device.name, "memory_bytes": memory, "source": "measured: NVML"}
    node: dict[str, Any] = {"device": label, "count": len(chosen)}
    generation = min(gpu.pcie_generation for gpu in chosen)
    pcie = f"pcie{generation}"
    if device is not None and catalogue.has_link(pcie) and device.host_link.startswith("pcie"):
        node["host_link"] = pcie
    lanes = min(gpu.pcie_lanes for gpu in chosen)
    if 0 < lanes < 16:
        notes.append(
            f"a device has {lanes} PCIe lanes instead of 16: what goes through the host is slower than planned"
        )
    if any(gpu.mig for gpu in chosen):
        return _mig_node(node, chosen, notes)
    if links := _device_links(chosen, gpus.pairs, device, pcie, catalogue):
        node["links"] = links
    return node


def _mig_node(node: dict[str, Any], gpus: list[Gpu], notes: list[str]) -> dict[str, Any]:
    profiles = Counter(one.profile for gpu in gpus for one in gpu.slices)
    if not profiles:
        notes.append("MIG is on, and no device is cut into slices (nvidia-smi mig -cgi): they are written down whole")
        return node
    (profile, count), *others = profiles.most_common()
    if others or not all(gpu.mig for gpu in gpus):
        rest = ", ".join(f"{number} x {name}" for name, number in others) or "whole devices"
        notes.append(f"slices of a node must be equal: only {count} x {profile} are written down, not {rest}")
    return node | {"count": count, "mig": profile}


def _device_links(
    gpus: list[Gpu], pairs: tuple[Pair, ...], device: DeviceSpec | None, pcie: str, catalogue: Catalogue
) -> list[dict[str, Any]]:
    """One entry a kind of link, with the pairs that have it; numbers are of the written devices."""
    numbers = {gpu.index: at for at, gpu in enumerate(gpus)}
    versions = {gpu.index: gpu.nvlink_version for gpu in gpus}
    groups: dict[str, tuple[Any, list[list[int]]]] = {}
    for pair in pairs:
        if pair.a not in numbers or pair.b not in numbers:
            continue
        link: Any
        if pair.bandwidth:
            link = _nvlink(versions[pair.a], pair, device, catalogue)
        else:
            link = pcie if pair.peer or not catalogue.has_link(f"{pcie}-no-p2p") else f"{pcie}-no-p2p"
            if not catalogue.has_link(link):
                continue  # the generation is unknown: as the device is built
        groups.setdefault(str(link), (link, []))[1].append([numbers[pair.a], numbers[pair.b]])
    if len(groups) == 1:
        ((link, _),) = groups.values()
        return [{"devices": "all", "link": link}]
    return [{"pairs": members, "link": link} for link, members in groups.values()]


def _nvlink(version: int, pair: Pair, device: DeviceSpec | None, catalogue: Catalogue) -> Any:
    """The known link of this version and bandwidth; else the nearest with the bandwidth that was seen."""
    known = [
        link for link in catalogue.links.values() if link.name.startswith(f"nvlink{version}") and link.kind != "pcie"
    ]
    # The device's own first: several links have the same bandwidth.
    known.sort(key=lambda link: device is None or link.name != device.scale_up)
    for link in known:
        if abs(link.bandwidth / pair.bandwidth - 1) < 0.02:
            return link.name
    like = known[0].name if known else "nvlink3"
    count = pair.path.removeprefix("NV")
    return {"like": like, "bandwidth": f"{pair.bandwidth / 1e9:g}GB/s", "source": f"measured: NVML: {count} links up"}


def _network(ports: tuple[Port, ...], devices: int, notes: list[str]) -> dict[str, Any]:
    """Between the nodes of a job: over the fastest ports of this one, shared or bundled as they are in number."""
    active = [port for port in ports if port.active]
    usable = [port for port in active if port.protocol != "ethernet" and port.bits_per_second]
    usable = usable or [port for port in active if port.bits_per_second]
    if not usable:
        notes.append("no port says how fast it is: the network is taken as TCP over 10 Gbit/s; put yours into the file")
        return {"nodes": "all", "link": "tcp-10", "ports": 1}
    rate = max(port.bits_per_second or 0.0 for port in usable)
    fastest = [port for port in usable if port.bits_per_second == rate]
    known = _LINKS[fastest[0].protocol]
    each = max(1, len(fastest) // devices)
    link: Any = known.get(rate * each)
    if link is None:
        like = known[min(known, key=lambda one: abs(one - rate * each))]
        names = ", ".join(port.name for port in fastest)
        link = {"like": like, "bandwidth": f"{rate * each / 1e9:g}Gbit/s", "source": f"measured: rate of {names}"}
    entry: dict[str, Any] = {"nodes": "all", "link": link}
    if len(fastest) < devices:
        entry["ports"] = len(fastest)
    return entry


def _job_nodes(detected: Detected, node: dict[str, Any], catalogue: Catalogue, notes: list[str]) -> dict[str, Any]:
    """This host as it was seen, those that look like it as it is, others as their scheduler describes them."""
    job = detected.job
    assert job is not None
    names = {one.name.split(".")[0]: one for one in job.nodes}
    if detected.host not in names:
        kinds = {one.name for one in names.values() if not one.device or not one.devices}
        if kinds or not names:
            notes.append(f"{detected.host} is not one of the job's nodes: run this on one of them to see those")
            return {detected.host: node}
    nodes: dict[str, Any] = {}
    for name, one in names.items():
        if name == detected.host:
            nodes[name] = node
        elif detected.host in names and _same(one, node, catalogue):
            nodes[name] = {"like": detected.host}
        else:
            nodes[name] = {"device": one.device or "cpu", "count": one.devices or 1}
    return nodes


def _same(one: JobNode, node: dict[str, Any], catalogue: Catalogue) -> bool:
    """Whether a scheduler's words about a node fit the one that was seen; it may say nothing."""
    if one.devices is not None and one.devices != node["count"] and not (one.devices == 0 and not one.device):
        return False
    if not one.device:
        return True
    seen = node["device"]["like"] if isinstance(node["device"], dict) else node["device"]
    try:
        return catalogue.device(one.device).name == str(seen)
    except CatalogueError:
        return one.device.lower() in str(seen).lower()


def _facts(detected: Detected) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "cpu": {
            "model": detected.cpu.model,
            "sockets": detected.cpu.sockets,
            "cores": detected.cpu.cores,
            "threads": detected.cpu.threads,
            "vector": detected.cpu.vector,
        },
        "numa": [
            {"node": one.number, "cpus": one.cpus, "memory": _mebibytes(one.memory_bytes)} for one in detected.numa
        ],
        "ports": [
            {
                "name": port.name,
                "protocol": port.protocol,
                "gigabits": port.bits_per_second / 1e9 if port.bits_per_second else None,
                "active": port.active,
                "numa": port.numa,
            }
            for port in detected.ports
        ],
    }
    if detected.gpus is not None:
        facts["driver"] = detected.gpus.driver
        facts["devices"] = [
            {"name": gpu.name, "bus": gpu.bus, "numa": numa, "nvlinks": gpu.nvlinks}
            for gpu, numa in zip(detected.gpus.gpus, detected.gpu_numa, strict=True)
        ]
    return facts
