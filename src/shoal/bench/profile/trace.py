"""A trace of torch's profiler (Chrome's JSON), taken apart into what each part of a step took.

Steps and parts are ranges that the engine left in it (engine/profile_ranges.py). On a CPU a part is what its ranges
took. On a device it is what the kernels took that were launched within them: a launch and its kernel have the same
correlation number. Kernels of a graph are all of one launch; they, and those launched outside of any range, are told
apart by their names.
"""

from __future__ import annotations

import re
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

PREFIX = "shoal::"
STEP = PREFIX + "step"
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH = ("cuda_runtime", "cuda_driver")
_NAMES = (
    ("copies", r"memcpy|memset"),
    ("collectives", r"nccl|all_?reduce|all_?gather|reduce_?scatter|multimem|symm"),
    ("attention", r"attention|attn|flash|fmha|split_kv|paged|mla"),
    ("rope", r"rope|rotary"),
    ("cache", r"cache"),
    ("norms", r"norm"),
    ("experts", r"moe|expert|grouped|permut|rout"),
    ("sampling", r"argmax|top_?k|sampl|sort|draw"),
    ("linear", r"gemm|gemv|cutlass|cublas|nvjet|xmma|matmul|split_?k|quant|silu|gelu|gate"),
)
"""Of kernels that no range says the purpose of; the first that fits."""
OTHER = "other"
MOST_KERNELS = 5
"""That are named of a part."""


class TraceError(Exception):
    """The file holds no profile. The message says why."""


