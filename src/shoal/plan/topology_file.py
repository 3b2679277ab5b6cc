"""A topology file: nodes, their devices, the links between them, and what of it a plan may use.

    nodes:
      a: {device: H100, count: 8, links: [{devices: all, link: nvlink4}]}
      b: {like: a}
    links:
      - {nodes: all, link: infiniband-ndr}

What `shoal topology --write` detects is in the same form, with facts beside that a plan does not need.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import msgspec

from shoal.core.hardware import Cluster, DeviceSpec, LinkSpec, Price
from shoal.plan.catalogue import Catalogue, CatalogueError
from shoal.plan.hardware_file import explain, nearest, override, quantity, read_yaml
from shoal.plan.topology import between_slices, check, default_scale_up, median_price, price, slice_of, slices

Reference = str | dict[str, Any]
"""A name of the catalogue, or {like: NAME, with: other figures, source: where they are from}."""


class DeviceLink(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Between devices of one node."""

    link: Reference
    devices: Literal["all"] | tuple[int, ...] = ()
    """Each of them with each other."""
    pairs: tuple[tuple[int, int], ...] = ()


class NodeLink(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Between nodes."""

    link: Reference
    nodes: Literal["all"] | tuple[str, ...] = "all"
    """Each of them with each other."""
    ports: int | None = None
    """Of each node; its devices share them. One a device, if not said."""


class NodeEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    device: Reference = ""
    count: int = 1
    mig: str = ""
    """The profile into which its devices are cut; `count` is then of slices."""
    links: tuple[DeviceLink, ...] = ()
    """What is not named goes through the host."""
    host_link: str = ""
    host_memory_bytes: int | str | None = None
    like: str = ""
    """Another node of the file, equal to this one."""
    facts: dict[str, Any] = {}
    """For people: what was detected beside."""


class Subset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a plan may use, where it may not use all."""

    nodes: tuple[str, ...] = ()
    devices: int | tuple[int, ...] | None = None
    """How many of each node's, the first ones, or which."""


class TopologyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    nodes: dict[str, NodeEntry]
    links: tuple[NodeLink, ...] = ()
    use: Subset = Subset()
    price: Price | None = None
    name: str = ""


def read_topology(file: Path, catalogue: Catalogue) -> Cluster:
    """Raises CatalogueError."""
    return cluster_of(parse_topology(read_yaml(file), str(file)), catalogue, str(file))


def parse_topology(tree: dict[str, Any], where: str) -> TopologyFile:
    """Raises CatalogueError, which names the key and the nearest one."""
    _check_keys(tree, where)
    if isinstance(tree.get("price"), dict):
        tree = tree | {"price": tree["price"] | {"date": str(tree["price"].get("date", ""))}}
    try:
        file = msgspec.convert(tree, TopologyFile)
    except msgspec.ValidationError as error:
        raise CatalogueError(f"{where}: {explain(str(error))}") from None
    if file.price is not None and not file.price.dollars_per_hour > 0:
        raise CatalogueError(f"{where}: price.dollars_per_hour: {file.price.dollars_per_hour} must be above 0")
    return file


def cluster_of(file: TopologyFile, catalogue: Catalogue, where: str) -> Cluster:
    """The equal nodes that a plan may use. Raises CatalogueError where the file contradicts itself."""
    nodes = {name: _entry(name, file, where) for name in _used_nodes(file, where)}
    chosen = {name: _used_devices(node, file.use, f"{where}: nodes.{name}") for name, node in nodes.items()}
    devices = {name: _device(node.device, catalogue, f"{where}: nodes.{name}.device") for name, node in nodes.items()}
    first = next(iter(nodes))
    for name in nodes:
        here, there = (f"{len(chosen[one])} x {devices[one].name}{nodes[one].mig}" for one in (first, name))
        if here != there:
            raise CatalogueError(
                f"{where}: nodes {first} ({here}) and {name} ({there}) are not equal; name those to use, "
                f"as in use: {{nodes: [{first}], devices: {min(len(chosen[first]), len(chosen[name]))}}}"
            )
    device, count = devices[first], len(chosen[first])
    if nodes[first].host_link:
        device = msgspec.structs.replace(device, host_link=catalogue.link(nodes[first].host_link, f"{where}: ").name)
    within = [_within(node, chosen[name], device, catalogue, f"{where}: nodes.{name}") for name, node in nodes.items()]
    scale_up = min(within, key=lambda link: link.bandwidth * link.reached)
    network = _between(file, list(nodes), count, catalogue, where)
    check(where, catalogue, device, count, len(nodes), scale_up, network, described=True)
    dollars, source = median_price([file.price]) if file.price else price(device, count, catalogue)
    whole, profile = device, nodes[first].mig
    if profile:
        if profile not in device.mig:
            raise CatalogueError(
                f"{where}: nodes.{first}.mig: {device.name} has no profile {profile}; "
                f"the nearest is {nearest(profile, device.mig)}"
            )
        device = slice_of(device, profile)
        if dollars is not None and not file.price:
            dollars = dollars / slices(whole, profile)
    return Cluster(
        device=device,
        devices_per_node=count,
        num_nodes=len(nodes),
        scale_up=scale_up,
        network=network,
        host=catalogue.link(whole.host_link) if whole.host_link else None,
        dollars_per_device_hour=dollars,
        price_source=source,
        slices=slices(whole, profile) if profile else 1,
        name=file.name or where,
    )


def _used_nodes(file: TopologyFile, where: str) -> Sequence[str]:
    if not file.nodes:
        raise CatalogueError(f"{where}: nodes: at least one is needed")
    for name in file.use.nodes:
        if name not in file.nodes:
            raise CatalogueError(f"{where}: use.nodes: unknown node {name}; the nearest is {nearest(name, file.nodes)}")
    return list(dict.fromkeys(file.use.nodes)) or list(file.nodes)


def _entry(name: str, file: TopologyFile, where: str) -> NodeEntry:
    node = file.nodes[name]
    if node.like:
        other = file.nodes.get(node.like)
        if other is None or other.like:
            near = nearest(node.like, [one for one, entry in file.nodes.items() if not entry.like])
            raise CatalogueError(f"{where}: nodes.{name}.like: {node.like} is no described node; the nearest is {near}")
        if node.device or node.links:
            raise CatalogueError(
                f"{where}: nodes.{name}: it is like {node.like}: say no device and no links of its own"
            )
        return other
    if not node.device:
        raise CatalogueError(f"{where}: nodes.{name}.device: which device is needed, as in device: H100")
    if node.count < 1:
        raise CatalogueError(f"{where}: nodes.{name}.count: {node.count} must be at least 1")
    if node.host_memory_bytes is not None:
        try:
            quantity(node.host_memory_bytes, "bytes")
        except ValueError as error:
            raise CatalogueError(f"{where}: nodes.{name}.host_memory_bytes: {error}") from None
    return node


def _used_devices(node: NodeEntry, use: Subset, where: str) -> tuple[int, ...]:
    if use.devices is None:
        return tuple(range(node.count))
    numbers = tuple(range(use.devices)) if isinstance(use.devices, int) else use.devices
    if not numbers or len(set(numbers)) < len(numbers):
        raise CatalogueError(f"{where}: use.devices: {use.devices} must be one device or more, each once")
    for number in numbers:
        if not 0 <= number < node.count:
            raise CatalogueError(f"{where}: use.devices: it has devices 0 to {node.count - 1}, not {number}")
    return numbers


def _device(reference: Reference, catalogue: Catalogue, where: str) -> DeviceSpec:
    if isinstance(reference, str):
        return catalogue.device(reference, f"{where}: ")
    name, fields, source = _parts(reference, where)
    return override(catalogue.device(name, f"{where}: "), fields, source, where)


def _link(reference: Reference, catalogue: Catalogue, where: str) -> LinkSpec:
    if isinstance(reference, str):
        return catalogue.link(reference, f"{where}: ")
    name, fields, source = _parts(reference, where)
    return override(catalogue.link(name, f"{where}: "), fields, source, where)


def _parts(reference: dict[str, Any], where: str) -> tuple[str, dict[str, Any], str]:
    fields = dict(reference)
    name = fields.pop("like", None)
    if not isinstance(name, str):
        raise CatalogueError(f"{where}: say which it is like, as in {{like: H100}}")
    source = str(fields.pop("source", "assumed: the topology file gives no source"))
    return name, fields, source


def _within(node: NodeEntry, chosen: Sequence[int], device: DeviceSpec, catalogue: Catalogue, where: str) -> LinkSpec:
    """The slowest of the best links of all pairs of devices: a group is as fast as its slowest pair."""
    direct: dict[tuple[int, int], LinkSpec] = {}
    for number, entry in enumerate(node.links):
        at = f"{where}.links[{number}]"
        link = _link(entry.link, catalogue, f"{at}.link")
        if link.kind == "network":
            raise CatalogueError(f"{at}: {link.name} is a network; those are between nodes, in the file's own links")
        for pair in _pairs(entry, node.count, at):
            other = direct.get(pair)
            if other is not None and other.kind == link.kind and other != link:
                raise CatalogueError(f"{at}: devices {pair[0]} and {pair[1]} have {other.name} and {link.name}")
            if other is None or link.bandwidth > other.bandwidth:
                direct[pair] = link
    if node.mig:
        for link in direct.values():
            if link.kind == "scale-up":
                raise CatalogueError(f"{where}.links: MIG slices have no {link.name}")
    if node.mig and not direct:
        return between_slices(device, catalogue)
    pairs = [(min(pair), max(pair)) for pair in combinations(chosen, 2)]
    if not pairs or not node.links:
        return default_scale_up(device, catalogue)  # nothing is said: as the device is built
    through_host = [catalogue.link(device.host_link)] if device.host_link else []
    if not through_host and (lost := [pair for pair in pairs if pair not in direct]):
        raise CatalogueError(f"{where}: devices {lost[0][0]} and {lost[0][1]} have no link, and no host_link is said")
    found = [direct[pair] if pair in direct else through_host[0] for pair in pairs]
    return min(found, key=lambda link: link.bandwidth * link.reached)


def _pairs(entry: DeviceLink, count: int, where: str) -> list[tuple[int, int]]:
    numbers = tuple(range(count)) if entry.devices == "all" else entry.devices
    pairs = [*combinations(numbers, 2), *entry.pairs]
    if not pairs and count > 1:
        raise CatalogueError(f"{where}: say between which: devices: all, devices: [0, 1, 2] or pairs: [[0, 1]]")
    for pair in pairs:
        for number in pair:
            if not 0 <= number < count:
                raise CatalogueError(f"{where}: the node has devices 0 to {count - 1}, not {number}")
        if pair[0] == pair[1]:
            raise CatalogueError(f"{where}: device {pair[0]} is linked to itself")
    return [(min(pair), max(pair)) for pair in pairs]


def _between(
    file: TopologyFile, names: Sequence[str], per_node: int, catalogue: Catalogue, where: str
) -> LinkSpec | None:
    """The slowest link of all pairs of nodes; None where there is one node."""
    found: dict[tuple[str, str], LinkSpec] = {}
    for number, entry in enumerate(file.links):
        at = f"{where}: links[{number}]"
        link = _link(entry.link, catalogue, f"{at}.link")
        if link.kind != "network":
            raise CatalogueError(f"{at}: {link.name} is within a node; hosts that share it are one node, as NVL72 is")
        members = list(file.nodes) if entry.nodes == "all" else list(entry.nodes)
        for name in members:
            if name not in file.nodes:
                raise CatalogueError(f"{at}: unknown node {name}; the nearest is {nearest(name, file.nodes)}")
        if len(set(members)) < 2 and entry.nodes != "all":
            raise CatalogueError(f"{at}: a link is between two nodes or more")
        link = _shared(link, entry.ports, per_node, at)
        for a, b in combinations(members, 2):
            pair = (min(a, b), max(a, b))
            if pair in found and found[pair] != link:
                raise CatalogueError(f"{at}: {a} and {b} have {found[pair].name} and {link.name}; name the one to use")
            found[pair] = link
    pairs = [(min(pair), max(pair)) for pair in combinations(names, 2)]
    for pair in pairs:
        if pair not in found:
            raise CatalogueError(f"{where}: nodes {pair[0]} and {pair[1]} have no network; say it in links")
    return min((found[pair] for pair in pairs), key=lambda link: link.bandwidth * link.reached, default=None)


def _shared(link: LinkSpec, ports: int | None, per_node: int, where: str) -> LinkSpec:
    """A link's bandwidth is of one device: that of a node's ports, divided by its devices."""
    if ports is None or ports >= per_node:
        return link
    if ports < 1:
        raise CatalogueError(f"{where}.ports: {ports} must be at least 1")
    shared = f"{link.sources.get('bandwidth', 'assumed: no source')}; {per_node} devices share {ports} of them"
    return msgspec.structs.replace(
        link,
        name=f"{link.name} ({ports}/{per_node})",
        bandwidth=link.bandwidth * ports / per_node,
        all_reduce={},
        aliases=(),
        sources=link.sources | {"bandwidth": shared},
    )


def _check_keys(tree: dict[str, Any], where: str) -> None:
    """msgspec names an unknown key; this names the nearest known one too."""

    def check_one(value: Any, kind: type[msgspec.Struct], at: str) -> None:
        if not isinstance(value, dict):
            raise CatalogueError(f"{where}: {at.strip('.') or 'the file'} must be a mapping, not {value!r}")
        allowed = kind.__struct_fields__
        for key in value:
            if key not in allowed:
                raise CatalogueError(f"{where}: unknown key {at}{key}; the nearest is {nearest(str(key), allowed)}")

    def check_all(values: Any, kind: type[msgspec.Struct], at: str) -> None:
        if not isinstance(values, list):
            raise CatalogueError(f"{where}: {at} must be a list, not {values!r}")
        for number, value in enumerate(values):
            check_one(value, kind, f"{at}[{number}].")

    check_one(tree, TopologyFile, "")
    if not isinstance(tree.get("nodes"), dict):
        raise CatalogueError(
            f"{where}: nodes must be a mapping of names to nodes, as in nodes: {{a: {{device: H100}}}}"
        )
    for name, node in tree["nodes"].items():
        check_one(node, NodeEntry, f"nodes.{name}.")
        check_all(node.get("links", []), DeviceLink, f"nodes.{name}.links")
    check_all(tree.get("links", []), NodeLink, "links")
    check_one(tree.get("use", {}), Subset, "use.")
