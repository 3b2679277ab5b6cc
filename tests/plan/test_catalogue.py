"""The catalogue: every figure has its source, names lead somewhere, and the figures agree with each other."""

from __future__ import annotations

import csv
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.core.hardware import DeviceSpec, LinkSpec, NodeSpec
from shoal.plan import catalogue
from shoal.plan.catalogue import BUILTIN, Catalogue, CatalogueError, load
from shoal.plan.hardware_file import figures_of, read_hardware, source_of

ROOT = Path(__file__).parents[2]
KNOWN = Catalogue([read_hardware(file) for file in sorted(BUILTIN.glob("*.yaml"))])
SPECS: list[DeviceSpec | LinkSpec | NodeSpec] = [
    *KNOWN.devices.values(),
    *KNOWN.links.values(),
    *KNOWN.nodes.values(),
]
MEASURED_DEVICES = ("A100-80GB-SXM", "H100-SXM", "H200-SXM", "B200", "L40S")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{type(spec).__name__}-{spec.name}")
def test_every_figure_has_its_source(spec: DeviceSpec | LinkSpec | NodeSpec) -> None:
    for figure in figures_of(spec):
        source = source_of(spec, figure)
        assert source.split(":")[0] in ("datasheet", "measured", "assumed"), figure
        assert len(source) > 15 and "no source" not in source, f"{figure}: {source}"


