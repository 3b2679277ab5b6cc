"""What the card itself does: bandwidth of copying and reading its memory, rates of large matrix products. Measured.

Every figure of the engine is put beside these, which come from the same run, and not beside a data sheet.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

REPEATS = 9


@dataclass
class Timing:
    """Seconds of one call: the median, the fastest and the slowest of several, each alone."""

    median: float
    low: float
    high: float


@dataclass
class Ceilings:
    """Medians; the spread beside them by the same names."""

    copy_bandwidth: float
    """Bytes/s, read and written together."""
    read_bandwidth: float
    rates: dict[str, float]
    """Operations/s by dtype of the operands."""
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """What could not be measured, and why."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def timed(operation: Callable[[], Any], device: torch.device, repeats: int = REPEATS, warm_up: int = 10) -> Timing:
    """By the device's own events where it has them. Inputs are the caller's: several caches long, and no zeros."""
    for _ in range(warm_up):
        operation()
    seconds = []
    if device.type == "cpu":
        for _ in range(repeats):
            began = time.perf_counter()
            operation()
            seconds.append(time.perf_counter() - began)
    else:
        module = torch.get_device_module(device)
        pairs = [[module.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        module.synchronize(device)
        for began, ended in pairs:
            began.record()
            operation()
            ended.record()
        module.synchronize(device)
        seconds = [began.elapsed_time(ended) / 1e3 for began, ended in pairs]
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


def measure(device: torch.device, *, tiny: bool = False) -> Ceilings:
    """About five seconds on a card, and 9 GB of its memory."""
    num_bytes = (8 << 20) if tiny else (4 << 30)
    size = 256 if tiny else 8192
    spread: dict[str, tuple[float, float]] = {}

    def rate(name: str, amount: float, timing: Timing) -> float:
        spread[name] = (amount / timing.high, amount / timing.low)
        return amount / timing.median

    copied, read_once = _memory(device, num_bytes)
    copy, read = rate("copy", 2 * num_bytes, copied), rate("read", num_bytes, read_once)
    rates: dict[str, float] = {}
    missing: dict[str, str] = {}
    for dtype, product in (("bfloat16", _bfloat16), ("float8", _float8)):
        try:
            rates[dtype] = rate(dtype, 2.0 * size**3, timed(product(size, device), device))
        except Exception as error:  # a device, or this build of torch, has no such product
            missing[dtype] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return Ceilings(copy, read, rates, spread, missing)


def _memory(device: torch.device, num_bytes: int) -> tuple[Timing, Timing]:
    """Of a copy and of a read. What they take up is free again behind it."""
    values = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(values)
    copied = timed(lambda: target.copy_(values), device)
    # No single reduction is known to be bound by memory on every device: the fastest of several is nearest to it.
    reads = [timed(reduction, device) for reduction in (values.sum, values.amax)]
    return copied, min(reads, key=lambda timing: timing.median)


def _bfloat16(size: int, device: torch.device) -> Callable[[], Any]:
    a_MK, b_NK = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out_MN = torch.empty(size, size, device=device, dtype=torch.bfloat16)
    return lambda: torch.mm(a_MK, b_NK.t(), out=out_MN)


def _float8(size: int, device: torch.device) -> Callable[[], Any]:
    """e4m3 by e4m3 into bfloat16, one scale each, sums kept short: the fastest that there is."""
    a_MK, b_NK = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(
        a_MK, b_NK.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
