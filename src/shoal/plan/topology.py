"""Clusters by name (`8xH100`, `2x8xH100:ndr`, `7xH100:1g.10gb`, `2xhgx-h100`) or from a file (topology_file.py)."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec

from shoal.core.hardware import Cluster, DeviceSpec, LinkSpec, Price
from shoal.plan.catalogue import Catalogue, CatalogueError
from shoal.plan.hardware_file import nearest

FORM = "write it as 8xH100, 2x8xH100:ndr, 4xL40S:pcie4, 7xH100:1g.10gb, or give a YAML file"
_NO_PEER = {"pcie3": "pcie4-no-p2p", "pcie4": "pcie4-no-p2p", "pcie5": "pcie5-no-p2p", "pcie6": "pcie5-no-p2p"}


def parse_cluster(text: str, catalogue: Catalogue) -> Cluster:
    """Raises CatalogueError."""
    if text.endswith((".yaml", ".yml", ".json")) or "/" in text or Path(text).is_file():
        from shoal.plan.topology_file import read_topology

        return read_topology(Path(text), catalogue)
    head, *options = text.split(":")
    match = re.fullmatch(r"\s*(?:(-?\d+)\s*[x×])?\s*(?:(-?\d+)\s*[x×])?\s*(\S.*?)\s*", head)
    if match is None:
        raise CatalogueError(f"{text!r} names no device; {FORM}")
    outer, inner, name = match.groups()
    counts = [int(count) for count in (outer, inner) if count is not None]
    for count in counts:
        if count < 1:
            raise CatalogueError(f"{text}: {count} must be at least 1")
    # Names of nodes may begin with a count themselves (4xl40s), which is then how many devices and not how many nodes.
    if catalogue.has_node(name) and not catalogue.has_device(name):
        if len(counts) > 1:
            raise CatalogueError(f"{text}: {name} is a whole node; write {counts[0]}x{name}")
        return _of_node(text, name, counts[0] if counts else 1, options, catalogue)
    if not catalogue.has_device(name):
        known = [*catalogue.devices, *catalogue.nodes]
        known += [alias for device in catalogue.devices.values() for alias in device.aliases]
        raise CatalogueError(f"{text}: unknown device {name}; the nearest is {nearest(name, known)}; {FORM}")
    num_nodes, per_node = (counts[0], counts[1]) if len(counts) == 2 else (1, counts[0] if counts else 1)
    return build(text, catalogue, catalogue.device(name), per_node, num_nodes, options)


def _of_node(text: str, name: str, num_nodes: int, options: Sequence[str], catalogue: Catalogue) -> Cluster:
    spec = catalogue.node(name)
    given = [_kind_of(option, catalogue) for option in options]
    links = [spec.scale_up] if "scale-up" not in given else []
    if spec.network and num_nodes > 1 and "network" not in given:
        links.append(spec.network)
    return build(text, catalogue, catalogue.device(spec.device), spec.count, num_nodes, [*options, *links])


def _kind_of(option: str, catalogue: Catalogue) -> str:
    if not catalogue.has_link(option):
        return "other"
    return "network" if catalogue.link(option).kind == "network" else "scale-up"


def build(
    text: str,
    catalogue: Catalogue,
    device: DeviceSpec,
    per_node: int,
    num_nodes: int,
    options: Sequence[str],
) -> Cluster:
    """A cluster of equal nodes; `options` are names of a MIG profile and of links within and between nodes.

    Raises CatalogueError.
    """
    sliced, scale_up, network = _options(text, catalogue, device, options)
    if sliced is not None:
        if scale_up is not None and scale_up.kind == "scale-up":
            raise CatalogueError(f"{text}: MIG slices have no {scale_up.name}: they reach each other through the host")
        scale_up = scale_up or between_slices(device, catalogue)
    scale_up = scale_up or default_scale_up(device, catalogue)
    check(text, catalogue, device, per_node, num_nodes, scale_up, network)
    dollars, source = price(device, per_node, catalogue)
    whole = device
    if sliced is not None:
        device = slice_of(device, sliced)
        if dollars is not None:
            count = slices(whole, sliced)
            dollars, source = dollars / count, f"1/{count} of {whole.name}: {source}"
    return Cluster(
        device=device,
        devices_per_node=per_node,
        num_nodes=num_nodes,
        scale_up=scale_up,
        network=network,
        host=catalogue.link(whole.host_link) if whole.host_link else None,
        dollars_per_device_hour=dollars,
        price_source=source,
        slices=1 if sliced is None else slices(whole, sliced),
        name=text,
    )


def _options(
    text: str, catalogue: Catalogue, device: DeviceSpec, options: Sequence[str]
) -> tuple[str | None, LinkSpec | None, LinkSpec | None]:
    """A MIG profile, a link within nodes and one between them, each at most once."""
    sliced: str | None = None
    scale_up: LinkSpec | None = None
    network: LinkSpec | None = None
    for option in options:
        if option in device.mig:
            if sliced is not None:
                raise CatalogueError(f"{text}: {sliced} and {option} are two MIG profiles")
            sliced = option
            continue
        if not catalogue.has_link(option):
            known = [*catalogue.links, *(alias for one in catalogue.links.values() for alias in one.aliases)]
            raise CatalogueError(
                f"{text}: {option} is no link or MIG profile of {device.name}; "
                f"the nearest is {nearest(option, [*known, *device.mig])}"
            )
        link = catalogue.link(option)
        if link.kind == "network":
            if network is not None:
                raise CatalogueError(f"{text}: {network.name} and {link.name} are two networks")
            network = link
        else:
            if scale_up is not None:
                raise CatalogueError(f"{text}: {scale_up.name} and {link.name} are two links within a node")
            scale_up = link
    return sliced, scale_up, network


def between_slices(device: DeviceSpec, catalogue: Catalogue) -> LinkSpec:
    """MIG slices, of one device or of several, have no peer access: what they send goes through host memory."""
    return catalogue.link(_NO_PEER.get(device.host_link, device.host_link))


def default_scale_up(device: DeviceSpec, catalogue: Catalogue) -> LinkSpec:
    """Of a device by itself: its own link, else the PCIe that it sits on."""
    name = device.scale_up or device.host_link
    if not name:
        raise CatalogueError(
            f"device {device.name}: say scale_up or host_link, or name a link as in 4x{device.name}:pcie4"
        )
    return catalogue.link(name)


def check(
    text: str,
    catalogue: Catalogue,
    device: DeviceSpec,
    per_node: int,
    num_nodes: int,
    scale_up: LinkSpec,
    network: LinkSpec | None,
    *,
    described: bool = False,
) -> None:
    """What contradicts itself or the devices; nodes that somebody `described` may be larger than known ones.

    Raises CatalogueError.
    """
    if num_nodes > 1 and network is None:
        near = "ndr" if scale_up.kind == "scale-up" else "tcp-25"
        raise CatalogueError(
            f"{text}: {num_nodes} nodes need a network; write {num_nodes}x{per_node}x{device.name}:{near}"
        )
    known = [node for node in catalogue.nodes_of(device) if catalogue.link(node.scale_up).name == scale_up.name]
    own = default_scale_up(device, catalogue) if device.scale_up or device.host_link else scale_up
    if scale_up.kind == "scale-up" and own.kind != "scale-up" and not known:
        raise CatalogueError(f"{text}: {device.name} has no {scale_up.name}; its link is {own.name}")
    if scale_up.kind == own.kind and not known:
        _at_most(text, scale_up, device, own)
    if device.host_link:
        host = catalogue.link(device.host_link)
        for link in (scale_up, network):
            if link is not None and host.kind == "pcie" and link.kind in ("pcie", "network"):
                _at_most(text, link, device, host)
    largest = max((node.count for node in known), default=0)
    if scale_up.kind == "scale-up" and known and per_node > largest and not described:
        raise CatalogueError(
            f"{text}: the largest node of {device.name} with {scale_up.name} that is known has {largest}; write "
            f"{-(-per_node // largest)}x{largest}x{device.name}:ndr, or {per_node}x{device.name}:{device.host_link} "
            f"for one host without that link among all, or describe your node in a topology file"
        )


def _at_most(text: str, link: LinkSpec, device: DeviceSpec, limit: LinkSpec) -> None:
    if link.bandwidth > limit.bandwidth * 1.001:
        raise CatalogueError(
            f"{text}: {link.name} ({gigabytes(link.bandwidth)}) is above what {device.name} has "
            f"({limit.name}, {gigabytes(limit.bandwidth)})"
        )


def gigabytes(bandwidth: float) -> str:
    return f"{bandwidth / 1e9:.4g} GB/s"


def slice_of(device: DeviceSpec, profile: str) -> DeviceSpec:
    """A MIG slice as a device: its share of rates, memory and bandwidth, and no link of its own."""
    compute, memory = device.mig[profile]
    return msgspec.structs.replace(
        device,
        name=f"{device.name}:{profile}",
        memory_bytes=int(device.memory_bytes * memory),
        memory_bandwidth=device.memory_bandwidth * memory,
        rates={dtype: rate * compute for dtype, rate in device.rates.items()},
        scale_up="",
        aliases=(),
        mig={},
        watts=None if device.watts is None else device.watts / slices(device, profile),
    )


def slices(device: DeviceSpec, profile: str) -> int:
    """How many of them one device can be cut into."""
    compute, memory = device.mig[profile]
    return max(1, int(min(1 / compute, 1 / memory) + 1e-9))


def price(device: DeviceSpec, per_node: int, catalogue: Catalogue) -> tuple[float | None, str]:
    """Dollars an hour of one device, and where that is from: the median of the node most like this one."""
    priced = [node for node in catalogue.nodes_of(device) if node.prices]
    if not priced:
        return None, ""
    node = min(priced, key=lambda one: (abs(one.count - per_node), one.name))
    return median_price(node.prices)


def median_price(prices: Sequence[Price]) -> tuple[float, str]:
    dollars = statistics.median_low([one.dollars_per_hour for one in prices])
    (chosen, *_) = [one for one in prices if one.dollars_per_hour == dollars]
    among = f", median of {len(prices)} list prices" if len(prices) > 1 else ""
    return dollars, f"{chosen.provider or 'list price'}, {chosen.date}{among}: {chosen.source}"
