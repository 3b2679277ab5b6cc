"""Hosts as their kernels and NVML show them, to be read without being there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

GIB = 1 << 30


class NVMLError(Exception):
    pass


class FakeGpu:
    """What NVML answers about one GPU. `links`: where each NVLink leads, "switch" or another GPU's number."""

    def __init__(self, name: str, bus: str, mebibytes: int, **other: Any) -> None:
        self.name = name
        self.bus = bus
        self.memory = mebibytes << 20
        self.links: list[str | int] = other.get("links", [])
        self.version: int = other.get("version", 4)
        self.generation: int = other.get("generation", 5)
        self.lanes: int = other.get("lanes", 16)
        self.slices: list[str] | None = other.get("slices")
        """Profiles of MIG devices; None: MIG is off."""


class FakeNvml:
    """The functions of pynvml that shoal calls, over recorded GPUs."""

    NVMLError = NVMLError

    def __init__(self, gpus: list[FakeGpu], *, ancestors: dict[tuple[int, int], int] | None = None, peer: bool = True):
        self.gpus = gpus
        self.ancestors = ancestors or {}
        self.peer = peer
        self.depth = 0
        """Of nvmlInit without nvmlShutdown."""

    def nvmlInit(self) -> None:
        self.depth += 1

    def nvmlShutdown(self) -> None:
        self.depth -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        return self.gpus[index]

    def nvmlDeviceGetName(self, gpu: Any) -> bytes:
        return gpu.name.encode()  # as older versions give it

    def nvmlDeviceGetUUID(self, gpu: Any) -> str:
        return f"GPU-{gpu.bus}"

    def nvmlDeviceGetPciInfo(self, gpu: FakeGpu) -> Any:
        return SimpleNamespace(busId=f"0000{gpu.bus.upper()}")

    def nvmlDeviceGetMemoryInfo(self, gpu: Any) -> Any:
        return SimpleNamespace(total=gpu.memory)

    def nvmlDeviceGetMaxPcieLinkGeneration(self, gpu: FakeGpu) -> int:
        return gpu.generation

    def nvmlDeviceGetMaxPcieLinkWidth(self, gpu: FakeGpu) -> int:
        return gpu.lanes

    def nvmlDeviceGetNvLinkState(self, gpu: FakeGpu, link: int) -> int:
        if link >= len(gpu.links):
            raise NVMLError("Not Supported")
        return 1

    def nvmlDeviceGetCudaComputeCapability(self, gpu: FakeGpu) -> tuple[int, int]:
        return {1: 6, 2: 7, 3: 8, 4: 9, 5: 10}[gpu.version], 0

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, gpu: FakeGpu, link: int) -> int:
        if link >= len(gpu.links):
            raise NVMLError("Not Supported")
        return 2 if gpu.links[link] == "switch" else 0

    def nvmlDeviceGetNvLinkRemotePciInfo(self, gpu: FakeGpu, link: int) -> Any:
        remote = gpu.links[link]
        bus = "0000:05:00.0" if isinstance(remote, str) else self.gpus[remote].bus
        return SimpleNamespace(busId=f"0000{bus}")

    def nvmlDeviceGetTopologyCommonAncestor(self, a: FakeGpu, b: FakeGpu) -> int:
        pair = (self.gpus.index(a), self.gpus.index(b))
        return self.ancestors.get(pair, 50)

    def nvmlDeviceGetP2PStatus(self, a: FakeGpu, b: FakeGpu, index: int) -> int:
        return 0 if self.peer else 3

    def nvmlDeviceGetMigMode(self, gpu: FakeGpu) -> tuple[int, int]:
        if gpu.slices is None:
            raise NVMLError("Not Supported")
        return 1, 1

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: FakeGpu) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: FakeGpu, index: int) -> Any:
        if gpu.slices is None or index >= len(gpu.slices):
            raise NVMLError("Not Found")
        name = f"{gpu.name} MIG {gpu.slices[index]}"
        return SimpleNamespace(name=name, bus=f"MIG-{gpu.bus}-{index}", memory=gpu.memory // 8)


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")


def put_cpu(
    root: Path, hostname: str, model: str, sockets: int, cores: int, *, threads: int = 2, gibibytes: int, flags: str
) -> None:
    """`cores` a socket, `threads` a core; one NUMA node a socket."""
    blocks = []
    total = sockets * cores
    for cpu in range(total * threads):
        core = cpu % total
        fields = {
            "processor": cpu,
            "model name": model,
            "physical id": core // cores,
            "core id": core % cores,
            "flags": f"fpu sse2 {flags}",
        }
        blocks.append("\n".join(f"{name}\t: {value}" for name, value in fields.items()))
    files = {
        "proc/cpuinfo": "\n\n".join(blocks),
        "proc/meminfo": f"MemTotal:       {gibibytes << 20} kB\nMemFree:        1048576 kB",
        "proc/sys/kernel/hostname": hostname,
    }
    for socket in range(sockets):
        node = f"sys/devices/system/node/node{socket}"
        first = socket * cores
        lists = [f"{first + at * total}-{first + cores - 1 + at * total}" for at in range(threads)]
        files[f"{node}/cpulist"] = ",".join(lists)
        files[f"{node}/meminfo"] = f"Node {socket} MemTotal:       {(gibibytes << 20) // sockets} kB"
    put(root, files)


def put_pci(root: Path, path: str, numa: int) -> Path:
    """A PCI device below its bridges: "pci0000:15/0000:15:01.0/0000:18:00.0"."""
    folder = root / "sys/devices" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "numa_node").write_text(f"{numa}\n", encoding="utf-8")
    link(root / "sys/bus/pci/devices" / folder.name, folder)
    return folder


