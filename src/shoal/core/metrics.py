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
SLOTS = Metric("shoal:max_num_seqs", "gauge", "Slots of all engines: sequences that can run at once")
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

# --- a fleet, as its gateway sees it ----------------------------------------------------------------------------------
# Other names than an engine's, for both may be scraped: a sum over one name would count a request twice.

_WHOSE = ("model", "tenant")
_WHERE = ("model", "endpoint")

FLEET_TTFT = Metric(
    "shoal:fleet_time_to_first_token_seconds",
    "histogram",
    "From a request's arrival to its first token, one observation a sequence",
    _WHOSE,
    _LATENCY,
)
FLEET_ITL = Metric("shoal:fleet_inter_token_latency_seconds", "histogram", ITL.help, _WHOSE, _TOKEN_LATENCY)
FLEET_E2E = Metric("shoal:fleet_e2e_request_latency_seconds", "histogram", E2E.help, _WHOSE, _LATENCY)
FLEET_REQUESTS = Metric("shoal:fleet_requests", "counter", "Finished sequences by reason", (*_WHOSE, "finished_reason"))
FLEET_REFUSED = Metric(
    "shoal:fleet_requests_refused", "counter", "Requests not accepted, by reason", (*_WHOSE, "reason")
)
FLEET_PROMPT_TOKENS = Metric("shoal:fleet_prompt_tokens", "counter", "Prompt tokens of accepted requests", _WHOSE)
FLEET_GENERATED_TOKENS = Metric("shoal:fleet_generation_tokens", "counter", "Tokens of finished sequences", _WHOSE)

FLEET_RUNNING = Metric("shoal:fleet_requests_running", "gauge", "Requests under way at an endpoint", ("model",))
FLEET_WAITING = Metric("shoal:fleet_requests_waiting", "gauge", "Requests queued in the gateway", ("model",))
FLEET_WAITING_TOKENS = Metric("shoal:fleet_queue_tokens", "gauge", "Tokens queued in the gateway", ("model",))
FLEET_DEGRADED = Metric("shoal:fleet_degraded", "gauge", "1 while a fallback serves this model's requests", ("model",))
FLEET_N_PLUS_ONE = Metric(
    "shoal:fleet_n_plus_one",
    "gauge",
    "1 if the present load would survive the loss of the largest endpoint, 0 if not; absent until speeds are known",
    ("model",),
)
FLEET_SHORT_BY = Metric(
    "shoal:fleet_n_plus_one_short_by",
    "gauge",
    "Tokens a second that would be missing after the loss of the largest endpoint",
    ("model",),
)
FLEET_MIGRATIONS = Metric(
    "shoal:fleet_migrations", "counter", "Requests moved to another endpoint after their first token", ("model",)
)
FLEET_RETRIES = Metric("shoal:fleet_retries", "counter", "Requests sent anew before their first token", ("model",))
FLEET_HEDGES = Metric("shoal:fleet_hedges", "counter", "Requests sent to a second endpoint at once", ("model",))
FLEET_DEGRADATIONS = Metric("shoal:fleet_degradations", "counter", "Requests sent to the fallback model", ("model",))

ENDPOINT_STATE = Metric(
    "shoal:fleet_endpoint_state",
    "gauge",
    "1 for the state that the endpoint is in, 0 for the others",
    (*_WHERE, "state"),
)
ENDPOINT_REQUESTS = Metric("shoal:fleet_endpoint_requests", "gauge", "Requests of this gateway under way there", _WHERE)
ENDPOINT_TOKENS = Metric(
    "shoal:fleet_endpoint_outstanding_tokens", "gauge", "Tokens still to be prefilled or generated there", _WHERE
)
ENDPOINT_RUNNING = Metric("shoal:fleet_endpoint_sequences_running", "gauge", "As the endpoint says", _WHERE)
ENDPOINT_WAITING = Metric("shoal:fleet_endpoint_sequences_waiting", "gauge", "As the endpoint says", _WHERE)
ENDPOINT_KV_USAGE = Metric("shoal:fleet_endpoint_kv_usage", "gauge", "Share of KV blocks in use, 0 to 1", _WHERE)
ENDPOINT_STEP_AGE = Metric("shoal:fleet_endpoint_step_age_seconds", "gauge", "Since the last sign of progress", _WHERE)
ENDPOINT_STEP = Metric("shoal:fleet_endpoint_step_seconds", "gauge", "Median of a step", _WHERE)
ENDPOINT_PREFILL_SPEED = Metric(
    "shoal:fleet_endpoint_prefill_tokens_per_second", "gauge", "Speed of prefill, as learned", _WHERE
)
ENDPOINT_DECODE = Metric(
    "shoal:fleet_endpoint_decode_seconds", "gauge", "Between two tokens of a sequence, as learned", _WHERE
)
ENDPOINT_BREAKER = Metric("shoal:fleet_endpoint_breaker_open", "gauge", "1 open, 0.5 half open, 0 closed", _WHERE)
ENDPOINT_RESTARTS = Metric(
    "shoal:fleet_endpoint_restarts", "counter", "Times that the endpoint was started anew", _WHERE
)
ENDPOINT_COMPLETED = Metric("shoal:fleet_endpoint_completed", "counter", "Requests that ended there", _WHERE)
ENDPOINT_FAILURES = Metric("shoal:fleet_endpoint_failures", "counter", "Attempts that failed by the endpoint", _WHERE)
