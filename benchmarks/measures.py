"""From when each token came to the figures of the report, the same way for every engine.

All requests of a workload arrive at once, so TTFT holds the time in the queue.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from shoal.core.model_spec import ModelSpec
from workloads import Workload


def measure(workload: Workload, raw: dict[str, Any]) -> dict[str, float]:
    """Figures of one run: tokens a second, and latencies in seconds.

    `output_rate` output tokens / time from submission to the last token; `ttft_p50`, `ttft_p99`; `tpot_p50` the median
    over requests of (last - first) / (tokens - 1). For a workload of one request also `decode_rate`, the inverse of its
    TPOT, and `prefill_rate`, prompt tokens / TTFT.
    """
    times = raw["token_times"]
    ttfts = [request[0] for request in times]
    tpots = [(request[-1] - request[0]) / (len(request) - 1) for request in times]
    figures = {
        "seconds": raw["seconds"],
        "output_rate": workload.num_output_tokens / raw["seconds"],
        "ttft_p50": statistics.median(ttfts),
        "ttft_p99": percentile(ttfts, 0.99),
        "tpot_p50": statistics.median(tpots),
    }
    if len(times) == 1:
        figures |= {"decode_rate": 1 / tpots[0], "prefill_rate": len(workload.items[0].prompt) / ttfts[0]}
    return figures


def percentile(values: Sequence[float], fraction: float) -> float:
    """Nearest rank: the smallest value that at least `fraction` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-fraction * len(ordered) // 1) - 1)]


def workload_flops(workload: Workload, spec: ModelSpec) -> int:
    """Operations that a workload needs: every token but the last drawn goes through the layers once, the head is
    applied only where a token is drawn. Attention is counted over the positions that are really seen."""
    total = 0
    for item in workload.items:
        num_prompt, num_computed = len(item.prompt), len(item.prompt) + item.max_tokens - 1
        total += sum(
            spec.flops_per_token(position + 1, with_head=position + 1 >= num_prompt) for position in range(num_computed)
        )
    return total


def decode_bytes_per_token(workload: Workload, spec: ModelSpec, weight_bytes: int, kv_element_bytes: int = 4) -> float:
    """Bytes that decoding a token of a single sequence must read: all weights (the tied embedding is the head) and the
    KV of the context, on average over the output."""
    item = workload.items[0]
    mean_context = len(item.prompt) + item.max_tokens / 2
    return weight_bytes + mean_context * spec.kv_bytes_per_token(kv_element_bytes)