def test_a_figure_without_a_source_would_be_found(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("links: {l: {kind: network, bandwidth: 1GB/s, latency: 1us, sources: {bandwidth: 'measured: me'}}}")
    link = read_hardware(file).links["l"]
    assert source_of(link, "bandwidth") == "measured: me"
    assert source_of(link, "latency") == "assumed: own.yaml gives no source"


def test_what_was_asked_for_is_there() -> None:
    devices = "A100-40GB-SXM A100-40GB-PCIe A100-80GB-SXM A100-80GB-PCIe H100-PCIe H100-SXM H100-NVL H200-SXM H200-NVL"
    devices += " H20 B200 B300 GB200 GB300 L4 L40S RTX-4090 RTX-5090 RTX-PRO-6000 RTX-3090 A10 A40 RTX-A6000"
    devices += " MI300X MI325X MI350X MI355X cpu"
    devices += " GH200-96GB GH200-144GB H800-SXM A800-80GB-SXM L20 RTX-6000-Ada A30 A10G V100-32GB-SXM T4"
    assert set(devices.split()) == set(KNOWN.devices)
    links = "nvlink3 nvlink4 nvlink5 pcie4 pcie4-no-p2p pcie5 pcie5-no-p2p infinity-fabric hdr ndr xdr shared-memory"
    links += " roce-100 roce-200 roce-400 efa tcp-10 tcp-25 tcp-100"
    for link in links.split():
        assert KNOWN.link(link).bandwidth > 0
    nodes = "hgx-a100 hgx-h100 hgx-h200 hgx-b200 gb200-nvl72 8xmi300x 4xl40s 8xl40s 1xh100-pcie 2xh100-pcie 4xh100-pcie"
    for node in nodes.split():
        assert KNOWN.node(node).prices, node


@pytest.mark.parametrize(
    ("name", "bfloat16", "float8", "bandwidth", "gibibytes"),
    [  # planner.md section 4.1: dense, with what a program sees of the memory
        ("A100", 312e12, None, 2039e9, 80.0),
        ("H100", 989e12, 1979e12, 3350e9, 79.6),
        ("H200", 989e12, 1979e12, 4800e9, 140.4),
        ("B200", 2250e12, 4500e12, 7700e9, 178.4),
        ("GB200", 2500e12, 5000e12, 8000e9, 185.0),
        ("L40S", 362e12, 733e12, 864e9, 45.0),
        ("RTX PRO 6000", 468e12, 936e12, 1792e9, 95.6),
    ],
)
def test_the_figures_that_guides_get_wrong(
    name: str, bfloat16: float, float8: float | None, bandwidth: float, gibibytes: float
) -> None:
    device = KNOWN.device(name)
    assert device.rates["bfloat16"] == bfloat16
    assert device.rates.get("float8") == float8
    assert device.memory_bandwidth == bandwidth
    assert device.memory_bytes / 2**30 == pytest.approx(gibibytes, abs=0.06)


@pytest.mark.parametrize(
    ("text", "name"),
    [  # as tools, reports of benchmarks and clouds write them
        ("NVIDIA H100-NVL-94GB", "H100-NVL"),
        ("H100-NVL-94GB", "H100-NVL"),
        ("NVIDIA GH200-GraceHopper-Superchip GH200-96GB aarch64", "GH200-96GB"),
        ("gh200_sxm", "GH200-96GB"),
        ("GH200 144GB", "GH200-144GB"),
        ("gb200_sxm", "GB200"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB-SXM"),
        ("A100 40 GB", "A100-40GB-SXM"),
        ("AMD Instinct MI355X 288GB HBM3e", "MI355X"),
        ("Tesla V100-SXM2-32GB", "V100-32GB-SXM"),
        ("NVIDIA L4 24GB", "L4"),
        ("B300-SXM-288GB", "B300"),
    ],
)
def test_devices_are_known_with_what_is_written_around_their_names(text: str, name: str) -> None:
    assert KNOWN.device(text).name == name


@pytest.mark.parametrize("text", ["H100-64GB", "A100-20GB", "NVIDIA", "80GB", "NVIDIA HBM3 SXM5", "V100 48GB"])
def test_a_memory_that_no_such_device_has_is_not_explained_away(text: str) -> None:
    with pytest.raises(CatalogueError, match="the nearest is"):
        KNOWN.device(text)


@pytest.mark.parametrize("device", KNOWN.devices.values(), ids=lambda device: device.name)
def test_devices_agree_with_themselves(device: DeviceSpec) -> None:
    widths = [device.rates[dtype] for dtype in ("float32", "bfloat16", "float8", "float4") if dtype in device.rates]
    assert widths == sorted(widths), "a narrower dtype is not slower"
    assert "bfloat16" in device.rates and "float32" in device.rates
    assert 1e-6 <= device.kernel_seconds <= 1e-5
    for profile, (compute, memory) in device.mig.items():
        assert 0 < compute <= 1 and 0 < memory <= 1, profile
        if profile.endswith("gb"):  # the name says how many GB it has, up to how the vendor rounds
            assert int(profile.split(".")[1][:-2]) == pytest.approx(device.memory_bytes * memory / 1e9, rel=0.15)
    if device.vendor == "nvidia" and device.scale_up.startswith("nvlink"):
        version = {"sm70": "2", "sm80": "3", "sm90": "4", "sm10": "5"}[device.architecture[:4]]
        assert device.scale_up.startswith(f"nvlink{version}")


@pytest.mark.parametrize("name", MEASURED_DEVICES)
def test_measured_devices_have_the_fractions_that_the_cost_model_takes(name: str) -> None:
    device = KNOWN.device(name)
    wanted = {"matmul.bfloat16", "matmul.int8", "stream.bfloat16", "stream.int4", "attention.decode"}
    wanted |= {"attention.prefill", "copy"}
    if "float8" in device.rates:
        wanted |= {"matmul.float8", "stream.float8", "attention.decode.float8"}
    if "float4" in device.rates:
        wanted |= {"matmul.float4", "stream.float4"}
    assert wanted == set(device.fractions)


def tables() -> Iterator[tuple[LinkSpec, int, tuple[tuple[int, float], ...]]]:
    for link in KNOWN.links.values():
        for ranks, points in link.all_reduce.items():
            yield link, ranks, points


@pytest.mark.parametrize(
    ("link", "ranks", "points"), [pytest.param(*row, id=f"{row[0].name}-{row[1]}") for row in tables()]
)
def test_no_all_reduce_is_faster_than_the_wire(
    link: LinkSpec, ranks: int, points: tuple[tuple[int, float], ...]
) -> None:
    """The unit traps: elements for bytes halves a time's bandwidth, milliseconds for microseconds is far off."""
    for size, seconds in points:
        # A switch that adds up itself sends each byte once; without one a ring sends 2 (p - 1) / p of them.
        assert seconds >= size / link.bandwidth * (0.95 if link.kind == "scale-up" else 1.0)
        assert 3e-6 < seconds < 1
    (small, quick), (large, slow) = points[0], points[-1]
    assert small <= 1024 and large >= 1 << 28 and quick < 1e-4 < slow
    assert 2 * (ranks - 1) / ranks * large / slow < link.bandwidth * 1.1
    assert link.latency * 0.8 < quick


def measured() -> Path:
    return Path(os.environ.get("SHOAL_DATA", ROOT.parent / "shared")) / "data" / "collectives_measured.csv"


@pytest.mark.skipif(not measured().exists(), reason="the measurements are not beside the checkout (SHOAL_DATA)")
@pytest.mark.parametrize(
    ("name", "system", "ranks"),
    [
        ("nvlink3", "a100_sxm", (2, 4, 8)),
        ("nvlink4", "h100_sxm", (2, 4, 8)),
        ("nvlink5", "b200_sxm", (2, 4, 8)),
        ("nvlink5-nvl72", "gb200", (2, 4)),
        ("pcie4", "l40s", (2,)),
        ("pcie4-no-p2p", "l40s", (4, 8)),
        ("pcie5", "rtx_pro_6000_server", (2, 4, 8)),
    ],
)
def test_tables_are_the_measurements(name: str, system: str, ranks: tuple[int, ...]) -> None:
    """The faster of the two kernels that an engine has, to the three digits that the table keeps."""
    best: dict[tuple[int, int], float] = {}
    with measured().open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            wide = row["dtype"] in ("half", "bfloat16") and row["source"] in ("vllm_graph", "nccl")
            if row["system"] == system and row["op"] == "all_reduce" and wide:
                key = int(row["num_gpus"]), int(row["bytes"])
                best[key] = min(float(row["us"]) * 1e-6, best.get(key, 1e9))
    table = KNOWN.link(name).all_reduce
    assert tuple(table) == ranks
    for count, points in table.items():
        for size, seconds in points:
            assert seconds == pytest.approx(best[count, size], rel=0.006)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("H100", "H100-SXM"),
        ("h100 sxm", "H100-SXM"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("h200", "H200-SXM"),
        ("a100", "A100-80GB-SXM"),
        ("4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 5090", "RTX-5090"),
        ("a6000", "RTX-A6000"),
        ("AMD Instinct MI325X 256GB HBM3e", "MI325X"),
        ("CPU", "cpu"),
    ],
)
def test_names_of_devices(said: str, meant: str) -> None:
    assert catalogue.device(said).name == meant


def test_names_of_links_and_nodes() -> None:
    assert catalogue.link("NDR").name == "infiniband-ndr"
    assert catalogue.link("PCIe Gen4").name == "pcie4"
    assert catalogue.node("HGX_H100").device == "H100-SXM"


@pytest.mark.parametrize(
    ("find", "name", "near"),
    [
        (catalogue.device, "H1000", "unknown device H1000; the nearest is H100"),
        (catalogue.device, "", "unknown device "),
        (catalogue.link, "nvlnk4", "unknown link nvlnk4; the nearest is nvlink4"),
        (catalogue.node, "hgx-h101", "unknown node hgx-h101; the nearest is hgx-h100"),
    ],
)
def test_unknown_names_have_a_nearest(find: object, name: str, near: str) -> None:
    assert callable(find)
    with pytest.raises(CatalogueError, match=f"^{near}"):
        find(name)


# --- the user's own ---------------------------------------------------------------------------------------------------

OWN = """
sources: {sheet: "datasheet: ACME"}
devices:
  X1:
    vendor: nvidia
    aliases: [acme]
    memory_bytes: 80GiB
    memory_bandwidth: 3.35TB/s
    rates: {bfloat16: 500 TFLOP/s, float8: 1P}
    kernel_seconds: 3us
    scale_up: acme-link
    host_link: pcie5
    watts: 500
    mig: {half: [1/2, 0.5]}
    sources: {rates: sheet}
links:
  acme-link: {kind: scale-up, bandwidth: 200GB/s, latency: 3us, all_reduce: {2: {1KiB: 4us, 1MiB: 20us}}}
nodes:
  acme-node:
    device: X1
    count: 4
    scale_up: acme-link
    host_memory_bytes: 1TiB
    prices: [{dollars_per_hour: 1.25, date: 2026-01-02, source: our contract}]
"""


def test_a_users_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "shoal" / "hardware"
    folder.mkdir(parents=True)
    (folder / "acme.yaml").write_text(OWN)
    device = catalogue.device("acme")
    assert device.memory_bytes == 80 << 30 and device.rates == {"bfloat16": 500e12, "float8": 1e15}
    assert device.mig == {"half": (0.5, 0.5)} and device.kernel_seconds == 3e-6
    assert device.sources["rates.float8"] == "datasheet: ACME"
    assert device.sources["watts"] == "assumed: acme.yaml gives no source"
    cluster = catalogue.cluster("4xX1")
    assert cluster.dollars_per_device_hour == 1.25 and "our contract" in cluster.price_source
    assert cluster.scale_up.all_reduce == {2: ((1024, 4e-6), (1 << 20, 20e-6))}


def test_files_of_one_command_go_before_all(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("links: {infiniband-ndr: {kind: network, bandwidth: 300Gbit/s, latency: 20us, aliases: [ndr]}}")
    assert catalogue.link("ndr", [file]).bandwidth == 37.5e9
    assert catalogue.cluster("2x8xH100:ndr", [file]).network == catalogue.link("ndr", [file])
    assert catalogue.link("ndr").bandwidth == 50e9


def test_names_that_lead_nowhere_are_found_when_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("nodes: {n: {device: H1, count: 1, scale_up: pcie4}}")
    with pytest.raises(CatalogueError, match="node n: unknown device H1; the nearest is"):
        load([file])
    file = tmp_path / "other.yaml"
    file.write_text("nodes: {n: {device: H100, count: 1, scale_up: pci}}")
    with pytest.raises(CatalogueError, match="node n: unknown link pci; the nearest is"):
        load([file])
    with pytest.raises(CatalogueError, match="No such file"):
        load([tmp_path / "absent.yaml"])


def test_an_alias_of_two_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("links: {x: {kind: network, bandwidth: 1GB/s, latency: 1us, aliases: [ndr]}}")
    with pytest.raises(CatalogueError, match="ndr is an alias of infiniband-ndr and of x"):
        load([file])


def test_the_catalogue_is_in_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert "hardware/*.yaml" in settings["package-data"]["shoal.plan"]
    assert not [path for path in BUILTIN.iterdir() if path.suffix != ".yaml"]
