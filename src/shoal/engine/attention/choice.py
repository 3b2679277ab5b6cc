"""Which attention backend serves a model on a device: one table of what each can do, and the choice from it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.engine.attention.base import AttentionBackend, HeadSharing
from shoal.engine.attention.native import NativeAttention
from shoal.engine.attention.portable import PortableAttention
from shoal.engine.native_ops import NativeOps

_WIDE = (torch.float32, torch.bfloat16)
_QUANTISED = (torch.float8_e4m3fn, torch.int8)
_FLOAT8_CAPABILITY = (8, 9)
"""Of the first CUDA devices that convert it."""


@dataclass(frozen=True)
class Sizes:
    """Which sizes of something a backend takes: between two, multiples of a third, powers of two perhaps."""

    least: int = 1
    most: int | None = None
    multiple: int = 1
    power_of_two: bool = False

    def has(self, size: int) -> bool:
        fits = size >= self.least and (self.most is None or size <= self.most) and size % self.multiple == 0
        return fits and not (self.power_of_two and size & (size - 1))

    def __str__(self) -> str:
        words = ["a power of two"] if self.power_of_two else []
        if self.multiple > 1:
            words.append("even" if self.multiple == 2 else f"a multiple of {self.multiple}")
        words.append(f"at least {self.least}" if self.most is None else f"{self.least} to {self.most}")
        return ", ".join(words)


@dataclass(frozen=True)
class Need:
    """What a model asks of attention on a device. Sizes are tokens of a block and features of a head."""

    device: torch.device
    kv_dtype: torch.dtype
    block_size: int
    head_dim: int
    """Of latent attention that of the cached rows."""
    window: bool = False
    soft_cap: bool = False
    latents: bool = False
    """Multi-head latent attention."""
    shared_context: bool = False
    """Ranks keep parts of the same sequences."""
    cut_groups: bool = False
    """This rank has some but not all of the query heads that share a key/value head."""


@dataclass(frozen=True)
class Capability:
    devices: tuple[str, ...] | None
    """None is any."""
    dtypes: tuple[torch.dtype, ...]
    """Of the KV cache."""
    block_sizes: Sizes
    head_dims: Sizes
    latent_dtypes: tuple[torch.dtype, ...] = ()
    """Of a cache of latents; none where it does not serve them."""
    window: bool = True
    soft_cap: bool = True
    shared_context: bool = True
    cut_groups: bool = True


CAPABILITIES: dict[str, Capability] = {
    "native": Capability(("cpu",), _WIDE, Sizes(16, multiple=16), Sizes(2, 256, multiple=2)),
    "triton": Capability(
        ("cuda",),
        (*_WIDE, torch.float16, *_QUANTISED),
        Sizes(16, 256, power_of_two=True),
        Sizes(16, 256, multiple=8),
        latent_dtypes=(*_WIDE, torch.float16, *_QUANTISED),
    ),
    "varlen": Capability(
        ("cuda",),
        (torch.bfloat16, torch.float16),
        Sizes(256, multiple=256),
        Sizes(8, 256, multiple=8),
        soft_cap=False,
        shared_context=False,
        cut_groups=False,
    ),
    "flashinfer": Capability(
        ("cuda",),
        (torch.bfloat16, torch.float16),
        Sizes(16, 32, multiple=16),
        Sizes(64, 256, power_of_two=True),
        shared_context=False,
        cut_groups=False,
    ),
    "portable": Capability(
        None, (*_WIDE, torch.float16), Sizes(), Sizes(), latent_dtypes=(*_WIDE, torch.float16, *_QUANTISED)
    ),
}
"""The best first: what is chosen unasked is the first that serves, except those which have to be asked for."""
_ONLY_BY_NAME = frozenset({"varlen", "flashinfer"})


def unserved_reason(name: str, need: Need) -> str | None:
    """Why a backend cannot serve it; None if it can."""
    can = CAPABILITIES[name]
    devices = can.devices
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        devices = None  # on a CPU its interpreter runs them, to test them
    if devices is not None and need.device.type not in devices:
        return f"it is for {', '.join(devices)}, and the device is {need.device}"
    checks: Sequence[tuple[bool, str]] = [
        (need.latents and not can.latent_dtypes, "it has no kernel for latents"),
        (
            not need.latents and not can.head_dims.has(need.head_dim),
            f"head size {need.head_dim} is not {can.head_dims}",
        ),
        (not can.block_sizes.has(need.block_size), f"block size {need.block_size} is not {can.block_sizes}"),
        (need.window and not can.window, "it has no sliding window"),
        (need.soft_cap and not can.soft_cap, "it has no soft cap"),
        (need.shared_context and not can.shared_context, "ranks share a context"),
        (need.cut_groups and not can.cut_groups, "a rank has some of the heads of a group only"),
    ]
    reason = next((why for fails, why in checks if fails), None)
    dtypes = can.latent_dtypes if need.latents else can.dtypes
    if reason is None and need.kv_dtype not in dtypes:
        reason = f"it keeps KV as {', '.join(map(_short, dtypes))}, not {_short(need.kv_dtype)}"
    return reason or _missing_reason(name, need)


def _missing_reason(name: str, need: Need) -> str | None:
    """What it needs and is not there."""
    if name == "varlen":
        from shoal.engine.attention.varlen import missing_reason

        return missing_reason()
    if name == "flashinfer":
        from shoal.engine.attention import flashinfer_backend

        return flashinfer_backend.missing_reason()
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed (it comes with torch for CUDA)"
        if need.kv_dtype == torch.float8_e4m3fn and need.device.type == "cuda":
            found = torch.get_device_module(need.device).get_device_capability(need.device)
            if found < _FLOAT8_CAPABILITY:
                return f"float8_e4m3fn takes compute capability 8.9, and {need.device} has {found[0]}.{found[1]}"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose(name: str, need: Need, ops: NativeOps | None) -> str:
    """The backend of that name, or the best for "auto". Raises ValueError that says why not, and which would do.

    `ops` None: there are no native kernels, for whatever reason.
    """
    if name != "auto" and name not in CAPABILITIES:
        raise ValueError(f"attention is {name!r}: use auto, {', '.join(CAPABILITIES)}")
    reasons = {
        candidate: "the native kernels are not in use"
        if candidate == "native" and ops is None
        else unserved_reason(candidate, need)
        for candidate in CAPABILITIES
    }
    serving = [candidate for candidate, reason in reasons.items() if reason is None]
    if name in serving:
        return name
    unasked = [candidate for candidate in serving if candidate not in _ONLY_BY_NAME]
    if name == "auto" and unasked:
        return unasked[0]
    others = f"{', '.join(serving)} can" if serving else "none can"
    if name == "auto":
        each = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items() if reason is not None)
        raise ValueError(f"attention: no backend serves this model here ({each})")
    raise ValueError(f"attention: {name} cannot serve this model here: {reasons[name]}; {others}")


def make(
    name: str, device: torch.device, ops: NativeOps | None, sharing: HeadSharing | None, latent_dim: int | None
) -> AttentionBackend:
    """The backend that `choose` named. `latent_dim` is that of the latents where attention is to them."""
    made: object
    if name == "native" and ops is not None:
        made = NativeAttention(ops, sharing)
    elif name == "triton" and latent_dim is not None:
        from shoal.engine.attention.triton_latent import TritonLatentAttention

        made = TritonLatentAttention(latent_dim, _processors(device))
    elif name == "triton":
        from shoal.engine.attention.triton_backend import TritonAttention

        made = TritonAttention(_processors(device), sharing)
    elif name == "varlen":
        from shoal.engine.attention.varlen import VarlenAttention

        made = VarlenAttention(sharing)
    elif name == "flashinfer":
        from shoal.engine.attention.flashinfer_backend import FlashInferAttention

        made = FlashInferAttention(sharing)
    else:
        made = PortableAttention(sharing if latent_dim is None else None)
    # A backend takes only the caches that it made itself, which a protocol cannot say.
    return made  # type: ignore[return-value]


def _processors(device: torch.device) -> int:
    """Streaming multiprocessors."""
    if device.type == "cpu":
        return 1
    return int(torch.get_device_module(device).get_device_properties(device).multi_processor_count)
