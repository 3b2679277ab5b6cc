"""What `shoal simulate` prints: a table for people, a CSV line a request."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shoal.core.fleet_types import FleetEvent
from shoal.core.hardware import Provenance
from shoal.plan.units import show_duration
from shoal.sim.fleet_simulation import Sample
from shoal.sim.requests import Outcome
from shoal.sim.summary import Latency, Summary

_SHOWN_EVENTS = 20


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    cluster: str
    replicas: int
    spares: int
    layout: str
    weights: str
    cache: str
    profile: str
    policy: str
    kv_tokens: int
    """Of one replica."""
    max_sequences: int
    max_batch_tokens: int
    provenance: Provenance
    """Of the step times."""
    seed: int


class Result(msgspec.Struct, frozen=True, kw_only=True):
    setup: Setup
    summary: Summary
    samples: list[Sample]
    events: list[FleetEvent]


def write_requests(file: Path, outcomes: Iterable[Outcome]) -> None:
    """Seconds; empty for what never was."""
    names = (
        "id arrived prompt_tokens asked_tokens output_tokens cached_tokens endpoint ttft tpot e2e status moves retries "
        "reason"
    )
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(names.split())
        for o in outcomes:
            times = ["" if value is None else f"{value:.6f}" for value in (o.ttft, o.tpot, o.e2e)]
            row = [o.id, f"{o.arrived:.6f}", o.num_prompt, o.num_output, o.generated, o.num_cached, o.endpoint, *times]
            writer.writerow([*row, o.status, o.moves, o.retries, o.reason])


def print_result(result: Result, seconds: float, *, course: bool) -> None:
    console = Console(highlight=False)
    setup, summary = result.setup, result.summary
    spares = f" and {setup.spares} spare" if setup.spares else ""
    console.print(
        f"[bold]{escape(setup.model)}[/] {setup.weights}, {setup.replicas}{spares} x {setup.layout} on "
        f"{escape(setup.cluster)}, {setup.policy}; KV cache of {setup.kv_tokens:,} tokens each, {setup.cache}; "
        f"step times: {setup.provenance}",
        soft_wrap=True,
    )
    console.print(_latencies(summary))
    for label, text in _facts(summary):
        console.print(f"{label:<13}{text}", soft_wrap=True)
    for event in result.events[:_SHOWN_EVENTS]:
        text = f"{event.time:9.1f} s  {event.kind:<15} {event.endpoint}: {event.message}"
        console.print(text, style="dim", markup=False, soft_wrap=True)
    if len(result.events) > _SHOWN_EVENTS:
        console.print(f"            ... {len(result.events) - _SHOWN_EVENTS} more events (--json)", style="dim")
    if course:
        console.print(_course(result.samples))
    speed = summary.output_tokens / max(seconds, 1e-9)
    console.print(f"simulated in {seconds:.1f} s: {speed:,.0f} tokens a second", style="dim")


def _latencies(summary: Summary) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for name in ("mean", "p50", "p90", "p95", "p99", "greatest", "target"):
        table.add_column(name, justify="right")
    target = summary.target
    rows: tuple[tuple[str, Latency, float | None], ...] = (
        ("TTFT", summary.ttft, target.ttft),
        ("ITL", summary.itl, None),
        ("TPOT", summary.tpot, target.tpot),
        ("E2E", summary.e2e, target.e2e),
    )
    for name, latency, wanted in rows:
        values = (latency.mean, latency.p50, latency.p90, latency.p95, latency.p99, latency.greatest)
        cells = [_seconds(value, latency.count) for value in values]
        table.add_row(name, *cells, "" if wanted is None else show_duration(wanted))
    return table


def _seconds(value: float | None, count: int) -> str:
    if value is None:
        return "never" if count else "-"
    return show_duration(value)


def _facts(summary: Summary) -> list[tuple[str, str]]:
    ended = [
        f"{number:,} {what}"
        for number, what in (
            (summary.rejected, "refused"),
            (summary.failed, "failed"),
            (summary.unfinished, "unfinished"),
            (summary.shortened, "cut short at the longest sequence that fits"),
            (summary.moves, "moved"),
            (summary.retries, "sent anew"),
        )
        if number
    ]
    facts = [
        ("requests", ", ".join([f"{summary.completed:,} of {summary.requests:,} completed", *ended])),
        (
            "rates",
            f"{summary.requests_per_second:.2f} requests/s, {summary.output_tokens_per_second:,.0f} output tokens/s, "
            f"{summary.output_tokens_per_second_per_gpu:,.1f} a GPU, over {summary.seconds:,.1f} s",
        ),
    ]
    target = summary.target
    if any(value is not None for value in (target.ttft, target.tpot, target.e2e)):
        share = summary.good / max(summary.requests, 1)
        facts.append(("goodput", f"{summary.goodput:.2f} requests/s; {share:.1%} meet every target"))
    kv, busy = summary.kv_usage, summary.busy
    facts.append(
        (
            "KV cache",
            f"{kv.mean:.0%} used in the mean, {summary.kv_usage_peak:.0%} at most; "
            f"{summary.preemptions:,} preemptions; {summary.cache_hit_rate:.1%} of prompt tokens found",
        )
    )
    facts.append(
        (
            "busy",
            f"{busy.mean:.0%} of the time, {busy.least:.0%} to {busy.greatest:.0%} over replicas; "
            f"{summary.steps:,} steps",
        )
    )
    cost = f"{summary.gpus:,} GPUs, {summary.gpu_hours:,.2f} GPU-hours"
    if summary.dollars is not None:
        cost += f", ${summary.dollars:,.2f}"
        if summary.dollars_per_million_output_tokens is not None:
            cost += f", ${summary.dollars_per_million_output_tokens:,.2f} for a million output tokens"
    facts.append(("cost", cost))
    return facts


def _course(samples: list[Sample]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("until", "arrived", "ended", "tokens/s", "running", "waiting", "queued", "KV", "busy", "ready"):
        table.add_column(name, justify="right")
    for one in samples:
        table.add_row(
            f"{one.at:,.0f} s",
            f"{one.arrived:,}",
            f"{one.completed:,}",
            f"{one.output_tokens_per_second:,.0f}",
            f"{one.running:,}",
            f"{one.waiting:,}",
            f"{one.queued:,}",
            f"{one.kv_usage:.0%}",
            f"{one.busy:.0%}",
            f"{one.ready:,}",
        )
    return table
