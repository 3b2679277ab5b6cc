"""The metrics of an engine and its front: names, kinds and meanings. Exporters are elsewhere.

Names are the field's (those that dashboards for vLLM chart), with shoal's prefix. Times are seconds.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Metric(msgspec.Struct, frozen=True):
    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_LATENCY = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_LENGTHS = (1.0, 8.0, 32.0, 128.0, 512.0, 2048.0, 8192.0, 32768.0, 131072.0)

RUNNING = Metric("shoal:num_requests_running", "gauge", "Sequences that hold a slot")
WAITING = Metric("shoal:num_requests_waiting", "gauge", "Sequences that wait for a slot or for KV blocks")
KV_USAGE = Metric("shoal:kv_cache_usage_perc", "gauge", "Share of KV blocks held by running sequences, 0 to 1")
KV_FILL = Metric("shoal:kv_cache_fill_ratio", "gauge", "Share of held KV entries that hold a live token, 0 to 1")
PROGRESS_AGE = Metric(
    "shoal:engine_progress_age_seconds", "gauge", "Time since the engine last made a step or was idle"
)
WARM_SPARES = Metric("shoal:warm_spares", "gauge", "Sets of ranks that are loaded and wait for one to fail")
PROMPT_TOKENS = Metric("shoal:prompt_tokens", "counter", "Prompt tokens computed, without those found in the cache")
CACHE_QUERIES = Metric("shoal:prefix_cache_queries", "counter", "Prompt tokens looked up in the prefix cache")
CACHE_HITS = Metric("shoal:prefix_cache_hits", "counter", "Prompt tokens found in the prefix cache")
GENERATED_TOKENS = Metric("shoal:generation_tokens", "counter", "Tokens generated")
PREEMPTIONS = Metric("shoal:num_preemptions", "counter", "Sequences preempted because KV blocks ran out")
STEPS = Metric("shoal:engine_steps", "counter", "Forward passes")
FAILURES = Metric("shoal:engine_failures", "counter", "Steps lost to a worker failure")
EXPERT_IMBALANCE = Metric(
    "shoal:expert_imbalance",
    "gauge",
    "Rows of the busiest over the mean since the start, over experts and over ranks that hold them; 1 is even",
    ("engine", "over"),
)
REQUESTS = Metric("shoal:request_success", "counter", "Finished sequences by reason", ("finished_reason",))
REJECTED = Metric("shoal:request_rejected", "counter", "Requests refused, by HTTP status", ("status",))
TTFT = Metric(
    "shoal:time_to_first_token_seconds", "histogram", "From a request's arrival to its first token", (), _LATENCY
)
ITL = Metric(
    "shoal:inter_token_latency_seconds",
    "histogram",
    "(last token - first token) / (tokens - tokens in the first chunk), one observation a sequence",
    (),
    _TOKEN_LATENCY,
)
E2E = Metric(
    "shoal:e2e_request_latency_seconds", "histogram", "From a request's arrival to its last token", (), _LATENCY
)
PROMPT_LENGTH = Metric("shoal:request_prompt_tokens", "histogram", "Prompt tokens of a request", (), _LENGTHS)
OUTPUT_LENGTH = Metric("shoal:request_generation_tokens", "histogram", "Generated tokens of a sequence", (), _LENGTHS)
