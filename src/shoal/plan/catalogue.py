"""Known devices, links and nodes by name: what ships with shoal, the user's own files, and files of one command."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from shoal.core.hardware import Cluster, DeviceSpec, LinkSpec, NodeSpec
from shoal.plan.hardware_file import CatalogueError, HardwareFile, nearest, read_hardware

__all__ = ["Catalogue", "CatalogueError", "cluster", "device", "load", "link", "node"]

BUILTIN = Path(__file__).parent / "hardware"
Named = TypeVar("Named", DeviceSpec, LinkSpec, NodeSpec)


class Catalogue:
    """What files hold, the later ones before the earlier: a user's H100 takes the place of ours."""

    def __init__(self, files: Sequence[HardwareFile]) -> None:
        self.devices = {name: spec for file in files for name, spec in file.devices.items()}
        self.links = {name: spec for file in files for name, spec in file.links.items()}
        self.nodes = {name: spec for file in files for name, spec in file.nodes.items()}
        self._device_names = _index(self.devices)
        self._link_names = _index(self.links)
        self._node_names = _index(self.nodes)
        for node in self.nodes.values():  # a name that leads nowhere is found when it is read, not when it is used
            self.device(node.device, f"node {node.name}: ")
            for link in filter(None, (node.scale_up, node.network)):
                self.link(link, f"node {node.name}: ")
        for device in self.devices.values():
            for link in filter(None, (device.scale_up, device.host_link)):
                self.link(link, f"device {device.name}: ")

    def device(self, name: str, where: str = "") -> DeviceSpec:
        """Raises CatalogueError, which names the nearest, as the two below do."""
        decorated = _undecorated(name, self.devices) if _key(name) not in self._device_names else None
        return _find(decorated or name, "device", self.devices, self._device_names, where)

    def link(self, name: str, where: str = "") -> LinkSpec:
        return _find(name, "link", self.links, self._link_names, where)

    def node(self, name: str, where: str = "") -> NodeSpec:
        return _find(name, "node", self.nodes, self._node_names, where)

    def has_device(self, name: str) -> bool:
        return _key(name) in self._device_names

    def has_link(self, name: str) -> bool:
        return _key(name) in self._link_names

    def has_node(self, name: str) -> bool:
        return _key(name) in self._node_names

    def nodes_of(self, device: DeviceSpec) -> list[NodeSpec]:
        return [node for node in self.nodes.values() if self.device(node.device).name == device.name]


def load(files: Sequence[Path] = ()) -> Catalogue:
    """What ships with shoal, the user's own, and `files`. Read once. Raises CatalogueError."""
    return _load((*sorted(BUILTIN.glob("*.yaml")), *sorted(user_directory().glob("*.yaml")), *files))


def user_directory() -> Path:
    """Where a user's own hardware is found without being named."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "shoal" / "hardware"


@functools.lru_cache(maxsize=8)
def _load(files: tuple[Path, ...]) -> Catalogue:
    return Catalogue([read_hardware(file) for file in files])


def device(name: str, files: Sequence[Path] = ()) -> DeviceSpec:
    """Raises CatalogueError."""
    return load(files).device(name)


def link(name: str, files: Sequence[Path] = ()) -> LinkSpec:
    """Raises CatalogueError."""
    return load(files).link(name)


def node(name: str, files: Sequence[Path] = ()) -> NodeSpec:
    """Raises CatalogueError."""
    return load(files).node(name)


def cluster(text: str, files: Sequence[Path] = ()) -> Cluster:
    """Of `8xH100`, `2x8xH100:ndr`, or a topology file. Raises CatalogueError. See topology.py."""
    from shoal.plan.topology import parse_cluster

    return parse_cluster(text, load(files))


def _key(name: str) -> str:
    """H100 SXM, h100-sxm and H100_SXM are one name."""
    return re.sub(r"[^a-z0-9.+]", "", name.lower())


_DECORATION = re.compile(
    r"nvidia|amd|instinct|tesla|geforce|gracehopper|superchip|gpu|sxm\d?|oam|aarch64|virtualized|hbm\d?e?|\d*gi?b?"
)
"""What tools and reports write around the name of a device."""
_MEMORY = re.compile(r"(?<![a-z0-9])(\d+) ?gi?b?(?![a-z])")


def _undecorated(name: str, devices: dict[str, DeviceSpec]) -> str | None:
    """The one device that "NVIDIA H100-NVL-94GB" means once vendor and memory are left out, if it has that memory."""
    wanted, memory = _bare(name), _MEMORY.search(name.lower())
    if memory is None:  # of several with that chip the one that its bare name stands for
        return next((d.name for d in devices.values() if wanted in map(_key, (d.name, *d.aliases))), None)
    found = [
        device.name
        for device in devices.values()
        if wanted in map(_bare, (device.name, *device.aliases))
        and abs(device.memory_bytes / 1e9 / int(memory[1]) - 1) < 0.12
    ]
    return found[0] if wanted and len(found) == 1 else None


def _bare(name: str) -> str:
    """Each word once, without decoration."""
    words = re.findall(r"[a-z0-9]+", _MEMORY.sub(" ", name.lower()))
    return "".join(dict.fromkeys(word for word in words if not _DECORATION.fullmatch(word)))


def _index(specs: dict[str, Named]) -> dict[str, str]:
    """Names by key. A name goes before an alias of another; an alias of two is refused."""
    index: dict[str, str] = {}
    for spec in specs.values():
        for alias in getattr(spec, "aliases", ()):
            owner = index.setdefault(_key(alias), spec.name)
            if owner != spec.name:
                raise CatalogueError(f"{alias} is an alias of {owner} and of {spec.name}")
    index.update({_key(name): name for name in specs})
    return index


def _find(name: str, kind: str, specs: dict[str, Named], index: dict[str, str], where: str) -> Named:
    found = index.get(_key(name))
    if found is None:
        options = [*specs, *(alias for spec in specs.values() for alias in getattr(spec, "aliases", ()))]
        raise CatalogueError(f"{where}unknown {kind} {name}; the nearest is {nearest(name, options)}")
    return specs[found]