class KernelTime(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    seconds: float
    """A step."""
    calls: float
    """A step."""


class PartTime(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    seconds: float
    """A step."""
    calls: float
    """A step: kernels on a device, ranges on a CPU."""
    kernels: tuple[KernelTime, ...] = ()
    """Those that took longest."""


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    steps: int
    on_device: bool
    step_seconds: float
    """Median, from one step's beginning to the next one's."""
    low: float
    high: float
    parts: tuple[PartTime, ...]
    """Longest first. With the two gaps they make up a step, where nothing runs beside something else."""
    gap_within: float
    """Seconds a step in which nothing was computed between its first and its last kernel; on a CPU: outside of ranges
    and operations, in Python."""
    gap_between: float
    """From a step's end to the next one's beginning."""


class _Span(msgspec.Struct):
    """Microseconds."""

    name: str
    start: float
    end: float
    thread: Any = None
    correlation: Any = None


def read_profile(path: Path) -> Profile:
    """Raises TraceError, OSError."""
    try:
        events = msgspec.json.decode(path.read_bytes())["traceEvents"]
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise TraceError(f"{path} is no trace of a profiler: {error}") from None
    return profile_of(events)


def profile_of(events: Iterable[dict[str, Any]]) -> Profile:
    """Raises TraceError."""
    ranges: list[_Span] = []
    launches: dict[Any, _Span] = {}
    device: list[_Span] = []
    operations: list[_Span] = []
    for event in events:
        kind = event.get("cat")
        if event.get("ph") != "X":
            continue
        if kind == "user_annotation" and event["name"].startswith(PREFIX):
            ranges.append(_span(event))
        elif kind in _LAUNCH:
            launches[event["args"].get("correlation")] = _span(event)
        elif kind in _DEVICE:
            device.append(_span(event))
        elif kind == "cpu_op":
            operations.append(_span(event))
    ranges.sort(key=lambda span: span.start)
    steps = [span for span in ranges if span.name == STEP]
    if not steps:
        raise TraceError(f"the trace has no step: no range is called {STEP}")
    parts = [span for span in ranges if span.name != STEP]
    if device:
        return _of_device(steps, parts, launches, device)
    return _of_host(steps, parts, operations)


def _span(event: dict[str, Any]) -> _Span:
    start = float(event["ts"])
    correlation = event.get("args", {}).get("correlation")
    return _Span(event["name"], start, start + float(event.get("dur", 0.0)), event.get("tid"), correlation)


class _Within:
    """Which of several spans, that do not overlap, a moment lies in."""

    def __init__(self, spans: Sequence[_Span]) -> None:
        self._spans = sorted(spans, key=lambda span: span.start)
        self._starts = [span.start for span in self._spans]

    def find(self, moment: float) -> int | None:
        place = bisect_right(self._starts, moment) - 1
        return place if place >= 0 and moment <= self._spans[place].end else None


# --- on a CPU ---------------------------------------------------------------------------------------------------------


def _of_host(steps: list[_Span], parts: list[_Span], operations: list[_Span]) -> Profile:
    in_step = _Within(steps)
    known = _Within(parts)
    found: dict[str, dict[str, list[float]]] = {}
    covered = 0.0
    for part in parts:
        if in_step.find(part.start) is not None:
            covered += part.end - part.start
            found.setdefault(part.name.removeprefix(PREFIX), {}).setdefault("", []).append(part.end - part.start)
    until = float("-inf")
    for operation in sorted(operations, key=lambda span: (span.start, -span.end)):
        is_inner = operation.start < until
        until = max(until, operation.end)
        if is_inner or in_step.find(operation.start) is None or known.find(operation.start) is not None:
            continue
        covered += operation.end - operation.start
        found.setdefault(OTHER, {}).setdefault(operation.name, []).append(operation.end - operation.start)
    gaps = [max(0.0, after.start - before.end) for before, after in zip(steps, steps[1:], strict=False)]
    taken = [span.end - span.start for span in steps]
    return Profile(
        steps=len(steps),
        on_device=False,
        step_seconds=statistics.median(taken) / 1e6,
        low=min(taken) / 1e6,
        high=max(taken) / 1e6,
        parts=_part_times(found, len(steps)),
        gap_within=max(0.0, sum(taken) - covered) / len(steps) / 1e6,
        gap_between=statistics.median(gaps) / 1e6 if gaps else 0.0,
    )


# --- on a device ------------------------------------------------------------------------------------------------------


def _of_device(steps: list[_Span], parts: list[_Span], launches: dict[Any, _Span], device: list[_Span]) -> Profile:
    in_step, in_part = _Within(steps), _Within(parts)
    of_step: list[list[_Span]] = [[] for _ in steps]
    found: dict[str, dict[str, list[float]]] = {}
    for kernel in device:
        launch = launches.get(kernel.correlation)
        step = in_step.find(launch.start) if launch is not None else None
        if launch is None or step is None:
            continue
        of_step[step].append(kernel)
        place = None if "GraphLaunch" in launch.name else in_part.find(launch.start)
        part = part_of_name(kernel.name) if place is None else parts[place].name.removeprefix(PREFIX)
        found.setdefault(part, {}).setdefault(kernel.name, []).append(kernel.end - kernel.start)
    ran = [sorted(kernels, key=lambda span: span.start) for kernels in of_step if kernels]
    if not ran:
        raise TraceError("no kernel of the trace was launched by a step")
    ends = [max(span.end for span in kernels) for kernels in ran]
    lengths = [end - kernels[0].start for end, kernels in zip(ends, ran, strict=True)]
    idle = [length - _union(kernels) for length, kernels in zip(lengths, ran, strict=True)]
    gaps = [max(0.0, after[0].start - end) for end, after in zip(ends, ran[1:], strict=False)]
    periods = [after[0].start - before[0].start for before, after in zip(ran, ran[1:], strict=False)] or lengths
    return Profile(
        steps=len(ran),
        on_device=True,
        step_seconds=statistics.median(periods) / 1e6,
        low=min(periods) / 1e6,
        high=max(periods) / 1e6,
        parts=_part_times(found, len(ran)),
        gap_within=statistics.median(idle) / 1e6,
        gap_between=statistics.median(gaps) / 1e6 if gaps else 0.0,
    )


def part_of_name(kernel: str) -> str:
    """What a kernel that no range tells about is likely to be for."""
    name = kernel.lower()
    return next((part for part, pattern in _NAMES if re.search(pattern, name)), OTHER)


def _union(spans: list[_Span]) -> float:
    """Microseconds in which at least one of them ran. They are sorted by their start."""
    total, until = 0.0, float("-inf")
    for span in spans:
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total


def _part_times(found: dict[str, dict[str, list[float]]], steps: int) -> tuple[PartTime, ...]:
    """Of microseconds by part and kernel."""
    parts = []
    for name, kernels in found.items():
        times = [
            KernelTime(name=kernel, seconds=sum(each) / steps / 1e6, calls=len(each) / steps)
            for kernel, each in kernels.items()
        ]
        times.sort(key=lambda time: -time.seconds)
        parts.append(
            PartTime(
                name=name,
                seconds=sum(time.seconds for time in times),
                calls=sum(time.calls for time in times),
                kernels=tuple(time for time in times[:MOST_KERNELS] if time.name),
            )
        )
    return tuple(sorted(parts, key=lambda part: -part.seconds))
