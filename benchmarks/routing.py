"""Routing policies side by side, in virtual time: real engine cores, real router, step times by a law.

    python benchmarks/routing.py --traces FOLDER

FOLDER has the public traces under their usual names (Mooncake, Azure); a trace that is not there is left out. Prints a
Markdown table a trace: the median over the seeds, and the least and the greatest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import inf
from pathlib import Path

from routing_rivals import CacheAware, PowerOfTwo
from routing_traces import BLOCK_SIZE, TRACES, load
from shoal.core.config import SchedulerConfig
from shoal.core.router import Router, RoutingConfig
from shoal.sim.fleet_simulation import FleetSimulation
from shoal.sim.gateway import Chooser
from shoal.sim.law import StepTime
from shoal.sim.requests import Outcome

ENGINE = SchedulerConfig(
    num_blocks=4096,
    block_size=BLOCK_SIZE,
    max_len=262_144,
    vocab_size=1 << 30,
    max_sequences=64,
    max_batch_tokens=2048,
)
WARM_UP = 0.25
"""Share of the requests that are served first and not counted: caches are empty, and no speed is known."""
DEFAULT = "predicted_completion"
RIVALS = ("power of two (rival)", "cache aware (rival)")
POLICIES: dict[str, Callable[[int], Chooser]] = {
    "round_robin": lambda seed: Router(RoutingConfig(policy="round_robin", block_size=BLOCK_SIZE)),
    "least_tokens": lambda seed: Router(RoutingConfig(policy="least_tokens", block_size=BLOCK_SIZE)),
    "prefix_affinity": lambda seed: Router(RoutingConfig(policy="prefix_affinity", block_size=BLOCK_SIZE)),
    DEFAULT: lambda seed: Router(RoutingConfig(policy=DEFAULT, block_size=BLOCK_SIZE)),
    RIVALS[0]: PowerOfTwo,
    RIVALS[1]: CacheAware,
}


@dataclass(frozen=True)
class Run:
    trace: str
    policy: str
    seed: int
    folder: Path
    requests: int
    replicas: int
    load: float
    slow: int
    report_interval: float | None


@dataclass(frozen=True)
class Measured:
    ttft_p50: float
    ttft_p99: float
    e2e_p50: float
    e2e_p99: float
    imbalance: float
    """Busy seconds of the busiest replica over the mean."""
    cached: float
    """Share of prompt tokens found in a cache."""
    wall: float


def measure(run: Run) -> Measured:
    began = time.perf_counter()
    step = StepTime()
    arrivals = load(run.trace, run.folder, run.seed, run.requests, run.replicas, run.load, step)
    simulation = FleetSimulation(
        POLICIES[run.policy](run.seed), arrivals, run.replicas, ENGINE, step, report_interval=run.report_interval
    )
    for replica in list(simulation.replicas.values())[: run.slow]:
        replica.slowness = 4.0
    outcomes = simulation.run()
    outcomes = outcomes[round(len(outcomes) * WARM_UP) :]
    busy = [replica.busy_seconds for replica in simulation.replicas.values()]
    return Measured(
        *_percentiles(outcomes, lambda o: o.first_token),
        *_percentiles(outcomes, lambda o: o.end),
        imbalance=max(busy) / statistics.mean(busy),
        cached=sum(o.num_cached for o in outcomes) / sum(o.num_prompt for o in outcomes),
        wall=time.perf_counter() - began,
    )


def _percentiles(outcomes: list[Outcome], at: Callable[[Outcome], float | None]) -> tuple[float, float]:
    """p50 and p99 of the seconds since arrival, by nearest rank; what never came is infinite."""
    seconds = sorted(inf if (moment := at(o)) is None else moment - o.arrived for o in outcomes)
    return seconds[len(seconds) // 2], seconds[min(len(seconds) * 99 // 100, len(seconds) - 1)]


def _cell(values: list[float], form: str) -> str:
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} ({least:{form}}–{most:{form}})"


def report(trace: str, results: dict[str, list[Measured]]) -> None:
    print(f"\n### {trace}\n")
    print("| policy | TTFT p50, s | TTFT p99, s | E2E p50, s | E2E p99, s | busiest / mean | cached |")
    print("|---|---|---|---|---|---|---|")
    for policy, runs in results.items():
        cells = [
            _cell([r.ttft_p50 for r in runs], ".3f"),
            _cell([r.ttft_p99 for r in runs], ".2f"),
            _cell([r.e2e_p50 for r in runs], ".2f"),
            _cell([r.e2e_p99 for r in runs], ".1f"),
            _cell([r.imbalance for r in runs], ".2f"),
            _cell([r.cached for r in runs], ".1%"),
        ]
        print(f"| {policy} | {' | '.join(cells)} |")
    if DEFAULT not in results:
        return
    ours = [r.ttft_p99 for r in results[DEFAULT]]
    for other in ("round_robin", *RIVALS):
        if other in results:
            ratios = [mine / theirs.ttft_p99 for mine, theirs in zip(ours, results[other], strict=True)]
            print(f"\np99 TTFT of {DEFAULT} over that of {other}, seed by seed: {_cell(ratios, '.2f')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--traces", type=Path, required=True, help="folder with the public traces")
    parser.add_argument("--only", action="append", choices=list(TRACES), help="this trace; may be given again")
    parser.add_argument("--policies", action="append", choices=list(POLICIES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--load", type=float, default=0.6, help="share of what the fleet could do without any cache")
    parser.add_argument("--slow", type=int, default=0, help="replicas that take four times as long for every step")
    parser.add_argument("--report-interval", type=float, help="seconds between an engine's reports (none: no reports)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    traces = [name for name in options.only or TRACES if _is_there(name, options.traces)]
    runs = [
        Run(
            trace,
            policy,
            seed,
            options.traces,
            options.requests,
            options.replicas,
            options.load,
            options.slow,
            options.report_interval,
        )
        for trace in traces
        for policy in options.policies or POLICIES
        for seed in range(options.seeds)
    ]
    print(
        f"{options.replicas} replicas, {options.requests} requests a run, load {options.load}, {options.seeds} seeds, "
        f"{options.slow} slow replicas; median (least–greatest)."
    )
    with ProcessPoolExecutor(options.jobs) as pool:
        results: dict[str, dict[str, list[Measured]]] = {}
        for run, measured in zip(runs, pool.map(measure, runs), strict=True):
            results.setdefault(run.trace, {}).setdefault(run.policy, []).append(measured)
            print(f"{run.trace}, {run.policy}, seed {run.seed}: {measured.wall:.1f} s", file=sys.stderr)
            if sum(map(len, results[run.trace].values())) == len(runs) // len(traces):
                report(run.trace, results[run.trace])


def _is_there(trace: str, folder: Path) -> bool:
    files = {"Mooncake": "mooncake", "Azure": "AzureLLM"}
    prefix = files.get(trace.split()[0])
    return prefix is None or any(folder.glob(f"{prefix}*{trace.split()[1][:4]}*"))


if __name__ == "__main__":
    main()
