"""Devices, links, nodes and clusters, as a planner sees them. `plan/hardware/*.yaml` holds known ones.

Units: bytes, bytes/s, operations/s (a multiply and an add are two), seconds. A link's bandwidth is of one device
in one direction. Rates are the vendor's dense ones; what of them is reached are `fractions`, from measurements.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Provenance = Literal["measured", "calibrated", "datasheet", "assumed"]
"""From this very machine; corrected by measurements of its kind; printed by the vendor; a guess."""


class DeviceSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    vendor: Literal["nvidia", "amd", "intel", "cpu"]
    memory_bytes: int
    """That a program can see, which is less than what is on the box."""
    memory_bandwidth: float
    rates: dict[str, float]
    """Operations/s by the dtype of the operands: float32, bfloat16, float8, int8, float4. What is absent is computed
    in the next wider dtype that is there."""
    fractions: dict[str, float] = {}
    """Of rate or bandwidth that is reached, by kind of work; see core/cost. What is absent has a default."""
    kernel_seconds: float = 3e-6
    """The least that a kernel takes, in a graph."""
    scale_up: str = ""
    """Link to the other devices of its node."""
    host_link: str = ""
    """PCIe generation."""
    aliases: tuple[str, ...] = ()
    architecture: str = ""
    """As vendors' tools call it: sm90, gfx942."""
    watts: float | None = None
    mig: dict[str, tuple[float, float]] = {}
    """Slices by name (1g.10gb): their share of the compute units and of memory and its bandwidth."""
    provenance: Provenance = "datasheet"
    sources: dict[str, str] = {}
    """Where each figure is from, by field (dotted: rates.bfloat16)."""


class LinkSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    kind: Literal["scale-up", "pcie", "network", "memory"]
    bandwidth: float
    latency: float
    """Of a small message from one device to another."""
    reached: float = 0.8
    """Of the bandwidth, by large messages."""
    all_reduce: dict[int, tuple[tuple[int, float], ...]] = {}
    """Measured: by ranks, (bytes of the reduced tensor, seconds), ascending. Between two points log-log."""
    aliases: tuple[str, ...] = ()
    provenance: Provenance = "datasheet"
    sources: dict[str, str] = {}


class Price(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    dollars_per_hour: float
    """Of one device."""
    date: str
    source: str
    provider: str = ""


class NodeSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    device: str
    count: int
    scale_up: str
    """Link among its devices: of `device`, unless said otherwise."""
    switched: bool = True
    """Every device talks to every other at full bandwidth at once; else they are in pairs or share a bus."""
    network: str = ""
    """Link of each device to other nodes; empty: none."""
    host_memory_bytes: int | None = None
    prices: tuple[Price, ...] = ()
    sources: dict[str, str] = {}


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """Equal nodes. A rank's number counts devices node by node."""

    device: DeviceSpec
    devices_per_node: int
    num_nodes: int
    scale_up: LinkSpec
    network: LinkSpec | None
    host: LinkSpec | None = None
    """To the host's memory."""
    dollars_per_device_hour: float | None = None
    price_source: str = ""
    slices: int = 1
    """MIG slices of a device that each of the devices here is one of: they fail together."""
    name: str = ""
    """As the user wrote it."""

    @property
    def num_devices(self) -> int:
        return self.devices_per_node * self.num_nodes

    def link(self, ranks: int, stride: int = 1) -> LinkSpec:
        """The slowest link among `ranks` ranks that are `stride` apart, beginning at a node's first device.

        Raises ValueError where they are on different nodes and nodes have no network.
        """
        if (ranks - 1) * stride < self.devices_per_node:
            return self.scale_up
        if self.network is None:
            raise ValueError(f"{ranks} ranks need more than a node's {self.devices_per_node} devices; add a network")
        return self.network

    def ranks_per_node(self, ranks: int, stride: int = 1) -> int:
        """How many ranks of such a group share a node."""
        return min(ranks, max(1, self.devices_per_node // stride))
