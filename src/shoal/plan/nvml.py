"""NVIDIA devices of this host through NVML: what they are, and what is between each two of them.

`nvml` is the module pynvml, or in tests an object with its functions; it is loaded when it is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import combinations
from typing import Any

import msgspec

INSTALL = "pip install 'shoal[nvml]'"
_ANCESTORS = {0: "INT", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
"""NVML_TOPOLOGY_*: what the path between two devices crosses, as nvidia-smi abbreviates it."""
_P2P_READ, _P2P_OK = 0, 0
_REMOTE_SWITCH = 2
_MAX_LINKS = 36
_NVLINK = {6: 1, 7: 2, 8: 3, 9: 4, 10: 5}
"""Version of NVLink by the compute capability's first number. NVML's own NvLinkVersion counts half versions too (6 is
4.0), and drivers have said 7 (5.0) of an H100."""
_LINK_BANDWIDTH = {1: 20e9, 2: 25e9, 3: 25e9, 4: 25e9, 5: 50e9}
"""Bytes/s of one NVLink in one direction, by its version."""


class NoNvml(Exception):
    """Why there are no NVIDIA devices to be seen, in one line for the user."""


class Slice(msgspec.Struct, frozen=True):
    """A MIG device."""

    profile: str
    uuid: str
    memory_bytes: int


class Gpu(msgspec.Struct, frozen=True):
    index: int
    name: str
    uuid: str
    bus: str
    memory_bytes: int
    pcie_generation: int
    pcie_lanes: int
    nvlinks: int = 0
    """That are up."""
    nvlink_version: int = 0
    slices: tuple[Slice, ...] = ()
    mig: bool = False

    @property
    def nvlink_bandwidth(self) -> float:
        """Bytes/s in one direction over all of its links."""
        return self.nvlinks * _LINK_BANDWIDTH.get(self.nvlink_version, 25e9)


class Pair(msgspec.Struct, frozen=True):
    """Between two GPUs."""

    a: int
    b: int
    path: str
    """NV18: as many NVLinks; else what PCIe crosses: PIX, PXB, PHB, NODE, SYS."""
    peer: bool
    """Each can read the other's memory."""
    bandwidth: float = 0.0
    """Bytes/s in one direction over NVLink; 0 without."""


class Gpus(msgspec.Struct, frozen=True):
    driver: str
    gpus: tuple[Gpu, ...]
    pairs: tuple[Pair, ...]


def load_nvml() -> Any:
    """The module pynvml. Raises NoNvml."""
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        raise NoNvml(
            f"NVIDIA devices are not looked for: the package nvidia-ml-py is not installed ({INSTALL})"
        ) from None


def read_gpus(nvml: Any) -> Gpus:
    """Raises NoNvml."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise NoNvml(f"no NVIDIA devices: NVML says: {_text(error)}") from None
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(at) for at in range(nvml.nvmlDeviceGetCount())]
        ask = _asker(nvml)
        gpus = tuple(_gpu(nvml, ask, at, handle) for at, handle in enumerate(handles))
        direct = _direct_links(nvml, ask, handles, gpus)
        switched = [_is_switched(nvml, ask, handle) for handle in handles]
        pairs = []
        for a, b in combinations(range(len(gpus)), 2):
            links = direct.get((a, b), 0)
            if switched[a] and switched[b]:
                links = min(gpus[a].nvlinks, gpus[b].nvlinks)
            level = ask(None, nvml.nvmlDeviceGetTopologyCommonAncestor, handles[a], handles[b])
            status = ask(None, nvml.nvmlDeviceGetP2PStatus, handles[a], handles[b], _P2P_READ)
            each = _LINK_BANDWIDTH.get(gpus[a].nvlink_version, 25e9)
            path = f"NV{links}" if links else _ANCESTORS.get(level, "SYS")
            pairs.append(Pair(a, b, path, bool(links) or status == _P2P_OK, links * each))
        return Gpus(_text(ask("", nvml.nvmlSystemGetDriverVersion)), gpus, tuple(pairs))
    except nvml.NVMLError as error:
        raise NoNvml(f"NVIDIA devices could not be read: NVML says: {_text(error)}") from None
    finally:
        nvml.nvmlShutdown()


Ask = Callable[..., Any]


def _asker(nvml: Any) -> Ask:
    """Calls a function of NVML; what a device or a driver does not support has a default."""

    def ask(default: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except nvml.NVMLError:
            return default

    return ask


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _bus(value: object) -> str:
    """0000:18:00.0: NVML writes the domain with eight digits, the kernel with four."""
    domain, _, rest = _text(value).lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def _gpu(nvml: Any, ask: Ask, index: int, handle: Any) -> Gpu:
    up = [link for link in range(_MAX_LINKS) if ask(0, nvml.nvmlDeviceGetNvLinkState, handle, link) == 1]
    mig = ask((0, 0), nvml.nvmlDeviceGetMigMode, handle)[0] == 1
    return Gpu(
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        uuid=_text(ask("", nvml.nvmlDeviceGetUUID, handle)),
        bus=_bus(nvml.nvmlDeviceGetPciInfo(handle).busId),
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        pcie_generation=ask(0, nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        pcie_lanes=ask(0, nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        nvlinks=len(up),
        nvlink_version=_NVLINK.get(ask((0, 0), nvml.nvmlDeviceGetCudaComputeCapability, handle)[0], 0) if up else 0,
        slices=tuple(_slices(nvml, ask, handle)) if mig else (),
        mig=mig,
    )


def _slices(nvml: Any, ask: Ask, handle: Any) -> list[Slice]:
    found = []
    for at in range(ask(0, nvml.nvmlDeviceGetMaxMigDeviceCount, handle)):
        slice_handle = ask(None, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, at)
        if slice_handle is None:
            continue  # numbers without a slice
        name = _text(ask("", nvml.nvmlDeviceGetName, slice_handle))  # "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
        memory = ask(None, nvml.nvmlDeviceGetMemoryInfo, slice_handle)
        uuid = _text(ask("", nvml.nvmlDeviceGetUUID, slice_handle))
        found.append(Slice(name.rpartition("MIG ")[2], uuid, int(memory.total) if memory else 0))
    return found


def _is_switched(nvml: Any, ask: Ask, handle: Any) -> bool:
    kinds = [ask(None, nvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link) for link in range(_MAX_LINKS)]
    return _REMOTE_SWITCH in kinds


def _direct_links(nvml: Any, ask: Ask, handles: list[Any], gpus: tuple[Gpu, ...]) -> dict[tuple[int, int], int]:
    """How many NVLinks lead from one GPU straight to another."""
    numbers = {gpu.bus: gpu.index for gpu in gpus}
    found: dict[tuple[int, int], int] = {}
    for gpu in gpus:
        for link in range(_MAX_LINKS):
            if ask(0, nvml.nvmlDeviceGetNvLinkState, handles[gpu.index], link) != 1:
                continue
            remote = ask(None, nvml.nvmlDeviceGetNvLinkRemotePciInfo, handles[gpu.index], link)
            other = None if remote is None else numbers.get(_bus(remote.busId))
            if other is not None and gpu.index < other:
                found[gpu.index, other] = found.get((gpu.index, other), 0) + 1
    return found
