"""Where requests go: TTFT of shoal's policies beside those of the Rust routers, live over the same mock engines.

    python benchmarks/gateway.py routing --rounds 5

skewed          short prompts, and one of 200 of 32k tokens: whatever comes to an engine after it waits for seconds
system prompt   four in five prompts begin with the same 4,096 tokens; every engine has a prefix cache, empty at first

Rounds are interleaved: a trace is drawn for each, and every router meets it with every policy, after the mocks' prefix
caches were emptied. Prompts are text, the same for all, or with --prompt ids token ids, which sglang-router refuses.
The direct way, requests to the engines in turn without a router, is the first of a round, so that the mocks know the
tokens of every text when a router is measured. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gateway.arrivals import Arrival, to_trace
from gateway.compare import MOST_FOREIGN, Sample, say, table
from gateway.routers import IN_TURN, PROGRAM, Router, RouterFailed, choose_cores, find_routers, mock_engines, running
from machine import ForeignLoad, describe, tree_seconds, wait_until_quiet
from report import spread

LONG = 32_768
SHARED = 4096
GROUP = 200
"""Requests of the skewed trace of which one is long. Which one is drawn: at equal distances, routers that take eight
engines in turn would send all of them to the same one."""
CACHE_TOKENS = 131_072
"""Of a mock's prefix cache."""


def lognormal(draw: random.Random, mu: float, sigma: float, most: int) -> int:
    return min(max(round(draw.lognormvariate(mu, sigma)), 8), most)


def skewed(draw: random.Random, number: int, long: int) -> tuple[int, int]:
    """Tokens of the prompt, and how many of them all share."""
    return (LONG if number == long else lognormal(draw, 6, 0.8, 4096)), 0


def system_prompt(draw: random.Random, number: int, long: int) -> tuple[int, int]:
    own = lognormal(draw, 5.5, 0.8, 4096)
    return (own + SHARED, SHARED) if draw.random() < 0.8 else (own, 0)


TRACES: dict[str, Callable[[random.Random, int, int], tuple[int, int]]] = {
    "skewed": skewed,
    "system prompt": system_prompt,
}


def make_trace(name: str, seed: int, rate: float, seconds: float) -> list[Arrival]:
    draw = random.Random(f"{name} {seed}")
    arrivals: list[Arrival] = []
    at, long = 0.0, 0
    while (at := at + draw.expovariate(rate)) < seconds:
        number = len(arrivals)
        if number % GROUP == 0:
            long = number + draw.randrange(GROUP)
        prompt, shared = TRACES[name](draw, number, long)
        arrivals.append(Arrival(at, prompt, lognormal(draw, 4, 0.8, 512), shared))
    return arrivals


@dataclass
class Results:
    contestants: list[tuple[Router, str]]
    missing: dict[str, str]
    samples: dict[tuple[str, str, str], dict[int, Sample]] = field(default_factory=dict)
    """(Trace, router, policy) -> round -> sample."""
    loads: dict[str, list[float]] = field(default_factory=dict)

    def values(self, trace: str, router: str, policy: str, figure: str) -> dict[int, float]:
        """By round; those in which the generator was disturbed are left out."""
        samples = self.samples.get((trace, router, policy), {})
        return {number: sample.figures[figure] for number, sample in samples.items() if sample.figures["valid"]}

    def best(self, trace: str, router: str) -> str | None:
        """Its policy with the lowest p99 TTFT."""
        found = {policy: self.values(trace, router, policy, "ttft_p99") for who, policy in self._named(router)}
        medians = {policy: statistics.median(values.values()) for policy, values in found.items() if values}
        return min(medians, key=medians.__getitem__, default=None)

    def _named(self, router: str) -> list[tuple[Router, str]]:
        return [(who, policy) for who, policy in self.contestants if who.name == router]


