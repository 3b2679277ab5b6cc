"""Expositions as engines write them, from the few numbers that a test is about."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from shoal.plan.diagnose.prometheus_text import parse
from shoal.plan.diagnose.reading import Snapshot

RECORDED = Path(__file__).parent / "recorded"
"""Of vLLM 0.32.0 on a CPU: a random model of two layers, 40 KV blocks of 32 tokens, 8 places in the batch. light: one
request after another; batch: 120 short requests at a time; memory: 16 of 416 tokens. The families that nothing here
reads are left out. before and after are 8.03 s apart (batch) and 12.06 s (memory)."""
SECONDS = {"batch": 8.03, "memory": 12.06}


def recorded(name: str, at: float | None = None) -> Snapshot:
    return Snapshot(parse((RECORDED / f"vllm-0.32.0-{name}.prom").read_text(encoding="utf-8")), at)


def histogram(name: str, observed: Mapping[float, int], total: float, labels: str = "") -> str:
    """`observed`: how many in the bucket that ends there."""
    lines, cumulative = [f"# TYPE {name} histogram"], 0
    for bound, count in sorted((observed | {math.inf: 0} if math.inf not in observed else observed).items()):
        cumulative += count
        le = "+Inf" if math.isinf(bound) else f"{bound}"
        lines.append(f'{name}_bucket{{{labels}{"," if labels else ""}le="{le}"}} {cumulative}')
    lines += [f"{name}_count{{{labels}}} {cumulative}", f"{name}_sum{{{labels}}} {total}"]
    return "\n".join(lines) + "\n"


def vllm(
    *,
    running: float = 4,
    waiting: float = 0,
    kv: float = 0.2,
    preemptions: float = 0,
    finished: float = 1000,
    tokens: float = 100_000,
    ttft: Mapping[float, int] | None = None,
    itl: Mapping[float, int] | None = None,
    queue_seconds: float = 1.0,
    prefill_seconds: float = 80.0,
    ttft_seconds: float = 100.0,
    device: Mapping[str, float] | None = None,
    engine: str = "0",
) -> str:
    """A lifetime of 1,000 requests that were answered well, but for what is given."""
    of = f'engine="{engine}",model_name="m"'
    lines = [
        f"vllm:num_requests_running{{{of}}} {running}",
        f"vllm:num_requests_waiting{{{of}}} {waiting}",
        f"vllm:kv_cache_usage_perc{{{of}}} {kv}",
        f"vllm:num_preemptions_total{{{of}}} {preemptions}",
        f'vllm:request_success_total{{{of},finished_reason="length"}} {finished}',
        f"vllm:generation_tokens_total{{{of}}} {tokens}",
    ]
    lines += [f"{name} {value}" for name, value in (device or {}).items()]
    text = "\n".join(lines) + "\n"
    text += histogram("vllm:time_to_first_token_seconds", ttft or {0.1: 600, 0.2: 400}, ttft_seconds, of)
    text += histogram("vllm:inter_token_latency_seconds", itl or {0.02: 60_000, 0.04: 40_000}, 2000.0, of)
    text += histogram("vllm:request_queue_time_seconds", {0.1: 1000}, queue_seconds, of)
    return text + histogram("vllm:request_prefill_time_seconds", {0.1: 1000}, prefill_seconds, of)


def snapshot(text: str, at: float | None = None) -> Snapshot:
    return Snapshot(parse(text), at)
