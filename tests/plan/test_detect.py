"""Recorded hosts, and this one, to topology files that plans take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from shoal.core.hardware import Cluster
from shoal.plan.catalogue import CatalogueError, load
from shoal.plan.detect import Detected, Topology, detect, topology
from shoal.plan.host import pci_distance, read_cpu, read_numa, read_ports
from shoal.plan.job_nodes import Job, JobNode
from shoal.plan.nvml import NoNvml, load_nvml
from shoal.plan.topology import parse_cluster
from tests.plan.hosts import (
    GIB,
    FakeGpu,
    FakeNvml,
    NVMLError,
    bridged_box,
    cpu_host,
    hgx_h100,
    l40s_box,
    put,
    put_ethernet,
    put_pci,
    put_rdma,
)

NO_NVML = NoNvml("no NVIDIA devices: none")


def cluster_of(result: Topology, folder: Path) -> Cluster:
    """Through the file, as a user would."""
    file = folder / "found.yaml"
    file.write_text(yaml.safe_dump(result.tree, sort_keys=False), encoding="utf-8")
    return parse_cluster(str(file), load())


def found(root: Path, nvml: Any = NO_NVML, job: Job | None = None) -> tuple[Detected, Topology]:
    detected = detect(root, nvml, job)
    return detected, topology(detected, load())


def test_hgx(tmp_path: Path) -> None:
    nvml = hgx_h100(tmp_path)
    detected, result = found(tmp_path, nvml)
    assert nvml.depth == 0, "NVML is shut down again"
    assert detected.gpus is not None and len(detected.gpus.gpus) == 8 and detected.gpus.driver == "580.65.06"
    assert {pair.path for pair in detected.gpus.pairs} == {"NV18"} and len(detected.gpus.pairs) == 28
    assert {gpu.nvlink_bandwidth for gpu in detected.gpus.gpus} == {450e9}
    assert detected.gpu_numa == (0, 0, 0, 0, 1, 1, 1, 1)
    for gpu, distances in enumerate(detected.gpu_port):
        near = [port.name for port, distance in zip(detected.rdma, distances, strict=True) if distance == "PIX"]
        assert near == [f"mlx5_{gpu}"], "each has its own port under its switch"
    assert detected.gpu_port[0][1] == "NODE" and detected.gpu_port[0][7] == "SYS" and detected.gpu_port[7][8] == "NODE"
    assert (detected.cpu.sockets, detected.cpu.cores, detected.cpu.threads) == (2, 112, 224)
    assert [node.memory_bytes for node in detected.numa] == [1024 * GIB] * 2 and detected.numa[
        1
    ].cpus == "56-111,168-223"
    assert result.notes == ()
    assert result.tree["nodes"]["hgx1"]["links"] == [{"devices": "all", "link": "nvlink4"}]
    cluster = cluster_of(result, tmp_path)
    assert (cluster.device.name, cluster.devices_per_node, cluster.num_nodes) == ("H100-SXM", 8, 1)
    assert cluster.scale_up == load().link("nvlink4") and cluster.network is None
    assert cluster.device.memory_bytes == 81559 << 20 and cluster.device.sources["memory_bytes"] == "measured: NVML"
    assert cluster.name == "hgx1"


def test_hgx_in_a_slurm_job(tmp_path: Path) -> None:
    nvml = hgx_h100(tmp_path)
    job = Job("slurm", "77", tuple(JobNode(f"hgx{at}", 8, "h100") for at in (1, 2, 3)))
    _, result = found(tmp_path, nvml, job)
    assert result.tree["nodes"]["hgx2"] == {"like": "hgx1"}
    assert result.tree["links"] == [{"nodes": "all", "link": "infiniband-ndr"}], "the port for storage is slower"
    cluster = cluster_of(result, tmp_path)
    assert (cluster.num_nodes, cluster.num_devices) == (3, 24)
    assert cluster.network is not None and cluster.network.bandwidth == 50e9


def test_a_job_of_unequal_nodes_is_written_and_refused_with_what_to_do(tmp_path: Path) -> None:
    job = Job("ray", "auto", (JobNode("hgx1", 8, "H100"), JobNode("other", 4, "L40S")))
    _, result = found(tmp_path, hgx_h100(tmp_path), job)
    assert result.tree["nodes"]["other"] == {"device": "L40S", "count": 4}
    with pytest.raises(
        CatalogueError, match=r"not equal; name those to use, as in use: \{nodes: \[hgx1\], devices: 4\}"
    ):
        cluster_of(result, tmp_path)
    result.tree["use"] = {"nodes": ["hgx1"]}
    assert cluster_of(result, tmp_path).num_devices == 8


def test_outside_the_job_it_says_so(tmp_path: Path) -> None:
    _, result = found(tmp_path, hgx_h100(tmp_path), Job("slurm", "77", (JobNode("a"), JobNode("b"))))
    assert list(result.tree["nodes"]) == ["hgx1"]
    assert any("not one of the job's nodes" in note for note in result.notes)


def test_a_ray_cluster_from_its_head_without_devices(tmp_path: Path) -> None:
    """Each node as Ray describes it, even though this host is none of them."""
    cpu_host(tmp_path)
    nic = put_pci(tmp_path, "pci0000:00/0000:00:03.0", 0)
    put_ethernet(tmp_path, nic, "eth0", 25_000)
    job = Job("ray", "auto", (JobNode("w1", 8, "H100"), JobNode("w2", 8, "H100")))
    _, result = found(tmp_path, NO_NVML, job)
    cluster = cluster_of(result, tmp_path)
    assert (cluster.num_nodes, cluster.device.name) == (2, "H100-SXM")


def test_box_without_peer_access(tmp_path: Path) -> None:
    detected, result = found(tmp_path, l40s_box(tmp_path))
    assert detected.gpus is not None
    paths = {(pair.a, pair.b): pair.path for pair in detected.gpus.pairs}
    assert paths[0, 1] == "NODE" and paths[1, 2] == "SYS" and not any(pair.peer for pair in detected.gpus.pairs)
    assert [(port.name, port.bits_per_second, port.active) for port in detected.ports] == [
        ("eno1np0", 25e9, True),
        ("eno2np1", None, False),
    ]
    cluster = cluster_of(result, tmp_path)
    assert (cluster.device.name, cluster.scale_up.name) == ("L40S", "pcie4-no-p2p")
    assert cluster.host is not None and cluster.host.name == "pcie4"


def test_boxes_share_their_port(tmp_path: Path) -> None:
    job = Job("slurm", "1", (JobNode("box"), JobNode("box2")))
    _, result = found(tmp_path, l40s_box(tmp_path), job)
    assert result.tree["links"] == [{"nodes": "all", "link": "tcp-25", "ports": 1}]
    cluster = cluster_of(result, tmp_path)
    assert cluster.network is not None and cluster.network.bandwidth == pytest.approx(25e9 / 8 / 4)
    assert "4 devices share 1" in cluster.network.sources["bandwidth"]


def test_bridged_pairs(tmp_path: Path) -> None:
    detected, result = found(tmp_path, bridged_box(tmp_path))
    assert detected.gpus is not None
    assert {(pair.a, pair.b) for pair in detected.gpus.pairs if pair.path == "NV12"} == {(0, 1), (2, 3)}
    links = {entry["link"]: entry["pairs"] for entry in result.tree["nodes"]["nvl"]["links"]}
    assert links["nvlink4-bridge"] == [[0, 1], [2, 3]] and len(links["pcie5"]) == 4
    assert cluster_of(result, tmp_path).scale_up.name == "pcie5", "a group of four is as fast as its slowest pair"
    result.tree["use"] = {"devices": 2}
    assert cluster_of(result, tmp_path).scale_up.name == "nvlink4-bridge"


def test_fewer_links_than_the_board_has(tmp_path: Path) -> None:
    """A broken NVLink is seen: the bandwidth is what is up, and the table of the whole link does not hold."""
    nvml = hgx_h100(tmp_path)
    for gpu in nvml.gpus:
        gpu.links = gpu.links[:12]
    _, result = found(tmp_path, nvml)
    cluster = cluster_of(result, tmp_path)
    assert cluster.scale_up.bandwidth == 300e9
    nvml.gpus[3].links = nvml.gpus[3].links[:9]
    cluster = cluster_of(found(tmp_path, nvml)[1], tmp_path)
    assert cluster.scale_up.bandwidth == 225e9 and cluster.scale_up.all_reduce == {}
    assert "9 links up" in cluster.scale_up.sources["bandwidth"]


def test_slices(tmp_path: Path) -> None:
    nvml = hgx_h100(tmp_path)
    for gpu in nvml.gpus:
        gpu.slices = ["1g.10gb"] * 7
    nvml.gpus[0].slices = ["1g.10gb", "3g.40gb"]
    detected, result = found(tmp_path, nvml)
    assert detected.gpus is not None and len(detected.gpus.gpus[1].slices) == 7
    assert any("only 50 x 1g.10gb" in note for note in result.notes)
    cluster = cluster_of(result, tmp_path)
    assert (cluster.device.name, cluster.devices_per_node) == ("H100-SXM:1g.10gb", 50)
    assert cluster.scale_up.name == "pcie5-no-p2p"
    for gpu in nvml.gpus:
        gpu.slices = []
    assert any("no device is cut" in note for note in found(tmp_path, nvml)[1].notes)


def test_mixed_and_unknown_devices(tmp_path: Path) -> None:
    gpus = [FakeGpu("NVIDIA L40S", f"0000:0{at}:00.0", 46068, generation=4, lanes=8) for at in (1, 2)]
    gpus.insert(1, FakeGpu("NVIDIA T4", "0000:09:00.0", 15360, generation=3))
    cpu_host(tmp_path)
    _, result = found(tmp_path, FakeNvml(gpus))
    assert any("only the NVIDIA L40S are written down, not 1 x NVIDIA T4" in note for note in result.notes)
    assert any("8 PCIe lanes" in note for note in result.notes)
    assert cluster_of(result, tmp_path).devices_per_node == 2
    _, result = found(tmp_path, FakeNvml([FakeGpu("NVIDIA Z1000", "0000:01:00.0", 1000)]))
    assert any("unknown device NVIDIA Z1000" in note for note in result.notes)
    with pytest.raises(CatalogueError, match="unknown device NVIDIA Z1000"):
        cluster_of(result, tmp_path)


def test_plain_host(tmp_path: Path) -> None:
    cpu_host(tmp_path)
    detected, result = found(tmp_path)
    assert detected.gpus is None and "no NVIDIA devices: none" in result.notes
    cluster = cluster_of(result, tmp_path)
    assert (cluster.device.name, cluster.devices_per_node, cluster.scale_up.name) == ("cpu", 8, "shared-memory")
    assert cluster.device.memory_bytes == 4 * GIB


def test_a_container_sees_its_limits(tmp_path: Path) -> None:
    cpu_host(tmp_path)
    put(tmp_path, {"sys/fs/cgroup/memory.max": str(8 * GIB), "sys/fs/cgroup/cpu.max": "200000 100000"})
    cpu = read_cpu(tmp_path)
    assert (cpu.cores, cpu.memory_bytes) == (2, 8 * GIB)
    put(tmp_path, {"sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/cpu.max": "max 100000"})
    cpu = read_cpu(tmp_path)
    assert (cpu.cores, cpu.memory_bytes) == (8, 32 * GIB)


def test_an_empty_tree_is_a_host_too(tmp_path: Path) -> None:
    detected, result = found(tmp_path)
    assert (detected.host, detected.cpu.cores, detected.ports, detected.numa) == ("host", 1, (), ())
    assert cluster_of(result, tmp_path).num_devices == 1


@pytest.mark.parametrize(
    ("rates", "layer", "driver", "link", "ports"),
    [
        ([("200 Gb/sec (4X HDR)", 4)], "InfiniBand", "mlx5_core", "infiniband-hdr", 4),
        ([("800 Gb/sec (4X XDR)", 8)], "InfiniBand", "mlx5_core", "infiniband-xdr", None),
        ([("200 Gb/sec (4X HDR)", 16)], "InfiniBand", "mlx5_core", "infiniband-ndr", None),
        ([("400 Gb/sec (4X NDR)", 8)], "Ethernet", "mlx5_core", "roce-400", None),
        ([("100 Gb/sec (4X EDR)", 32)], "Ethernet", "efa", "efa-400", None),
        ([("100 Gb/sec (4X EDR)", 8)], "InfiniBand", "mlx5_core", 12.5e9, None),
        ([("25 Gb/sec (1X EDR)", 8), ("200 Gb/sec (2X NDR)", 1)], "Ethernet", "mlx5_core", "roce-200", 1),
    ],
)
def test_networks(
    tmp_path: Path, rates: list[tuple[str, int]], layer: str, driver: str, link: str | float, ports: int | None
) -> None:
    nvml = FakeNvml(hgx_h100(tmp_path / "unused").gpus)
    root = tmp_path / "host"
    cpu_host(root)
    number = 0
    for rate, count in rates:
        for _ in range(count):
            pci = put_pci(root, f"pci0000:00/0000:00:{number:02x}.0", 0)
            put_rdma(root, pci, f"mlx5_{number}", rate, layer, driver=driver)
            number += 1
    _, result = found(root, nvml, Job("slurm", "1", (JobNode("plain"), JobNode("plain2"))))
    (entry,) = result.tree["links"]
    assert entry.get("ports") == ports
    if isinstance(link, str):
        assert entry["link"] == link
    else:
        assert (
            load().link(entry["link"]["like"]).kind == "network"
            and entry["link"]["bandwidth"] == f"{link * 8e-9:g}Gbit/s"
        )
    assert detect(root, nvml).ports[0].active


def test_ports_that_do_not_say_how_fast_they_are(tmp_path: Path) -> None:
    cpu_host(tmp_path)
    pci = put_pci(tmp_path, "pci0000:00/0000:00:03.0", -1)
    put_ethernet(tmp_path, pci, "eth0", -1)
    down = put_pci(tmp_path, "pci0000:00/0000:00:04.0", -1)
    put_rdma(tmp_path, down, "mlx5_0", "10 Gb/sec (4X SDR)", "InfiniBand", up=False)
    _, result = found(tmp_path, NO_NVML, Job("slurm", "1", (JobNode("plain"), JobNode("plain2"))))
    assert result.tree["links"] == [{"nodes": "all", "link": "tcp-10", "ports": 1}]
    assert any("put yours into the file" in note for note in result.notes)


def test_distances(tmp_path: Path) -> None:
    root = tmp_path
    for path, numa in {
        "pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:00.0/0000:18:00.0": 0,
        "pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:01.0/0000:19:00.0": 0,
        "pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:02.0/0000:1a:00.0/0000:1b:00.0/0000:1c:00.0": 0,
        "pci0000:15/0000:15:02.0/0000:1d:00.0": 0,
        "pci0000:26/0000:26:01.0/0000:27:00.0": 0,
        "pci0000:97/0000:97:01.0/0000:98:00.0": 1,
    }.items():
        put_pci(root, path, numa)
    gpu = "0000:18:00.0"
    others = ("0000:19:00.0", "0000:1c:00.0", "0000:1d:00.0", "0000:27:00.0", "0000:98:00.0", "0000:ff:00.0")
    assert [pci_distance(root, gpu, other) for other in others] == ["PIX", "PXB", "PHB", "NODE", "SYS", "SYS"]
    assert all(pci_distance(root, gpu, other) == pci_distance(root, other, gpu) for other in others)


def test_nvml_that_fails_or_sees_nothing(tmp_path: Path) -> None:
    class Broken(FakeNvml):
        def nvmlInit(self) -> None:
            raise NVMLError("Driver Not Loaded")

    class Lost(FakeNvml):
        def nvmlDeviceGetMemoryInfo(self, gpu: Any) -> Any:
            raise NVMLError("GPU is lost")

    cpu_host(tmp_path)
    assert "NVML says: Driver Not Loaded" in found(tmp_path, Broken([]))[1].notes[0]
    lost = Lost([FakeGpu("NVIDIA L4", "0000:01:00.0", 23034)])
    assert "NVML says: GPU is lost" in found(tmp_path, lost)[1].notes[0] and lost.depth == 0
    assert "NVML sees none" in found(tmp_path, FakeNvml([]))[1].notes[0]


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NoNvml, match=r"pip install 'shoal\[nvml\]'"):
        load_nvml()


def test_this_very_host(tmp_path: Path) -> None:
    """The real kernel, and NVML if it is there."""
    nvml: Any = NO_NVML
    try:
        nvml = load_nvml()
    except NoNvml as reason:
        nvml = reason
    detected, result = found(Path("/"), nvml)
    assert detected.cpu.cores >= 1 and detected.cpu.memory_bytes > 256 << 20 and detected.cpu.model
    assert sum(node.memory_bytes for node in detected.numa) >= 0
    assert msgspec.json.decode(msgspec.json.encode(detected))["host"] == detected.host
    if detected.gpus is None:
        cluster = cluster_of(result, tmp_path)
        assert cluster.devices_per_node == detected.cpu.cores
        assert cluster.device.memory_bytes * cluster.num_devices <= detected.cpu.memory_bytes
    assert list(read_ports(Path("/"))) == list(detected.ports)
    assert read_numa(Path("/")) == detected.numa
