"""Traces taken apart: made-up ones, whose answer is known, in the form in which torch writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.bench.profile.trace import STEP, Profile, TraceError, part_of_name, profile_of, read_profile

US = 1e-6


def range_(name: str, ts: float, dur: float) -> dict[str, Any]:
    return {"ph": "X", "cat": "user_annotation", "name": name, "ts": ts, "dur": dur, "tid": 1, "args": {}}


def operation(name: str, ts: float, dur: float) -> dict[str, Any]:
    return {"ph": "X", "cat": "cpu_op", "name": name, "ts": ts, "dur": dur, "tid": 1, "args": {}}


def kernel(name: str, ts: float, dur: float, launched: float, number: int, by: str = "cudaLaunchKernel") -> list[Any]:
    arguments = {"correlation": number}
    driver = "cuda_driver" if by.startswith("cu") and not by.startswith("cuda") else "cuda_runtime"
    return [
        {"ph": "X", "cat": driver, "name": by, "ts": launched, "dur": 1, "tid": 1, "args": arguments},
        {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur, "tid": 7, "args": arguments},
    ]


def seconds(profile: Profile) -> dict[str, float]:
    return {part.name: pytest.approx(part.seconds) for part in profile.parts}


def test_a_cpu_trace() -> None:
    """Two steps of 100 µs, 20 apart: 40 in linear, 30 in attention, 10 in operations of no range, 20 in Python."""
    events: list[Any] = [{"ph": "M", "name": "process_name"}]
    for start in (0, 120):
        events += [
            range_(STEP, start, 100),
            range_("shoal::linear", start + 10, 25),
            range_("shoal::linear", start + 40, 15),
        ]
        events += [range_("shoal::attention", start + 60, 30), operation("aten::mm", start + 12, 20)]
        events += [operation("aten::index", start + 1, 6), operation("aten::select", start + 2, 3)]
        events += [operation("aten::cat", start + 92, 4)]
    found = profile_of(events)
    assert not found.on_device and found.steps == 2
    assert found.step_seconds == pytest.approx(100 * US)
    assert seconds(found) == {"linear": 40 * US, "attention": 30 * US, "other": 10 * US}
    assert found.gap_within == pytest.approx(20 * US) and found.gap_between == pytest.approx(20 * US)
    assert {part.name: part.calls for part in found.parts} == {"linear": 2, "attention": 1, "other": 2}
    assert [each.name for each in found.parts[2].kernels] == ["aten::index", "aten::cat"]


def test_a_device_trace() -> None:
    """Kernels run after the launches that a range holds, when the host is elsewhere; what nobody claims has a name."""
    events: list[Any] = []
    for number, start in enumerate((0, 1000, 2000)):
        at = start + 100
        events += [
            range_(STEP, start, 60),
            range_("shoal::linear", start + 5, 10),
            range_("shoal::attention", start + 20, 10),
        ]
        events += kernel("nvjet_tst_128x64", at, 50, start + 6, 10 * number)
        events += kernel("elementwise_kernel", at + 50, 10, start + 8, 10 * number + 1)
        events += kernel("unified_kernel", at + 70, 30, start + 22, 10 * number + 2, "cuLaunchKernelEx")
        events += kernel("ncclDevKernel_AllReduce_Sum", at + 100, 5, start + 40, 10 * number + 3)
        events += kernel("Memcpy DtoH (Device -> Pinned)", at + 105, 5, start + 45, 10 * number + 4, "cudaMemcpyAsync")
    events += kernel("of_nobody", 5000, 40, 4990, 99)
    found = profile_of(events)
    assert found.on_device and found.steps == 3
    assert found.step_seconds == pytest.approx(1000 * US)
    assert seconds(found) == {"linear": 60 * US, "attention": 30 * US, "collectives": 5 * US, "copies": 5 * US}
    assert found.gap_within == pytest.approx(10 * US) and found.gap_between == pytest.approx(890 * US)
    linear = found.parts[0]
    assert [(each.name, each.calls) for each in linear.kernels] == [("nvjet_tst_128x64", 1), ("elementwise_kernel", 1)]


def test_kernels_of_a_graph_are_told_by_their_names() -> None:
    """The launch of a graph may lie in a range, which says nothing of its kernels."""
    events = [range_(STEP, 0, 60), range_("shoal::linear", 5, 20)]
    for place, name in enumerate(("sm90_xmma_gemm_bf16", "_rms_norm_kernel", "_paged_decode_kernel")):
        events += kernel(name, 100 + 10 * place, 10, 6, 1, "cudaGraphLaunch")
    found = profile_of(events)
    assert seconds(found) == {"linear": 10 * US, "norms": 10 * US, "attention": 10 * US}
    assert found.gap_within == 0 and found.gap_between == 0 and found.step_seconds == pytest.approx(30 * US)


def test_kernels_side_by_side_leave_no_gap() -> None:
    events = [range_(STEP, 0, 60), range_("shoal::linear", 5, 20)]
    events += kernel("gemm", 100, 50, 6, 1) + kernel("gemm", 120, 60, 7, 2) + kernel("gemm", 190, 10, 8, 3)
    assert profile_of(events).gap_within == pytest.approx(10 * US)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("void cublasLt::splitKreduce_kernel<32, 16>", "linear"),
        ("_fused_moe_kernel", "experts"),
        ("_rope_and_cache_write", "rope"),
        ("flash_fwd_splitkv_combine_kernel", "attention"),
        ("_add_rms_norm", "norms"),
        ("at::native::reduce_kernel<ArgMaxOps>", "sampling"),
        ("Memset (Device)", "copies"),
        ("at::native::vectorized_elementwise_kernel", "other"),
    ],
)
def test_names(name: str, part: str) -> None:
    assert part_of_name(name) == part


def test_what_is_no_profile_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    for text, message in (("{}", "is no trace"), ("not json", "is no trace"), ('{"traceEvents": []}', "has no step")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(TraceError, match=message):
            read_profile(file)
    file.write_text(json.dumps({"traceEvents": [range_(STEP, 0, 1), *kernel("k", 5, 1, 99, 1)]}), encoding="utf-8")
    with pytest.raises(TraceError, match="launched by a step"):
        read_profile(file)
