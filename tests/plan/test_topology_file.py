"""Topology files: what they mean, and every one that contradicts itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.core.hardware import Cluster
from shoal.plan.catalogue import CatalogueError, cluster, load

TWO = """
nodes:
  a: {device: H100, count: 8, host_memory_bytes: 2TiB, links: [{devices: all, link: nvlink4}]}
  b: {like: a}
links:
  - {nodes: all, link: ndr}
"""


def read(folder: Path, text: str) -> Cluster:
    file = folder / "own.yaml"
    file.write_text(text, encoding="utf-8")
    return cluster(str(file))


def test_two_equal_nodes_are_what_their_name_says(tmp_path: Path) -> None:
    found, named = read(tmp_path, TWO), cluster("2x8xH100:ndr")
    assert found.device == named.device and found.scale_up == named.scale_up and found.network == named.network
    assert (found.num_nodes, found.devices_per_node, found.host) == (2, 8, named.host)
    assert found.dollars_per_device_hour == named.dollars_per_device_hour
    assert found.name.endswith("own.yaml")


def test_the_least_that_a_file_may_say(tmp_path: Path) -> None:
    found = read(tmp_path, "nodes: {a: {device: H100}}")
    assert found.num_devices == 1 and found.network is None and found.scale_up.name == "nvlink4"


def test_a_subset(tmp_path: Path) -> None:
    text = TWO + "  - {nodes: [a, c], link: ndr}\n"
    text = text.replace("  b:", "  c: {device: L40S, count: 4}\n  b:").replace("nodes: all", "nodes: [a, b]")
    with pytest.raises(CatalogueError, match=r"nodes a \(8 x H100-SXM\) and c \(4 x L40S\) are not equal"):
        read(tmp_path, text)
    assert read(tmp_path, text + "use: {nodes: [a, b]}\n").num_devices == 16
    assert read(tmp_path, text + "use: {nodes: [c]}\n").scale_up.name == "pcie4"
    assert read(tmp_path, text + "use: {nodes: [a], devices: 4}\n").num_devices == 4
    with pytest.raises(CatalogueError, match="use.nodes: unknown node d; the nearest is"):
        read(tmp_path, text + "use: {nodes: [d]}\n")
    with pytest.raises(CatalogueError, match="nodes b and c have no network"):
        read(tmp_path, text.replace("device: L40S, count: 4", "like: a"))


BRIDGED = """
nodes:
  a:
    device: H100-NVL
    count: 4
    links:
      - {pairs: [[0, 1], [3, 2]], link: nvlink4-bridge}
