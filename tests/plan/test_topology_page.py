"""docs/topology.md against the code: every key is in its table, every name in the list means something."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
import yaml

from shoal.plan.catalogue import cluster
from shoal.plan.hardware_file import read_hardware
from shoal.plan.topology_file import DeviceLink, NodeEntry, NodeLink, Subset, TopologyFile

PAGE = (Path(__file__).parents[2] / "docs" / "topology.md").read_text(encoding="utf-8")


def keys_below(heading: str) -> list[str]:
    (section,) = re.findall(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("The file", TopologyFile),
        ("A node", NodeEntry),
        ("A link among devices", DeviceLink),
        ("A link between nodes", NodeLink),
        ("What may be used", Subset),
    ],
)
def test_every_key_is_documented(heading: str, kind: type[msgspec.Struct]) -> None:
    assert keys_below(heading) == list(kind.__struct_fields__)


def test_names_mean_what_the_page_says() -> None:
    (section,) = re.findall(r"^## By name\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL)
    names = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(names) >= 9
    assert [cluster(name).num_devices for name in names] == [1, 8, 16, 16, 4, 2, 7, 16, 8]


def examples() -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_topology_of_the_page(tmp_path: Path) -> None:
    file = tmp_path / "lab.yaml"
    file.write_text(examples()[0], encoding="utf-8")
    found = cluster(str(file))
    assert (found.name, found.num_devices, found.dollars_per_device_hour) == ("lab", 16, 2.1)
    tree = yaml.safe_load(examples()[0])
    tree["use"] = {"nodes": ["old"]}
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert cluster(str(file)).device.name == "A100-80GB-SXM"


def test_the_hardware_of_the_page(tmp_path: Path) -> None:
    file = tmp_path / "acme.yaml"
    file.write_text(examples()[1], encoding="utf-8")
    found = cluster("2xacme-4", [file])
    assert found.num_devices == 8 and found.network is not None and found.network.name == "roce-400"
    assert found.device.sources["rates.float8"].startswith("datasheet: ACME")
    assert found.device.sources["watts"] == "assumed: acme.yaml gives no source"
    device = read_hardware(file).devices["X1"]
    for key in ("memory_bytes", "rates", "fractions", "mig", "kernel_seconds"):
        assert getattr(device, key), key


def test_what_a_program_sees_of_the_memory() -> None:
    assert cluster("H100").device.memory_bytes / 2**30 == pytest.approx(79.6, abs=0.05)
