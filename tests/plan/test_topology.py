"""Clusters by name: what a name means, and every name that contradicts itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.plan.catalogue import BUILTIN, Catalogue, CatalogueError, cluster
from shoal.plan.hardware_file import read_hardware
from shoal.plan.topology import parse_cluster, slice_of, slices

KNOWN = Catalogue([read_hardware(file) for file in sorted(BUILTIN.glob("*.yaml"))])


@pytest.mark.parametrize(
    ("text", "nodes", "each", "device", "scale_up", "network"),
    [
        ("H100", 1, 1, "H100-SXM", "nvlink4", None),
        ("8xH100", 1, 8, "H100-SXM", "nvlink4", None),
        ("8 x H100 SXM", 1, 8, "H100-SXM", "nvlink4", None),
        ("2x8xH100:ndr", 2, 8, "H100-SXM", "nvlink4", "infiniband-ndr"),
        ("2x8xH100:tcp-25", 2, 8, "H100-SXM", "nvlink4", "tcp-25"),
        ("2x8xH100:pcie5:tcp-25", 2, 8, "H100-SXM", "pcie5", "tcp-25"),
        ("16x8xH200:efa", 16, 8, "H200-SXM", "nvlink4", "efa-400"),
        ("4xL40S:pcie4", 1, 4, "L40S", "pcie4", None),
        ("4xL40S:pcie4-no-p2p", 1, 4, "L40S", "pcie4-no-p2p", None),
        ("2xH100-PCIe", 1, 2, "H100-PCIe", "pcie5", None),
        ("2xH100-PCIe:nvlink4-bridge", 1, 2, "H100-PCIe", "nvlink4-bridge", None),
        ("2xRTX 4090", 1, 2, "RTX-4090", "pcie4-no-p2p", None),
        ("4xGB200", 1, 4, "GB200", "nvlink5-nvl72", None),
        ("72xGB200", 1, 72, "GB200", "nvlink5-nvl72", None),
        ("gb200-nvl72", 1, 72, "GB200", "nvlink5-nvl72", None),
        ("2xgb300-nvl72", 2, 72, "GB300", "nvlink5-nvl72", "infiniband-xdr"),
        ("hgx-h100", 1, 8, "H100-SXM", "nvlink4", None),
        ("2xhgx-h100", 2, 8, "H100-SXM", "nvlink4", "infiniband-ndr"),
        ("2xhgx-h100:roce-400", 2, 8, "H100-SXM", "nvlink4", "roce-400"),
        ("4x8xMI300X:roce-400", 4, 8, "MI300X", "infinity-fabric-3", "roce-400"),
        ("2xcpu", 1, 2, "cpu", "shared-memory", None),
        ("2x8xcpu:tcp-10", 2, 8, "cpu", "shared-memory", "tcp-10"),
        ("7xH100:1g.10gb", 1, 7, "H100-SXM:1g.10gb", "pcie5-no-p2p", None),
    ],
)
def test_names(text: str, nodes: int, each: int, device: str, scale_up: str, network: str | None) -> None:
    found = parse_cluster(text, KNOWN)
    assert (found.num_nodes, found.devices_per_node, found.device.name) == (nodes, each, device)
    assert found.scale_up.name == scale_up
    assert (found.network.name if found.network else None) == network
    assert found.name == text and found.num_devices == nodes * each
    assert found.link(1).name == scale_up
    if network:
        assert found.link(found.num_devices).name == network
    assert found.host is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no device"),
        ("8x", "unknown device 8x"),
        ("8xH1000", "unknown device H1000; the nearest is H100"),
        ("H100x8", "unknown device H100x8; the nearest is H100"),
        ("0xH100", "0 must be at least 1"),
        ("2x0xH100:ndr", "0 must be at least 1"),
        ("-1xH100", "-1 must be at least 1"),
        ("2x8xH100", "2 nodes need a network; write 2x8xH100-SXM:ndr"),
        ("2x4xL40S", "2 nodes need a network; write 2x4xL40S:tcp-25"),
        ("8xH100:ndt", "ndt is no link or MIG profile of H100-SXM; the nearest is ndr"),
        ("8xH100:2g.10gb", "2g.10gb is no link or MIG profile of H100-SXM; the nearest is 2g.20gb or 1g.10gb"),
        ("2x8xH100:ndr:hdr", "infiniband-ndr and infiniband-hdr are two networks"),
        ("8xH100:nvlink4:pcie5", "nvlink4 and pcie5 are two links within a node"),
        ("7xH100:1g.10gb:2g.20gb", "1g.10gb and 2g.20gb are two MIG profiles"),
        ("7xH100:1g.10gb:nvlink4", "MIG slices have no nvlink4"),
        ("8xH100:nvlink5", r"nvlink5 \(900 GB/s\) is above what H100-SXM has \(nvlink4, 450 GB/s\)"),
        ("4xL40S:nvlink4", "L40S has no nvlink4; its link is pcie4"),
        ("4xL40S:pcie5", r"pcie5 \(64 GB/s\) is above what L40S has \(pcie4, 32 GB/s\)"),
        ("2x4xL40S:ndr", r"infiniband-ndr \(50 GB/s\) is above what L40S has \(pcie4, 32 GB/s\)"),
        ("2x8xH100:xdr", r"infiniband-xdr \(100 GB/s\) is above what H100-SXM has \(pcie5, 64 GB/s\)"),
        ("16xH100", "largest node of H100-SXM with nvlink4 that is known has 8; write 2x8xH100-SXM:ndr"),
        ("4xH100-NVL", "4xH100-NVL:pcie5 for one host without that link among all"),
        ("2x2xhgx-h100", "hgx-h100 is a whole node; write 2xhgx-h100"),
        ("hgx-h1000", "unknown device hgx-h1000; the nearest is hgx-h100"),
        ("hgx-h100:hdr:ndr", "infiniband-hdr and infiniband-ndr are two networks"),
        ("absent.yaml", "absent.yaml: No such file"),
    ],
)
def test_contradictions(text: str, message: str) -> None:
    with pytest.raises(CatalogueError, match=message) as caught:
        parse_cluster(text, KNOWN)
    assert "\n" not in str(caught.value)


@given(st.integers(1, 8), st.integers(2, 500), st.sampled_from(["ndr", "hdr", "roce-200", "efa", "tcp-25"]))
def test_any_number_of_equal_nodes(each: int, nodes: int, network: str) -> None:
    found = parse_cluster(f"{nodes}x{each}xH100:{network}", KNOWN)
    assert found.num_devices == nodes * each
    assert found.network == KNOWN.link(network)


@given(st.text(alphabet="x×8H10a:.- /", max_size=12))
def test_any_text_is_a_cluster_or_a_clear_error(text: str) -> None:
    try:
        assert parse_cluster(text, KNOWN).num_devices >= 1
    except CatalogueError as error:
        assert str(error)


@pytest.mark.parametrize("profile", KNOWN.device("H100").mig)
def test_slices_share_a_device(profile: str) -> None:
    whole = KNOWN.device("H100")
    part, count = slice_of(whole, profile), slices(whole, profile)
    assert count == {"1g.10gb": 7, "1g.20gb": 4, "2g.20gb": 3, "3g.40gb": 2, "4g.40gb": 1, "7g.80gb": 1}[profile]
    assert part.memory_bytes * count <= whole.memory_bytes
    assert sum(part.rates["bfloat16"] for _ in range(count)) <= whole.rates["bfloat16"] * 1.0001
    assert part.memory_bandwidth / whole.memory_bandwidth == pytest.approx(part.memory_bytes / whole.memory_bytes)
    assert not part.mig and not part.scale_up


def test_prices() -> None:
    h100 = parse_cluster("8xH100", KNOWN)
    assert h100.dollars_per_device_hour == 2.99 and "median of 3 list prices" in h100.price_source
    assert parse_cluster("2xH100", KNOWN).dollars_per_device_hour == h100.dollars_per_device_hour
    part = parse_cluster("7xH100:1g.10gb", KNOWN)
    assert part.dollars_per_device_hour == pytest.approx(h100.dollars_per_device_hour / 7)
    assert part.price_source.startswith("1/7 of H100-SXM")
    assert parse_cluster("8xcpu", KNOWN).dollars_per_device_hour is None
    for node in KNOWN.nodes.values():
        for one in node.prices:
            assert one.date[:2] == "20" and one.source.startswith("https://") and one.provider


def test_a_device_without_any_link(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(
        "devices: {X: {vendor: amd, memory_bytes: 1GiB, memory_bandwidth: 1TB/s, rates: {bfloat16: 1T}}}",
        encoding="utf-8",
    )
    with pytest.raises(CatalogueError, match="device X: say scale_up or host_link"):
        cluster("2xX", [file])
    assert cluster("2xX:pcie4", [file]).scale_up.name == "pcie4"
