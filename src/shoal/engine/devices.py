"""Devices by name: which is a rank's, what it is called, and how much of its memory is in use.

A MIG slice is a device like any other: what CUDA says of its memory and its processors is of the slice alone, which is
why nothing here asks the driver's library (NVML) for the card that it is on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Protocol

import torch


class DeviceMemory(Protocol):
    """Of an accelerator, in bytes."""

    name: str
    """For people."""
    total: int

    def free(self) -> int:
        """That nobody uses, this process's allocator among them."""

    def allocated(self) -> int:
        """By tensors of this process."""

    def reset_peak(self) -> None: ...

    def peak(self) -> int:
        """The most that tensors of this process had at once since `reset_peak`, those from before included."""

    def trim(self) -> None:
        """The allocator gives back what no tensor uses."""


class CudaMemory:
    """Not yet run on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        properties = torch.cuda.get_device_properties(device)
        self.name: str = properties.name
        """Of a MIG slice it ends with the slice's profile: NVIDIA H100 80GB HBM3 MIG 1g.10gb."""
        self.total = int(properties.total_memory)

    def free(self) -> int:
        # A driver that told of the whole card would be believed for the slice's share at the most.
        return min(int(torch.cuda.mem_get_info(self._device)[0]), self.total)

    def allocated(self) -> int:
        return int(torch.cuda.memory_allocated(self._device))

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return int(torch.cuda.max_memory_allocated(self._device))

    def trim(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


def device_memory(device: torch.device) -> DeviceMemory | None:
    """None for a CPU: what it has is the host's and every control group's to say (`memory.py`)."""
    return CudaMemory(device) if device.type == "cuda" else None


def device_of_rank(name: str, local_rank: int) -> torch.device:
    """`name` is auto, cpu, cuda or cuda:N; of several ranks on a host each has a device of its own, from N on.

    Raises ValueError.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown: use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        device = torch.device("cuda", (device.index or 0) + local_rank)
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(
                f"device '{device}' is not there: torch sees {count} CUDA devices{slices_hint(os.environ)}"
            )
    return device


def slices_hint(environment: Mapping[str, str]) -> str:
    """What is to be known where MIG slices were named, of which CUDA shows a process only the first."""
    slices = [
        name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip().startswith("MIG-")
    ]
    if not slices:
        return ""
    return (
        f". CUDA_VISIBLE_DEVICES names {len(slices)} MIG slices, and CUDA shows a process one at a time: start an "
        "engine of one rank for each of them, or take the whole card"
    )


def make_current(device: torch.device) -> None:
    """For this thread, steps may run in another than the one that loads: Triton launches on the current device."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def can_reach(one: int, other: int) -> bool:
    """Whether CUDA device `one` can read the memory of `other`."""
    return bool(torch.cuda.can_device_access_peer(one, other))
