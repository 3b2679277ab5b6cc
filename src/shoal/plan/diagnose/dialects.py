"""Each engine's metric names by what they mean, and its flags by what they do: all that tells engines apart.

Sources: shoal's names are those of core/metrics.py; vLLM's of vllm/v1/metrics/loggers.py (0.32.0), with older ones
behind them; SGLang's of python/sglang/srt/observability/metrics_collector.py (016d860) and its page on production
metrics; DCGM's of dcgm-exporter's etc/default-counters.csv (4.6.0). SGLang's
flags are those of its pages on server arguments and on tuning.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal.core import metrics as defined
from shoal.core.metrics import Metric

Kind = Literal["gauge", "counter", "histogram"]
Fold = Literal["sum", "max", "mean"]


class Quantity(msgspec.Struct, frozen=True):
    """What a metric means, whatever it is called."""

    kind: Kind
    fold: Fold
    """How the series of an engine's replicas make one number."""
    meaning: str


QUANTITIES: dict[str, Quantity] = {
    "running": Quantity("gauge", "sum", "sequences in the batch"),
    "slots": Quantity("gauge", "sum", "sequences that the batches have room for"),
    "waiting": Quantity("gauge", "sum", "sequences that wait for a place in it"),
    "deferred": Quantity("gauge", "sum", "of those that wait, they who wait for an adapter or a KV transfer"),
    "queued_ahead": Quantity("gauge", "sum", "requests that a gateway holds back from the engines"),
    "kv_usage": Quantity("gauge", "max", "share of the KV cache in use, of the fullest replica"),
    "rank_imbalance": Quantity("gauge", "max", "rows of the busiest rank over the mean"),
    "sm_active": Quantity("gauge", "mean", "share of time in which the device's processors had work"),
    "device_busy": Quantity("gauge", "mean", "share of time in which any kernel ran"),
    "memory_active": Quantity("gauge", "mean", "share of time in which device memory moved data"),
    "preemptions": Quantity("counter", "sum", "sequences thrown out of the batch because KV ran out"),
    "finished": Quantity("counter", "sum", "sequences that ended"),
    "prompt_tokens": Quantity("counter", "sum", "prompt tokens"),
    "generated_tokens": Quantity("counter", "sum", "tokens generated"),
    "steps": Quantity("counter", "sum", "forward passes"),
    "ttft": Quantity("histogram", "sum", "time to first token"),
    "itl": Quantity("histogram", "sum", "time between tokens"),
    "queue_time": Quantity("histogram", "sum", "time before a request runs"),
    "prefill_time": Quantity("histogram", "sum", "time from there to its first token"),
}

Lever = Literal[
    "kv_memory",
    "kv_dtype",
    "max_len",
    "tensor_parallel",
    "replicas",
    "max_sequences",
    "batch_tokens",
    "admission",
    "front_end",
]


class Replicas(msgspec.Struct, frozen=True):
    """Where an exposition tells its replicas apart: the label, and the names of the gauges that have it."""

    label: str
    running: str
    waiting: str
    kv_usage: str


class Dialect(msgspec.Struct, frozen=True):
    name: str
    title: str
    names: dict[str, tuple[str, ...]]
    """By quantity; of several, the first that is there. Counters with their _total, histograms without a suffix."""
    only: dict[str, tuple[str, str]] = {}
    """By quantity: only series with this value of a label."""
    copies: tuple[str, ...] = ()
    """Labels of ranks that report the same thing each: of series that differ in nothing else, the largest counts."""
    parts: tuple[str, ...] = ()
    """Labels of series that are there beside their own sum: where they are not empty, the series does not count."""
    scale: dict[str, float] = {}
    """By name, where the unit is another than the quantity's."""
    replicas: Replicas | None = None
    flags: dict[Lever, str] = {}
    """How each lever is pulled; {value} is filled in, words in capitals are the user's to fill in."""


def _named(prefix: str, **names: str) -> dict[str, tuple[str, ...]]:
    """Names of `names` with a prefix; several are parted by a space."""
    return {quantity: tuple(f"{prefix}{name}" for name in text.split()) for quantity, text in names.items()}


def _defined(**metrics: tuple[Metric, ...]) -> dict[str, tuple[str, ...]]:
    """Names as they are written: of counters with what the exporter appends."""
    return {
        quantity: tuple(one.name + ("_total" if one.kind == "counter" else "") for one in those)
        for quantity, those in metrics.items()
    }