class Benchmark:
    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments, self._folder = arguments, folder
        self.cores = choose_cores()

    def run(self, routers: list[Router], missing: dict[str, str]) -> Results:
        arguments = self._arguments
        contestants = [(router, policy) for router in routers for policy in router.policies]
        if arguments.policies:
            chosen = arguments.policies.split(",")
            contestants = [(router, policy) for router, policy in contestants if policy in chosen]
        results = Results(contestants, missing)
        options = ["--ttft-ms", str(arguments.ttft_ms), "--itl-ms", str(arguments.itl_ms), "--slots", "256"]
        options += ["--prefill-rate", str(arguments.prefill_rate), "--cache-tokens", str(CACHE_TOKENS)]
        with mock_engines(arguments.engines, options, self.cores.mocks, self._folder) as engines:
            for number in range(arguments.rounds):
                for trace in arguments.traces.split(","):
                    self._run_round(trace, number, routers[0], engines, results)
        return results

    def _run_round(self, trace: str, number: int, direct: Router, engines: list[str], results: Results) -> None:
        arguments = self._arguments
        arrivals = make_trace(trace, arguments.seed + number, arguments.rate, arguments.seconds)
        tokens = sum(arrival.num_prompt - arrival.num_shared for arrival in arrivals)
        capacity = arguments.seconds * arguments.prefill_rate * arguments.engines
        results.loads.setdefault(trace, []).append(tokens / capacity)
        file = self._folder / "trace.jsonl"
        to_trace(arrivals, file)
        turned = results.contestants if number % 2 == 0 else results.contestants[::-1]
        for router, policy in [(direct, IN_TURN), *turned]:
            if router.name in results.missing:
                continue
            for engine in engines:
                with urllib.request.urlopen(urllib.request.Request(f"{engine}/reset_prefix_cache", b"")):
                    pass
            try:
                with running(router, engines, self.cores.router, self._folder, policy) as (urls, pid):
                    sample = self._measure(f"{trace}, {router.name}, {policy}", urls, pid, file)
            except RouterFailed as error:
                results.missing[router.name] = str(error)
                say(str(error))
                continue
            results.samples.setdefault((trace, router.name, policy), {})[number] = sample

    def _measure(self, title: str, urls: list[str], pid: int | None, trace: Path) -> Sample:
        arguments = self._arguments
        command = ["taskset", "-c", str(self.cores.load), sys.executable, str(PROGRAM), "load", "--trace", str(trace)]
        for url in urls:
            command += ["--url", url]
        command += ["--prompt", arguments.prompt, "--warm", str(arguments.warm // len(urls)), "--patience", "60"]
        wait_until_quiet(MOST_FOREIGN, arguments.patience_quiet)
        foreign, before = ForeignLoad(os.getpid()), tree_seconds(pid)
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        figures, used = json.loads(done.stdout), tree_seconds(pid) - before
        sample = Sample(figures, used / figures["seconds"] if pid is not None else math.nan, foreign.cores())
        say(
            f"{title}: TTFT {figures['ttft_p50'] * 1e3:.0f} / {figures['ttft_p99'] * 1e3:.0f} ms, {sample.cores:.2f} "
            f"cores, foreign {sample.foreign:.2f} {figures['why_invalid']} {figures['first_error']}"
        )
        return sample


# --- the report -----------------------------------------------------------------------------------------------------


def render(results: Results, arguments: argparse.Namespace, pinning: str) -> str:
    machine = describe()
    routers = {router.name: router for router, _ in results.contestants}
    foreign = [sample.foreign for samples in results.samples.values() for sample in samples.values()]
    lines = [
        f"`{' '.join(['python', 'benchmarks/gateway.py', 'routing', *sys.argv[2:]])}`, {time.strftime('%Y-%m-%d')}",
        "",
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['system']}; "
        f"{'; '.join(router.version for router in routers.values())}",
        f"- {arguments.engines} mock engines, each: prompts one after another at {arguments.prefill_rate:,.0f} "
        f"tokens/s, first token {arguments.ttft_ms:g} ms later, then one every {arguments.itl_ms:g} ms; 256 slots; "
        f"a prefix cache of {CACHE_TOKENS:,} tokens, empty when a run begins",
        f"- Poisson arrivals, {arguments.rate:g} requests/s, {arguments.seconds:g} s a run; "
        f"prompts as {'text' if arguments.prompt == 'text' else 'token ids'}",
        f"- {pinning}",
        f"- cores busy with other processes during a run: {spread(foreign, 2)}",
        f"- rounds: {arguments.rounds}, each with a trace of its own; medians, with the range over rounds in brackets",
    ]
    for trace, loads in results.loads.items():
        share = "prompts" if trace == "skewed" else "what prompts do not share"
        title = f"### {trace.capitalize()}: {share} keep the engines {statistics.median(loads):.0%} busy"
        lines += ["", title, "", *render_trace(results, trace)]
    if results.missing:
        lines += ["", *(f"- {name} was not measured: {reason}" for name, reason in results.missing.items())]
    return "\n".join(lines).rstrip() + "\n"


def render_trace(results: Results, trace: str) -> list[str]:
    return [_trace_table(results, trace), "", *_ratios(results, trace)]


def _trace_table(results: Results, trace: str) -> str:
    rows = []
    for name, policy in [("direct", "in turn"), *((router.name, policy) for router, policy in results.contestants)]:
        key = (trace, name, policy if name != "direct" else IN_TURN)
        samples = [sample for sample in results.samples.get(key, {}).values() if sample.figures["valid"]]
        if not samples:
            continue
        figures = [sample.figures for sample in samples]
        cells = [spread((one[figure] for one in figures), 0, 1e3) for figure in ("ttft_p50", "ttft_p99", "e2e_p50")]
        cells.append("–" if name == "direct" else spread((sample.cores for sample in samples), 2))
        done, offered = (sum(one[figure] for one in figures) for figure in ("completed", "offered"))
        rows.append([name, policy, *cells, f"{done:,} of {offered:,}", str(len(samples))])
    return table(["router", "policy", "TTFT p50 ms", "TTFT p99 ms", "E2E p50 ms", "cores", "completed", "rounds"], rows)


def _ratios(results: Results, trace: str) -> list[str]:
    """p99 TTFT of shoal's default policy over others', round by round."""
    ours = results.values(trace, "shoal", "predicted_completion", "ttft_p99")
    others = [("shoal", IN_TURN)]
    others += [(name, best) for name in ("vllm-router", "sglang-router") if (best := results.best(trace, name))]
    lines = []
    for name, policy in others:
        theirs = results.values(trace, name, policy, "ttft_p99")
        ratios = [ours[number] / theirs[number] for number in ours if number in theirs]
        if ratios:
            which = f"{name} with {policy}" + ("" if name == "shoal" else ", its best")
            lines.append(f"- p99 TTFT of predicted_completion over that of {which}: {spread(ratios, 2)}")
    return lines


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="gateway.py routing", description="TTFT by routing policy.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--traces", default=",".join(TRACES), help="separated by commas")
    parser.add_argument("--rate", type=float, default=54.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each run")
    parser.add_argument("--prompt", choices=["text", "ids"], default="text")
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--ttft-ms", type=float, default=20.0)
    parser.add_argument("--itl-ms", type=float, default=20.0)
    parser.add_argument("--prefill-rate", type=float, default=8192.0, help="prompt tokens a second")
    parser.add_argument("--only", default="", help="routers, separated by commas; default: all")
    parser.add_argument("--policies", default="", help="of any router, separated by commas; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the first round's traces")
    parser.add_argument("--warm", type=int, default=256, help="connections that are open when a run begins")
    parser.add_argument("--patience-quiet", type=float, default=60.0, help="seconds to wait for other processes")
    parser.add_argument("--venvs", type=Path, default=Path.home() / ".cache" / "shoal" / "bench-venvs")
    parser.add_argument("--pip-option", action="append", default=[])
    arguments = parser.parse_args(argv)
    for trace in arguments.traces.split(","):
        if trace not in TRACES:
            parser.error(f"--traces: {trace!r} is unknown; there are {', '.join(TRACES)}")
    routers, missing = find_routers(arguments.venvs, arguments.pip_option, say)
    if arguments.prompt == "ids":
        missing["sglang-router"] = "it takes no token ids at /v1/completions"
        routers = [router for router in routers if router.name not in missing]
    if arguments.only:
        unknown = set(arguments.only.split(",")) - {router.name for router in routers} - set(missing)
        if unknown:
            parser.error(f"--only: {min(unknown)!r} is unknown; there are {', '.join(r.name for r in routers)}")
        routers = [router for router in routers if router.name == "direct" or router.name in arguments.only.split(",")]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    with tempfile.TemporaryDirectory(prefix="shoal-routing-") as folder:
        benchmark = Benchmark(arguments, Path(folder))
        results = benchmark.run(routers, missing)
    print(render(results, arguments, str(benchmark.cores)))


if __name__ == "__main__":
    main(sys.argv[1:])
