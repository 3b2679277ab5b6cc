"""A file of devices, links and nodes: typed, strict, with units as people write them, and where each figure is from.

sources: {sheet: "datasheet: ACME X1 product brief, 2026"}
devices:
  X1: {vendor: nvidia, memory_bytes: 80GiB, memory_bandwidth: 3.35TB/s, rates: {bfloat16: 989T}, sources: {...}}
links: ...
nodes: ...
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import msgspec
import yaml

from shoal.core.hardware import DeviceSpec, LinkSpec, NodeSpec, Provenance

DTYPES = ("float32", "bfloat16", "float8", "int8", "float4", "int4")
FRACTIONS = (
    *(f"{work}.{dtype}" for work in ("matmul", "stream") for dtype in DTYPES),
    *("attention.decode", "attention.decode.float8", "attention.prefill", "attention.prefill.float8", "copy"),
)
"""What `fractions` may hold: of a rate (matmul, attention.prefill) or of the memory's bandwidth (the others)."""

Unit = Literal["bytes", "bytes/s", "operations/s", "seconds"]
Spec = TypeVar("Spec", DeviceSpec, LinkSpec, NodeSpec)

# Decimals, so that 5us is the number nearest to 0.000005.
_BYTES = {"": Decimal(1), "B": Decimal(1)} | {
    f"{prefix}{suffix}": Decimal(base) ** power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_BITS = {
    f"{prefix}{suffix}": Decimal(1000) ** power / 8
    for power, prefix in enumerate("MGT", 2)
    for suffix in ("bit/s", "b/s")
}
_SCALES: dict[Unit, dict[str, Decimal]] = {
    "bytes": _BYTES,
    "bytes/s": {"": Decimal(1)} | {f"{name}/s": scale for name, scale in _BYTES.items() if name} | _BITS,
    "operations/s": {"": Decimal(1)}
    | {
        f"{prefix}{suffix}": Decimal(1000) ** power
        for power, prefix in enumerate("GTP", 3)
        for suffix in ("", "FLOP/s", "OP/s", "FLOPS", "OPS")
    },
    "seconds": {name: Decimal(f"1e{power}") for name, power in (("", 0), ("s", 0), ("ms", -3), ("us", -6), ("ns", -9))},
}
_EXAMPLES: dict[Unit, str] = {
    "bytes": "80GiB or 141GB",
    "bytes/s": "3.35TB/s or 400Gbit/s",
    "operations/s": "989T or 989 TFLOP/s",
    "seconds": "5us or 0.3ms",
}
_UNITS: dict[str, Unit] = {
    "memory_bytes": "bytes",
    "memory_bandwidth": "bytes/s",
    "kernel_seconds": "seconds",
    "bandwidth": "bytes/s",
    "latency": "seconds",
    "host_memory_bytes": "bytes",
}
_FIGURES = {
    DeviceSpec: ("memory_bytes", "memory_bandwidth", "rates", "fractions", "kernel_seconds", "watts", "mig"),
    LinkSpec: ("bandwidth", "latency", "reached", "all_reduce"),
    NodeSpec: ("count", "host_memory_bytes"),
}


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The one in C takes a tenth of the time, and is not in every build."""


class CatalogueError(Exception):
    """A device, link, node or cluster that makes no sense. The message names it and says what would."""


class HardwareFile(msgspec.Struct, frozen=True):
    devices: dict[str, DeviceSpec]
    links: dict[str, LinkSpec]
    nodes: dict[str, NodeSpec]


def quantity(value: object, unit: Unit) -> float:
    """`value` in `unit`: a number, or a text such as "3.35TB/s". Raises ValueError.

    KB is 1000 bytes and KiB 1024; a big B is a byte and a small b a bit. Zero, negative and endless are refused.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d{1,3})?)\s*([A-Za-z/]*)\s*", value)
        if match is None or match[2] not in _SCALES[unit]:
            raise ValueError(f"{value!r} is not in {unit}: write {_EXAMPLES[unit]}")
        number = float(Decimal(match[1]) * _SCALES[unit][match[2]])
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    else:
        raise ValueError(f"{value!r} is not in {unit}: write {_EXAMPLES[unit]}")
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{value!r} must be above 0")
    return number


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping that a file holds. A key that is given twice is refused: YAML's readers keep the last in silence."""

    class Loader(_SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            for key in keys:
                if keys.count(key) > 1:
                    raise CatalogueError(f"{file}: {key} is given twice")
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise CatalogueError(f"{file}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CatalogueError(f"{file}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise CatalogueError(f"{file}: must be a mapping of keys to values, not {type(tree).__name__}")
    return tree


def read_hardware(file: Path) -> HardwareFile:
    """Raises CatalogueError."""
    tree = read_yaml(file)
    known = ("sources", "devices", "links", "nodes")
    for key in tree:
        if key not in known:
            raise CatalogueError(f"{file}: unknown key {key}; the nearest is {nearest(str(key), known)}")
    texts = _mapping(tree.get("sources"), f"{file}: sources")
    default = f"assumed: {file.name} gives no source"

    def specs(section: str, kind: type[Spec]) -> dict[str, Spec]:
        found = {}
        for name, fields in _mapping(tree.get(section), f"{file}: {section}").items():
            where = f"{file}: {section}.{name}"
            found[str(name)] = spec_from(_mapping(fields, where), str(name), kind, texts, default, where)
        return found

    return HardwareFile(specs("devices", DeviceSpec), specs("links", LinkSpec), specs("nodes", NodeSpec))


def spec_from(
    fields: Mapping[str, Any],
    name: str,
    kind: type[Spec],
    texts: Mapping[str, str] | None = None,
    default: str = "assumed: no source was given",
    where: str = "",
) -> Spec:
    """A spec from what a file says of it, its figures in units, its sources by short names of `texts` or in full.

    Every figure gets a source: the one of the longest key that is a prefix of it, else `default`.
    Raises CatalogueError.
    """
    where = where or name
    allowed: list[str] = [field.name for field in msgspec.structs.fields(kind) if field.name != "name"]
    for key in fields:
        if key not in allowed:
            raise CatalogueError(f"{where}: unknown key {key}; the nearest is {nearest(str(key), allowed)}")
    tree: dict[str, Any] = {"name": name}
    for key, value in fields.items():
        try:
            tree[key] = _field(key, value)
        except ValueError as error:
            raise CatalogueError(f"{where}.{key}: {error}") from None
    given = {str(key): str((texts or {}).get(text, text)) for key, text in _mapping(tree.get("sources"), where).items()}
    for key, text in given.items():
        if text.split(":")[0] not in get_args(Provenance):
            options = ", ".join(get_args(Provenance))
            raise CatalogueError(f"{where}.sources.{key}: {text!r} must begin with one of {options}, and a colon")
    tree["sources"] = given
    try:
        spec = msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        raise CatalogueError(f"{where}: {explain(str(error))}") from None
    figures: list[str] = list(figures_of(spec))
    for key in given:
        if key not in allowed and key not in figures:
            raise CatalogueError(
                f"{where}.sources.{key}: no such figure; the nearest is {nearest(key, [*figures, *allowed])}"
            )
    _check(spec, where)
    sources = given | {figure: source_of(spec, figure) or default for figure in figures}
    return msgspec.structs.replace(spec, sources=sources)


def override(base: Spec, fields: Mapping[str, Any], source: str, where: str) -> Spec:
    """`base` with some of its figures replaced, as a file says of one machine: {bandwidth: 42GB/s}.

    A table of all-reduces was taken at the old speed: it goes where the bandwidth is another. Raises CatalogueError.
    """
    kind = type(base)
    allowed: list[str] = [field.name for field in msgspec.structs.fields(kind) if field.name not in ("name", "sources")]
    tree = msgspec.to_builtins(base)
    if isinstance(base, LinkSpec) and "bandwidth" in fields:
        tree["all_reduce"] = {}
    for key, value in fields.items():
        if key not in allowed:
            raise CatalogueError(f"{where}: unknown key {key}; the nearest is {nearest(str(key), allowed)}")
        try:
            tree[key] = _field(key, value)
        except ValueError as error:
            raise CatalogueError(f"{where}.{key}: {error}") from None
    changed = [key for key in fields if key in _FIGURES[kind]]
    kept = {
        key: text for key, text in base.sources.items() if not any(f"{key}.".startswith(f"{one}.") for one in changed)
    }
    try:
        spec: Spec = msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        raise CatalogueError(f"{where}: {explain(str(error))}") from None
    _check(spec, where)
    sources = {figure: kept.get(figure, source) for figure in figures_of(spec)}
    return msgspec.structs.replace(spec, sources=kept | sources)


def figures_of(spec: DeviceSpec | LinkSpec | NodeSpec) -> Iterator[str]:
    """Dotted names of all figures of a spec, those of which somebody may ask where they are from."""
    for name in _FIGURES[type(spec)]:
        value = getattr(spec, name)
        if isinstance(value, dict):
            yield from (f"{name}.{key}" for key in value)
        elif value is not None:
            yield name


def source_of(spec: DeviceSpec | LinkSpec | NodeSpec, figure: str) -> str:
    """Where a figure is from; empty if nobody says. A source of `rates` is one of `rates.bfloat16` too."""
    parts = figure.split(".")
    for length in range(len(parts), 0, -1):
        if found := spec.sources.get(".".join(parts[:length])):
            return found
    return ""


def nearest(name: str, options: Any) -> str:
    """The options most like a name, for an error message."""
    by_lower = {str(option).lower(): str(option) for option in options}
    found = get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    found = found or get_close_matches(name.lower(), by_lower, n=1, cutoff=0.0)
    return " or ".join(by_lower[one] for one in found) or "none"


def _field(key: str, value: Any) -> Any:
    if value is None:
        return None
    if key in _UNITS:
        number = quantity(value, _UNITS[key])
        return round(number) if _UNITS[key] == "bytes" else number
    if key == "rates":
        return {str(dtype): quantity(rate, "operations/s") for dtype, rate in _mapping(value, key).items()}
    if key == "mig":
        return {str(name): tuple(_share(one) for one in shares) for name, shares in _mapping(value, key).items()}
    if key == "all_reduce":
        return {ranks: _points(points) for ranks, points in _mapping(value, key).items()}
    if key == "prices":
        return [
            {name: str(one) if name == "date" else one for name, one in _mapping(price, key).items()} for price in value
        ]
    return value


def _share(value: object) -> float:
    """A fraction as people write it: 1/7 or 0.25."""
    match = re.fullmatch(r"\s*(\d+)\s*/\s*([1-9]\d*)\s*", str(value))
    share = int(match[1]) / int(match[2]) if match else quantity(value, "bytes")
    if not 0 < share <= 1:
        raise ValueError(f"{value!r} must be above 0 and at most 1")
    return share


def _points(points: Any) -> list[tuple[int, float]]:
    pairs = _mapping(points, "a row").items()
    return [(round(quantity(size, "bytes")), quantity(time, "seconds")) for size, time in pairs]


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CatalogueError(f"{where} must be a mapping of names to values, not {value!r}")
    return value


def explain(message: str) -> str:
    """msgspec's message with the key first."""
    match = re.fullmatch(r"(.*) - at `\$\.?(.*)`", message)
    text = f"{match[1][0].lower()}{match[1][1:]}" if match else f"{message[0].lower()}{message[1:]}"
    return f"{match[2]}: {text}" if match else text


def _check(spec: DeviceSpec | LinkSpec | NodeSpec, where: str) -> None:
    """What types cannot say. Raises CatalogueError."""
    if isinstance(spec, DeviceSpec):
        _check_device(spec, where)
    elif isinstance(spec, LinkSpec):
        if not 0 < spec.reached <= 1:
            raise CatalogueError(f"{where}.reached: {spec.reached} must be above 0 and at most 1")
        for ranks, points in spec.all_reduce.items():
            sizes = [size for size, _ in points]
            if ranks < 2 or len(points) < 2 or sizes != sorted(set(sizes)):
                raise CatalogueError(f"{where}.all_reduce.{ranks}: two or more points, by size, for 2 or more ranks")
    else:
        if spec.count < 1:
            raise CatalogueError(f"{where}.count: {spec.count} must be at least 1")
        for price in spec.prices:
            if price.dollars_per_hour <= 0:
                raise CatalogueError(f"{where}.prices: {price.dollars_per_hour} must be above 0")


def _check_device(spec: DeviceSpec, where: str) -> None:
    if not spec.rates:
        raise CatalogueError(f"{where}.rates: at least one is needed")
    for key, options in ((spec.rates, DTYPES), (spec.fractions, FRACTIONS)):
        for name in key:
            if name not in options:
                raise CatalogueError(f"{where}: unknown figure {name}; the nearest is {nearest(name, options)}")
    for name, fraction in spec.fractions.items():
        if not 0 < fraction <= 1:
            raise CatalogueError(f"{where}.fractions.{name}: {fraction} must be above 0 and at most 1")
    if spec.watts is not None and spec.watts <= 0:
        raise CatalogueError(f"{where}.watts: {spec.watts} must be above 0")