SHOAL = Dialect(
    name="shoal",
    title="shoal",
    # An engine's own; where a gateway has only servers of others behind it, what they tell it.
    names=_defined(
        running=(defined.RUNNING, defined.ENDPOINT_RUNNING, defined.FLEET_RUNNING),
        slots=(defined.SLOTS,),
        waiting=(defined.WAITING, defined.ENDPOINT_WAITING),
        queued_ahead=(defined.FLEET_WAITING,),
        kv_usage=(defined.KV_USAGE, defined.ENDPOINT_KV_USAGE),
        rank_imbalance=(defined.EXPERT_IMBALANCE,),
        preemptions=(defined.PREEMPTIONS,),
        finished=(defined.REQUESTS, defined.FLEET_REQUESTS),
        prompt_tokens=(defined.PROMPT_TOKENS, defined.FLEET_PROMPT_TOKENS),
        generated_tokens=(defined.GENERATED_TOKENS, defined.FLEET_GENERATED_TOKENS),
        steps=(defined.STEPS,),
        ttft=(defined.TTFT, defined.FLEET_TTFT),
        itl=(defined.ITL, defined.FLEET_ITL),
    ),
    only={"rank_imbalance": ("over", "ranks")},
    replicas=Replicas(
        "endpoint", defined.ENDPOINT_RUNNING.name, defined.ENDPOINT_WAITING.name, defined.ENDPOINT_KV_USAGE.name
    ),
    flags={
        "kv_memory": "--kv-cache-memory SIZE",
        "kv_dtype": "--kv-cache-dtype bfloat16",
        "max_len": "--max-model-len TOKENS",
        "tensor_parallel": "--tensor-parallel-size {value}",
        "replicas": "--data-parallel-size {value}",
        "max_sequences": "--max-num-seqs {value}",
        "batch_tokens": "--max-num-batched-tokens {value}",
        "front_end": "--deployment FILE --port PORT, as a second gateway",
    },
)
VLLM = Dialect(
    name="vllm",
    title="vLLM",
    names=_named(
        "vllm:",
        running="num_requests_running",
        waiting="num_requests_waiting",
        deferred="num_requests_waiting_by_reason",
        kv_usage="kv_cache_usage_perc gpu_cache_usage_perc",
        preemptions="num_preemptions_total",
        finished="request_success_total",
        prompt_tokens="prompt_tokens_total",
        generated_tokens="generation_tokens_total",
        steps="iteration_tokens_total_count",
        ttft="time_to_first_token_seconds",
        itl="inter_token_latency_seconds time_per_output_token_seconds request_time_per_output_token_seconds",
        queue_time="request_queue_time_seconds",
        prefill_time="request_prefill_time_seconds",
    ),
    only={"deferred": ("reason", "deferred")},
    replicas=Replicas("engine", "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    flags={
        "kv_memory": "--gpu-memory-utilization 0.95",
        "kv_dtype": "--kv-cache-dtype fp8",
        "max_len": "--max-model-len TOKENS",
        "tensor_parallel": "--tensor-parallel-size {value}",
        "replicas": "--data-parallel-size {value}",
        "max_sequences": "--max-num-seqs {value}",
        "batch_tokens": "--max-num-batched-tokens {value}",
        "front_end": "--api-server-count {value}",
    },
)
SGLANG = Dialect(
    name="sglang",
    title="SGLang",
    names=_named(
        "sglang:",
        running="num_running_reqs",
        waiting="num_queue_reqs",
        kv_usage="token_usage",
        preemptions="num_retracted_requests_total",
        finished="num_requests_total",
        prompt_tokens="prompt_tokens_total",
        generated_tokens="generation_tokens_total",
        ttft="time_to_first_token_seconds",
        itl="inter_token_latency_seconds time_per_output_token_seconds",
        queue_time="queue_time_seconds",
    ),
    copies=("tp_rank", "pp_rank", "moe_ep_rank"),
    parts=("priority",),
    replicas=Replicas("dp_rank", "sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:token_usage"),
    flags={
        "kv_memory": "--mem-fraction-static 0.9",
        "kv_dtype": "--kv-cache-dtype fp8_e5m2",
        "max_len": "--context-length TOKENS",
        "tensor_parallel": "--tp-size {value}",
        "replicas": "--dp-size {value}",
        "max_sequences": "--max-running-requests {value}",
        "batch_tokens": "--chunked-prefill-size {value}",
        "admission": "--schedule-conservativeness 0.3",
        "front_end": "--tokenizer-worker-num {value}",
    },
)
DEVICE = Dialect(
    name="device",
    title="GPU exporter",
    names=_named(
        "",
        sm_active="DCGM_FI_PROF_SM_ACTIVE",
        device_busy="DCGM_FI_PROF_GR_ENGINE_ACTIVE DCGM_FI_DEV_GPU_UTIL nvidia_smi_utilization_gpu_ratio",
        memory_active="DCGM_FI_PROF_DRAM_ACTIVE",
    ),
    scale={"DCGM_FI_DEV_GPU_UTIL": 0.01},
)
ENGINES = (SHOAL, VLLM, SGLANG)


def dialects_of(names: list[str]) -> tuple[Dialect | None, bool]:
    """The engine whose metrics these are, None if none's, and whether a device's are among them."""
    present = set(names)
    suffixes = ("", "_count")

    def known(dialect: Dialect) -> int:
        return sum(
            any(name + end in present for name in names_of for end in suffixes) for names_of in dialect.names.values()
        )

    best = max(ENGINES, key=known)
    return (best if known(best) else None), known(DEVICE) > 0