def link(place: Path, target: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


def put_rdma(
    root: Path, pci: Path, name: str, rate: str, layer: str, *, up: bool = True, driver: str = "mlx5_core"
) -> None:
    adapter = pci / "infiniband" / name
    put(
        adapter,
        {
            "ports/1/rate": rate,
            "ports/1/link_layer": layer,
            "ports/1/state": "4: ACTIVE" if up else "1: DOWN",
        },
    )
    link(adapter / "device", pci)
    link(root / "sys/class/infiniband" / name, adapter)
    (root / "sys/bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
    link(pci / "driver", root / "sys/bus/pci/drivers" / driver)


def put_ethernet(root: Path, pci: Path, name: str, megabits: int, *, up: bool = True) -> None:
    interface = pci / "net" / name
    put(interface, {"speed": str(megabits), "operstate": "up" if up else "down"})
    link(interface / "device", pci)
    link(root / "sys/class/net" / name, interface)


def hgx_h100(root: Path) -> FakeNvml:
    """Eight H100 behind NVSwitch, an NDR port beside each under the same PCIe switch, a RoCE port for storage."""
    put_cpu(
        root,
        "hgx1.example.org",
        "Intel(R) Xeon(R) Platinum 8480C",
        2,
        56,
        gibibytes=2048,
        flags="avx2 avx512f avx512_vnni",
    )
    gpus = []
    for at, complex_ in enumerate(("15", "26", "37", "59", "97", "a7", "b7", "d7")):
        numa = at // 4
        switch = f"pci0000:{complex_}/0000:{complex_}:01.0/0000:{complex_[0]}{'6789abcd'[at]}:00.0"
        number = 0x18 + 16 * at
        gpu_bus, nic_bus = f"0000:{number:02x}:00.0", f"0000:{number + 2:02x}:00.0"
        put_pci(root, f"{switch}/0000:{number - 1:02x}:00.0/{gpu_bus}", numa)
        nic = put_pci(root, f"{switch}/0000:{number - 1:02x}:01.0/{nic_bus}", numa)
        put_rdma(root, nic, f"mlx5_{at}", "400 Gb/sec (4X NDR)", "InfiniBand")
        gpus.append(FakeGpu("NVIDIA H100 80GB HBM3", gpu_bus, 81559, links=["switch"] * 18))
    storage = put_pci(root, "pci0000:f0/0000:f0:01.0/0000:f1:00.0", 1)
    put_rdma(root, storage, "mlx5_8", "100 Gb/sec (4X EDR)", "Ethernet")
    put_ethernet(root, storage, "ens8f0np0", 100_000)
    (root / "sys/class/net/lo").mkdir(parents=True)
    same_socket = {(a, b): 40 if a // 4 == b // 4 else 50 for a in range(8) for b in range(8)}
    return FakeNvml(gpus, ancestors=same_socket)


def l40s_box(root: Path) -> FakeNvml:
    """Four L40S on PCIe 4 without peer access, two a socket, one Ethernet port of 25 Gbit/s that works."""
    put_cpu(root, "box", "AMD EPYC 9354 32-Core Processor", 2, 32, gibibytes=512, flags="avx2 avx512f avx512_vnni")
    gpus = []
    for at, bus in enumerate(("01", "41", "81", "c1")):
        put_pci(root, f"pci0000:{bus[0]}0/0000:{bus[0]}0:01.1/0000:{bus}:00.0", at // 2)
        gpus.append(FakeGpu("NVIDIA L40S", f"0000:{bus}:00.0", 46068, generation=4))
    nic = put_pci(root, "pci0000:20/0000:20:03.1/0000:21:00.0", 0)
    put_ethernet(root, nic, "eno1np0", 25_000)
    other = put_pci(root, "pci0000:20/0000:20:03.1/0000:21:00.1", 0)
    put_ethernet(root, other, "eno2np1", -1, up=False)
    return FakeNvml(
        gpus, ancestors={(a, b): 40 if a // 2 == b // 2 else 50 for a in range(4) for b in range(4)}, peer=False
    )


def bridged_box(root: Path) -> FakeNvml:
    """Four H100 NVL: pairs under bridges of 12 links, PCIe with peer access between the pairs."""
    put_cpu(root, "nvl", "INTEL(R) XEON(R) GOLD 6548N", 2, 32, gibibytes=1024, flags="avx2 avx512f avx512_vnni")
    gpus = []
    for at, bus in enumerate(("16", "34", "9a", "b8")):
        put_pci(root, f"pci0000:{bus[0]}0/0000:{bus[0]}0:01.0/0000:{bus}:00.0", at // 2)
        gpus.append(FakeGpu("NVIDIA H100 NVL", f"0000:{bus}:00.0", 95830, links=[at ^ 1] * 12))
    return FakeNvml(gpus, ancestors={(a, b): 40 if a // 2 == b // 2 else 50 for a in range(4) for b in range(4)})


def cpu_host(root: Path) -> None:
    put_cpu(root, "plain", "AMD EPYC 7763 64-Core Processor", 1, 8, threads=1, gibibytes=32, flags="avx2")
