"""Units, and what a hardware file may not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.hardware import LinkSpec
from shoal.plan.catalogue import load
from shoal.plan.hardware_file import CatalogueError, Unit, override, quantity, read_hardware


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("80GiB", "bytes", 80 * 2**30),
        ("141GB", "bytes", 141e9),
        ("1 KiB", "bytes", 1024),
        ("512", "bytes", 512),
        (512, "bytes", 512),
        ("3.35TB/s", "bytes/s", 3.35e12),
        ("400Gbit/s", "bytes/s", 50e9),
        ("400Gb/s", "bytes/s", 50e9),
        ("450GB/s", "bytes/s", 450e9),
        ("989T", "operations/s", 989e12),
        ("2.25P", "operations/s", 2.25e15),
        ("989 TFLOP/s", "operations/s", 989e12),
        ("624TOPS", "operations/s", 624e12),
        ("5us", "seconds", 5e-6),
        ("0.3ms", "seconds", 3e-4),
        ("800ns", "seconds", 8e-7),
    ],
)
def test_units(text: object, unit: Unit, value: float) -> None:
    assert quantity(text, unit) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("80G", "bytes"),
        ("80gb", "bytes"),
        ("-1GB", "bytes"),
        ("0GB", "bytes"),
        ("GB", "bytes"),
        ("", "bytes"),
        (True, "bytes"),
        (None, "bytes"),
        ([1], "bytes"),
        ("3.35TB", "bytes/s"),
        ("400gbit/s", "bytes/s"),
        ("989TB/s", "operations/s"),
        ("5 minutes", "seconds"),
        (float("nan"), "seconds"),
        (float("inf"), "seconds"),
        ("1e400", "seconds"),
    ],
)
def test_what_is_no_quantity(text: object, unit: Unit) -> None:
    with pytest.raises(ValueError, match=r"is not in|must be above 0"):
        quantity(text, unit)


@given(st.floats(min_value=1e-9, max_value=1e15), st.sampled_from(["bytes", "bytes/s", "operations/s", "seconds"]))
def test_a_number_is_itself(number: float, unit: Any) -> None:
    assert quantity(number, unit) == number
    assert quantity(f"{number:.6e}", unit) == pytest.approx(number, rel=1e-5)


DEVICE = {"vendor": "nvidia", "memory_bytes": "1GiB", "memory_bandwidth": "1TB/s", "rates": {"bfloat16": "1T"}}
LINK = {"kind": "network", "bandwidth": "1GB/s", "latency": "1us"}
NODE = {"device": "H100", "count": 8, "scale_up": "nvlink4"}


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("devices", DEVICE | {"memry_bytes": 1}, "devices.x: unknown key memry_bytes; the nearest is memory_bytes"),
        ("devices", DEVICE | {"memory_bytes": "80G"}, r"devices.x.memory_bytes: '80G' is not in bytes: write 80GiB"),
        ("devices", DEVICE | {"rates": {}}, "devices.x.rates: at least one"),
        ("devices", DEVICE | {"rates": {"fp8": "1T"}}, "unknown figure fp8; the nearest is float8"),
        ("devices", DEVICE | {"rates": "1T"}, "rates must be a mapping"),
        ("devices", DEVICE | {"fractions": {"matmul.bf16": 0.5}}, "unknown figure matmul.bf16; the nearest is matmul"),
        ("devices", DEVICE | {"fractions": {"copy": 1.5}}, "fractions.copy: 1.5 must be above 0 and at most 1"),
        ("devices", DEVICE | {"watts": -3}, "devices.x.watts: -3.0 must be above 0"),
        ("devices", DEVICE | {"vendor": "acme"}, "devices.x: vendor: invalid enum value 'acme'"),
        ("devices", DEVICE | {"mig": {"a": ["3/2", "1/2"]}}, "devices.x.mig: '3/2' must be above 0 and at most 1"),
        ("devices", DEVICE | {"mig": {"a": ["1/2"]}}, "devices.x: mig"),
        ("devices", {"vendor": "nvidia"}, "devices.x: object missing required field `memory_bytes`"),
        ("devices", "H100", "devices.x must be a mapping"),
        ("devices", DEVICE | {"sources": {"rates": "me"}}, "sources.rates: 'me' must begin with one of measured"),
        ("devices", DEVICE | {"sources": {"rate": "assumed: a"}}, "sources.rate: no such figure; the nearest is rates"),
        ("links", LINK | {"bandwidth": "0GB/s"}, "links.x.bandwidth: '0GB/s' must be above 0"),
        ("links", LINK | {"reached": 1.1}, "links.x.reached: 1.1 must be above 0 and at most 1"),
        ("links", LINK | {"all_reduce": {2: {"1KiB": "1us"}}}, "links.x.all_reduce.2: two or more points"),
        ("links", LINK | {"all_reduce": {1: {"1KiB": "1us", "2KiB": "1us"}}}, "links.x.all_reduce.1: two or more"),
        ("links", LINK | {"all_reduce": {2: {"2KiB": "1us", "1KiB": "2us"}}}, "links.x.all_reduce.2: two or more"),
        ("nodes", NODE | {"count": 0}, "nodes.x.count: 0 must be at least 1"),
        (
            "nodes",
            NODE | {"prices": [{"dollars_per_hour": 0, "date": "2026-01-01", "source": "a"}]},
            "nodes.x.prices: 0.0 must be above 0",
        ),
        ("nodes", NODE | {"prices": [{"dollars_per_hour": 1, "source": "a"}]}, "missing required field `date`"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, section: str, fields: object, message: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({section: {"x": fields}}, sort_keys=False))
    with pytest.raises(CatalogueError, match=message) as caught:
        read_hardware(file)
    assert "own.yaml" in str(caught.value) or "rates must" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("device: {}", "unknown key device; the nearest is devices"),
        ("links: {a: {kind: network, kind: pcie}}", "kind is given twice"),
        ("[1, 2]", "must be a mapping of keys to values, not list"),
        ("a: [", "is not valid YAML"),
        ("", "must be a mapping"),
    ],
)
def test_what_is_no_hardware_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(CatalogueError, match=message):
        read_hardware(file)


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="No such file"):
        read_hardware(tmp_path / "absent.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CatalogueError, match="is not valid YAML"):
        read_hardware(tmp_path / "bytes.yaml")


def test_an_override_keeps_the_rest_and_says_where_it_is_from() -> None:
    base = load().link("nvlink4")
    slower: LinkSpec = override(base, {"latency": "6us"}, "measured: here", "f")
    assert (slower.latency, slower.bandwidth, slower.all_reduce) == (6e-6, base.bandwidth, base.all_reduce)
    assert slower.sources["latency"] == "measured: here" and slower.sources["bandwidth"] == base.sources["bandwidth"]
    other = override(base, {"bandwidth": "300GB/s"}, "measured: here", "f")
    assert other.all_reduce == {}, "it was taken at another speed"
    own = override(
        base, {"bandwidth": "300GB/s", "all_reduce": {2: {"1KiB": "5us", "1MiB": "9us"}}}, "measured: x", "f"
    )
    assert own.all_reduce == {2: ((1024, 5e-6), (1 << 20, 9e-6))} and own.sources["all_reduce.2"] == "measured: x"
    device = override(load().device("H100"), {"memory_bytes": "79GiB"}, "measured: here", "f")
    assert device.memory_bytes == 79 << 30 and device.mig == load().device("H100").mig
    with pytest.raises(CatalogueError, match="f: unknown key bandwith; the nearest is bandwidth"):
        override(base, {"bandwith": 1}, "", "f")
    with pytest.raises(CatalogueError, match="f.bandwidth: 'x' is not in bytes/s"):
        override(base, {"bandwidth": "x"}, "", "f")
    with pytest.raises(CatalogueError, match="f.reached: 2.0 must be"):
        override(base, {"reached": 2.0}, "", "f")
    with pytest.raises(CatalogueError, match="f: kind: invalid enum"):
        override(base, {"kind": "x"}, "", "f")
