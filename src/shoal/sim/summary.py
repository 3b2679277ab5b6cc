"""What a simulation says of a deployment, by the definitions that live metrics have (`core/metrics.py`).

TTFT    from a request's arrival to its first token
ITL     between two tokens of a sequence, every gap one observation
TPOT    (last token - first token) / (tokens - 1), one observation a sequence: what live metrics call
        inter_token_latency_seconds
E2E     from a request's arrival to its last token

Percentiles are by nearest rank. Requests that were refused, or failed, or had not ended, count as infinitely long.
"""

from __future__ import annotations

from math import inf

import msgspec

from shoal.sim.fleet_simulation import FleetSimulation
from shoal.sim.histogram import Histogram, mean, percentile
from shoal.sim.requests import Outcome


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. None: of nothing, or infinite, for so many requests failed."""

    mean: float | None
    """Of those that did not fail."""
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    greatest: float | None
    count: int


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that a request must not exceed to count as good; None: no matter."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def met_by(self, outcome: Outcome) -> bool:
        if outcome.status != "done":
            return False
        pairs = ((outcome.ttft, self.ttft), (outcome.tpot, self.tpot), (outcome.e2e, self.e2e))
        return all(value is None or most is None or value <= most for value, most in pairs)


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Over replicas."""

    least: float
    mean: float
    greatest: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    requests: int
    completed: int
    rejected: int
    failed: int
    unfinished: int
    """When the simulation was ended."""
    shortened: int
    """Completed with fewer tokens than asked for, at the longest sequence that fits."""
    moves: int
    """Times that a request went on elsewhere after it had begun."""
    retries: int
    seconds: float
    """From the first arrival to the last end, of whatever kind, or to where the simulation was cut: the window of all
    rates."""
    prompt_tokens: int
    """Of completed requests."""
    output_tokens: int
    """Delivered."""
    cached_tokens: int
    """Prompt tokens found in a cache, also where a request went on after a move or a preemption."""
    cache_hit_rate: float
    """Prompt tokens found in a cache over those looked up."""
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    """Prompts and outputs of completed requests."""
    gpus: int
    """At most, at one time."""
    gpu_hours: float
    output_tokens_per_second_per_gpu: float
    """Over all GPUs of the deployment, spares and starting ones too."""
    dollars: float | None
    dollars_per_million_output_tokens: float | None
    ttft: Latency
    itl: Latency
    tpot: Latency
    e2e: Latency
    target: Target
    good: int
    """Requests that meet every target."""
    goodput: float
    """Of these, a second."""
    steps: int
    preemptions: int
    kv_usage: Spread
    """Share of blocks held while steps were computed, in the mean."""
    kv_usage_peak: float
    busy: Spread
    """Share of the time that a replica was up in which it computed a step."""


def summarise(
    simulation: FleetSimulation, target: Target, gpus_per_replica: int, dollars_per_gpu_hour: float | None
) -> Summary:
    outcomes = list(simulation.outcomes.values())
    done = [outcome for outcome in outcomes if outcome.status == "done"]
    begin = min((outcome.arrived for outcome in outcomes), default=0.0)
    cut = any(outcome.status == "waiting" for outcome in outcomes)
    end = max(begin, simulation.now if cut else simulation.gateway.last_end)
    seconds = max(end - begin, 1e-9)
    tokens, good = simulation.gateway.generated_tokens, sum(map(target.met_by, outcomes))
    prompts = sum(outcome.num_prompt for outcome in done)
    members = list(simulation.members.values())
    totals = [member.replica.totals() for member in members]
    steps, preemptions, computed, cached = (sum(column) for column in zip(*totals, strict=True))
    replica_seconds = sum(simulation.allocated_seconds(name, end) for name in simulation.members)
    gpu_seconds = gpus_per_replica * replica_seconds
    dollars = None if dollars_per_gpu_hour is None else gpu_seconds / 3600 * dollars_per_gpu_hour
    up = [(member.replica, member.up_seconds(simulation.now)) for member in members]
    blocks = simulation.config.num_blocks
    return Summary(
        requests=len(outcomes),
        completed=len(done),
        rejected=sum(outcome.status == "rejected" for outcome in outcomes),
        failed=sum(outcome.status == "failed" for outcome in outcomes),
        unfinished=sum(outcome.status == "waiting" for outcome in outcomes),
        shortened=sum(outcome.generated < outcome.num_output for outcome in done),
        moves=sum(outcome.moves for outcome in outcomes),
        retries=sum(outcome.retries for outcome in outcomes),
        seconds=seconds,
        prompt_tokens=prompts,
        output_tokens=tokens,
        cached_tokens=cached,
        cache_hit_rate=cached / max(cached + computed, 1),
        requests_per_second=len(done) / seconds,
        output_tokens_per_second=tokens / seconds,
        total_tokens_per_second=(prompts + sum(outcome.generated for outcome in done)) / seconds,
        gpus=gpus_per_replica * simulation.most_replicas,
        gpu_hours=gpu_seconds / 3600,
        output_tokens_per_second_per_gpu=tokens / max(gpu_seconds, 1e-9),
        dollars=dollars,
        dollars_per_million_output_tokens=None if dollars is None or not tokens else dollars / tokens * 1e6,
        ttft=_latency([inf if o.ttft is None or o.status != "done" else o.ttft for o in outcomes]),
        itl=_gaps(simulation.gaps),
        tpot=_latency([o.tpot for o in done if o.tpot is not None] + [inf] * (len(outcomes) - len(done))),
        e2e=_latency([inf if o.e2e is None else o.e2e for o in outcomes]),
        target=target,
        good=good,
        goodput=good / seconds,
        steps=steps,
        preemptions=preemptions,
        kv_usage=_spread([r.block_seconds / r.busy_seconds / blocks for r, _ in up if r.busy_seconds > 0]),
        kv_usage_peak=max((replica.most_blocks for replica, _ in up), default=0) / blocks,
        busy=_spread([min(r.busy_until(simulation.now) / t, 1.0) for r, t in up if t > 0]),
    )


def _latency(values: list[float]) -> Latency:
    ascending = sorted(values)
    return Latency(
        mean=mean(ascending),
        p50=_finite(percentile(ascending, 0.5)),
        p90=_finite(percentile(ascending, 0.9)),
        p95=_finite(percentile(ascending, 0.95)),
        p99=_finite(percentile(ascending, 0.99)),
        greatest=_finite(percentile(ascending, 1.0)),
        count=len(values),
    )


def _gaps(gaps: Histogram) -> Latency:
    return Latency(
        mean=gaps.sum / gaps.count if gaps.count else None,
        p50=gaps.percentile(0.5),
        p90=gaps.percentile(0.9),
        p95=gaps.percentile(0.95),
        p99=gaps.percentile(0.99),
        greatest=gaps.greatest if gaps.count else None,
        count=gaps.count,
    )


def _finite(value: float | None) -> float | None:
    return None if value is None or value == inf else value


def _spread(values: list[float]) -> Spread:
    if not values:
        return Spread(least=0.0, mean=0.0, greatest=0.0)
    return Spread(least=min(values), mean=sum(values) / len(values), greatest=max(values))