"""


def test_pairs(tmp_path: Path) -> None:
    """What no link joins goes over PCIe, and a group is as fast as its slowest pair."""
    assert read(tmp_path, BRIDGED).scale_up.name == "pcie5"
    assert read(tmp_path, BRIDGED + "use: {devices: [2, 3]}").scale_up.name == "nvlink4-bridge"
    assert read(tmp_path, BRIDGED + "use: {devices: [1, 2]}").scale_up.name == "pcie5"
    slow = BRIDGED + "      - {devices: all, link: pcie5-no-p2p}\n"
    assert read(tmp_path, slow).scale_up.name == "pcie5-no-p2p"
    assert read(tmp_path, slow + "use: {devices: 2}").scale_up.name == "nvlink4-bridge", "the faster of both"


def test_measured_links(tmp_path: Path) -> None:
    text = TWO.replace(
        "link: ndr",
        "link: {like: ndr, bandwidth: 42GB/s, reached: 0.9, latency: 9us, source: 'measured: by us, 2026-11-01'}",
    )
    network = read(tmp_path, text).network
    assert network is not None
    assert (network.bandwidth, network.reached, network.latency) == (42e9, 0.9, 9e-6)
    assert network.sources["latency"] == "measured: by us, 2026-11-01"


def test_ports_are_shared(tmp_path: Path) -> None:
    network = read(tmp_path, TWO.replace("link: ndr", "link: ndr, ports: 2")).network
    assert network is not None and network.bandwidth == 12.5e9 and network.name == "infiniband-ndr (2/8)"
    assert "8 devices share 2" in network.sources["bandwidth"]
    network = read(tmp_path, TWO.replace("link: ndr", "link: ndr, ports: 2") + "use: {devices: 2}").network
    assert network is not None and network.bandwidth == 50e9, "those that are not used share nothing"


def test_the_slowest_network_counts(tmp_path: Path) -> None:
    text = TWO.replace("  b:", "  c: {like: a}\n  b:").replace("nodes: all, link: ndr", "nodes: [a, b], link: ndr")
    text += "  - {nodes: [c, a], link: hdr}\n  - {nodes: [b, c], link: tcp-25}\n"
    network = read(tmp_path, text).network
    assert network is not None and network.name == "tcp-25"
    network = read(tmp_path, text + "use: {nodes: [a, c]}").network
    assert network is not None and network.name == "infiniband-hdr"


def test_slices_and_prices(tmp_path: Path) -> None:
    found = read(tmp_path, "nodes: {a: {device: H100, count: 14, mig: 1g.10gb}}")
    assert (found.device.name, found.num_devices, found.scale_up.name) == ("H100-SXM:1g.10gb", 14, "pcie5-no-p2p")
    assert found.dollars_per_device_hour == pytest.approx(2.99 / 7)
    price = "price: {dollars_per_hour: 0.2, date: 2026-11-01, source: our contract}"
    found = read(tmp_path, "nodes: {a: {device: H100, count: 14, mig: 1g.10gb}}\n" + price)
    assert found.dollars_per_device_hour == 0.2 and "our contract" in found.price_source


def test_a_node_that_no_vendor_sells(tmp_path: Path) -> None:
    """Who describes it knows: sixteen behind one switch."""
    found = read(tmp_path, "nodes: {a: {device: A100, count: 16, links: [{devices: all, link: nvlink3}]}}")
    assert found.devices_per_node == 16
    slower = read(tmp_path, "nodes: {a: {device: L40S, count: 2, host_link: pcie3}}")
    assert slower.host is not None and slower.host.name == "pcie3"
    assert slower.device.host_link == "pcie3"


def test_a_device_that_differs(tmp_path: Path) -> None:
    found = read(tmp_path, "nodes: {a: {device: {like: H100, memory_bytes: 79GiB, source: 'measured: NVML'}}}")
    assert found.device.memory_bytes == 79 << 30 and found.device.sources["memory_bytes"] == "measured: NVML"
    assert found.device.rates == load().device("H100").rates


def test_a_device_without_a_way_through_the_host(tmp_path: Path) -> None:
    own = tmp_path / "device.yaml"
    own.write_text("devices: {X: {vendor: amd, memory_bytes: 1GiB, memory_bandwidth: 1TB/s, rates: {bfloat16: 1T}}}")
    file = tmp_path / "own.yaml"
    file.write_text("nodes: {a: {device: X, count: 3, links: [{pairs: [[0, 1], [1, 2]], link: pcie4}]}}")
    with pytest.raises(CatalogueError, match="devices 0 and 2 have no link, and no host_link is said"):
        cluster(str(file), [own])
    file.write_text(file.read_text() + "\nuse: {devices: 2}\n")
    assert cluster(str(file), [own]).scale_up.name == "pcie4"


NODE = "nodes: {a: {device: H100, count: 8, links: [%s]}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: {}", "nodes: at least one is needed"),
        ("nodes: [a]", "nodes must be a mapping of names to nodes"),
        ("links: []", "nodes must be a mapping"),
        ("nodes: {a: H100}", "nodes.a must be a mapping, not 'H100'"),
        ("noodes: {}", "unknown key noodes; the nearest is nodes"),
        ("nodes: {a: {devise: H100}}", "unknown key nodes.a.devise; the nearest is device"),
        ("nodes: {a: {count: 8}}", "nodes.a.device: which device is needed"),
        ("nodes: {a: {device: H1000}}", "nodes.a.device: unknown device H1000; the nearest is H100"),
        ("nodes: {a: {device: {name: H100}}}", r"nodes.a.device: say which it is like, as in \{like: H100\}"),
        ("nodes: {a: {device: {like: H100, memry: 1}}}", "nodes.a.device: unknown key memry; the nearest is memory"),
        ("nodes: {a: {device: H100, count: 0}}", "nodes.a.count: 0 must be at least 1"),
        ("nodes: {a: {device: H100, count: eight}}", "expected `int`, got `str`"),
        ("nodes: {a: {device: H100, host_memory_bytes: 2T}}", "nodes.a.host_memory_bytes: '2T' is not in bytes"),
        ("nodes: {a: {device: H100, host_link: pcie7}}", "unknown link pcie7; the nearest is pcie"),
        ("nodes: {a: {device: H100, mig: 1g.11gb}}", "H100-SXM has no profile 1g.11gb; the nearest is 1g.10gb"),
        ("nodes: {a: {like: b}, b: {like: a}}", "nodes.a.like: b is no described node"),
        ("nodes: {a: {like: z}, b: {device: H100}}", "nodes.a.like: z is no described node; the nearest is b"),
        ("nodes: {b: {device: H100}, a: {like: b, device: L4}}", "nodes.a: it is like b: say no device"),
        (
            NODE % "{devices: all, link: nvlink9}",
            r"nodes.a.links\[0\].link: unknown link nvlink9; the nearest is nvlink",
        ),
        (NODE % "{devices: all, link: ndr}", "infiniband-ndr is a network; those are between nodes"),
        (NODE % "{devices: all, link: nvlink5}", r"nvlink5 \(900 GB/s\) is above what H100-SXM has"),
        (NODE % "{devices: [0, 8], link: nvlink4}", "the node has devices 0 to 7, not 8"),
        (NODE % "{pairs: [[3, 3]], link: nvlink4}", "device 3 is linked to itself"),
        (NODE % "{link: nvlink4}", "say between which: devices: all"),
        (NODE % "{devices: all, lnk: nvlink4}", r"unknown key nodes.a.links\[0\].lnk; the nearest is link"),
        (
            NODE % "{devices: all, link: nvlink4}, {pairs: [[1, 0]], link: nvlink3}",
            r"links\[1\]: devices 0 and 1 have nvlink4 and nvlink3",
        ),
        ("nodes: {a: {device: H100, links: nvlink4}}", "nodes.a.links must be a list"),
        ("nodes: {a: {device: L40S, count: 2, links: [{devices: all, link: nvlink4}]}}", "L40S has no nvlink4"),
        (
            "nodes: {a: {device: H100, count: 7, mig: 1g.10gb, links: [{devices: all, link: nvlink4}]}}",
            "MIG slices have no nvlink4",
        ),
        (TWO.split("links:\n")[0], "nodes a and b have no network; say it in links"),
        (TWO.replace("ndr", "xdr"), r"infiniband-xdr \(100 GB/s\) is above what H100-SXM has"),
        (TWO.replace("link: ndr", "link: nvlink4"), "nvlink4 is within a node; hosts that share it are one node"),
        (TWO.replace("nodes: all", "nodes: [a, c]"), r"links\[0\]: unknown node c; the nearest is"),
        (TWO.replace("nodes: all", "nodes: [a, a]"), r"links\[0\]: a link is between two nodes or more"),
        (TWO.replace("link: ndr", "link: ndr, ports: 0"), r"links\[0\].ports: 0 must be at least 1"),
        (TWO + "  - {nodes: [b, a], link: hdr}", r"links\[1\]: b and a have infiniband-ndr and infiniband-hdr"),
        (TWO + "use: {devices: 9}", "use.devices: it has devices 0 to 7, not 8"),
        (TWO + "use: {devices: [1, 1]}", r"use.devices: \(1, 1\) must be one device or more, each once"),
        (TWO + "use: {devices: 0}", "use.devices: 0 must be one device or more"),
        (TWO + "use: {device: 2}", "unknown key use.device; the nearest is devices"),
        (TWO + "price: {dollars_per_hour: 2}", "missing required field `source`"),
        (TWO + "price: {dollars_per_hour: 0, date: 2026-01-01, source: a}", "price.dollars_per_hour: 0.0 must be"),
    ],
)
def test_contradictions(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CatalogueError, match=message) as caught:
        read(tmp_path, text)
    assert "own.yaml" in str(caught.value) and "\n" not in str(caught.value)
