"""The machine as the catalogue has it: devices, the link between its ranks, nodes; from figures that were measured.

On a CPU the ranks of an engine share one memory and its cores, so that a rank of two is a device of half the machine.
"""

from __future__ import annotations

import re
from typing import Protocol

import msgspec
import yaml

from shoal.core.hardware import Cluster, DeviceSpec, LinkSpec


class Figures(Protocol):
    """Of `shoal.engine.device_timing.DeviceFigures`, which says what each is."""

    @property
    def name(self) -> str: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def read_bandwidth(self) -> float: ...
    @property
    def copy_bandwidth(self) -> float: ...
    @property
    def rates(self) -> dict[str, float]: ...
    @property
    def kernel_seconds(self) -> float: ...
    @property
    def all_reduce(self) -> dict[int, tuple[tuple[int, float], ...]]: ...


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    device: DeviceSpec
    """All of it: what an engine of one rank has."""
    link: LinkSpec
    is_shared: bool
    """Ranks split the device among them, as on a CPU, instead of having one each."""
    description: str
    """CPU or GPU, cores, memory."""

    def device_of(self, ranks: int) -> DeviceSpec:
        """What one of so many ranks has."""
        if ranks == 1 or not self.is_shared:
            return self.device
        return msgspec.structs.replace(
            self.device,
            name=f"{self.device.name}-1of{ranks}",
            memory_bytes=self.device.memory_bytes // ranks,
            memory_bandwidth=self.device.memory_bandwidth / ranks,
            rates={dtype: rate / ranks for dtype, rate in self.device.rates.items()},
        )

    def cluster(self, ranks: int) -> Cluster:
        device = self.device_of(ranks)
        return Cluster(
            device=device,
            devices_per_node=ranks,
            num_nodes=1,
            scale_up=self.link,
            network=None,
            name=device.name if ranks == 1 else f"{ranks}x{device.name}",
        )


def machine_of(figures: Figures, cores: int, date: str, *, is_cpu: bool) -> Machine:
    """`cores` of the CPU that the engine may use; `date` goes into the sources."""
    name = slug(figures.name) + (f"-{cores}c" if is_cpu else "")
    source = f"measured: by shoal calibrate, {date}"
    all_reduce = figures.all_reduce
    points = all_reduce[min(all_reduce)] if all_reduce else ()
    # A rank reads the other's part and writes its own: what a large all-reduce reaches of one-shot's traffic.
    bandwidth = points[-1][0] / points[-1][1] if points else figures.copy_bandwidth / 2
    link = LinkSpec(
        name=f"{name}-link",
        kind="memory" if is_cpu else "scale-up",
        bandwidth=bandwidth,
        latency=points[0][1] if points else 5e-6,
        reached=1.0,
        all_reduce=all_reduce,
        provenance="measured" if points else "assumed",
        sources={"all_reduce": source, "bandwidth": source, "latency": source} if points else {},
    )
    most = max(figures.read_bandwidth, figures.copy_bandwidth)
    device = DeviceSpec(
        name=name,
        vendor="cpu" if is_cpu else "nvidia",
        memory_bytes=figures.memory_bytes,
        memory_bandwidth=most,
        rates=dict(figures.rates),
        fractions={"copy": figures.copy_bandwidth / most},
        kernel_seconds=figures.kernel_seconds,
        scale_up=link.name,
        provenance="measured",
        sources={
            field: source for field in ("memory_bytes", "memory_bandwidth", "rates", "fractions", "kernel_seconds")
        },
    )
    gib = figures.memory_bytes / 2**30
    described = f"{figures.name}, {f'{cores} cores, ' if is_cpu else ''}{gib:.1f} GiB"
    return Machine(device=device, link=link, is_shared=is_cpu, description=described)


def slug(name: str) -> str:
    """Intel(R) Xeon(R) Processor -> intel-xeon-processor."""
    plain = re.sub(r"\((r|tm|c)\)|@.*$", " ", name.lower())
    return "-".join(re.findall(r"[a-z0-9.]+", plain)) or "device"


def catalogue_yaml(machine: Machine, ranks: tuple[int, ...], fractions: dict[str, float] | None = None) -> str:
    """The machine in the form of `plan/hardware/*.yaml`, with a node for each number of ranks that was measured."""
    devices, nodes = {}, {}
    for count in sorted({1, *ranks}):
        device = machine.device_of(count)
        if fractions:
            shares = {name: min(1.0, share) for name, share in fractions.items()}
            device = msgspec.structs.replace(device, fractions={**device.fractions, **shares})
        devices[device.name] = _fields(device)
        nodes[machine.device.name if count == 1 else f"{machine.device.name}-x{count}"] = {
            "device": device.name,
            "count": count,
            "scale_up": machine.link.name,
            "host_memory_bytes": machine.device.memory_bytes,
        }
    tree = {"devices": devices, "links": {machine.link.name: _fields(machine.link)}, "nodes": nodes}
    head = f"# {machine.description}: made by `shoal calibrate`. Bytes, bytes/s, operations/s, seconds.\n"
    return head + yaml.safe_dump(tree, sort_keys=False, width=110)


def _fields(spec: DeviceSpec | LinkSpec) -> dict[str, object]:
    """Without the name, which is the key, and without what says nothing."""
    plain: dict[str, object] = msgspec.to_builtins(spec, builtin_types=())
    fields = {key: value for key, value in plain.items() if key != "name" and value not in ("", {}, [], (), None)}
    if isinstance(spec, LinkSpec) and spec.all_reduce:
        fields["all_reduce"] = {ranks: dict(points) for ranks, points in spec.all_reduce.items()}
    return fields
