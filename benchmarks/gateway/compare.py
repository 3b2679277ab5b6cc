"""The cost of a gateway: the same load on the same mocks without a router, through the Rust routers, through shoal.

    python benchmarks/gateway.py compare --rates 50,100,200,400,600,800 --rounds 5

Rounds are interleaved: each runs every router at every rate; what a router adds is taken within a round, against the
direct way at the same rate. With two cores the mocks and the load generator share one, the router has the other alone.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.load import add_shape_options
from gateway.routers import PROGRAM, Router, RouterFailed, choose_cores, find_routers, mock_engines, running
from machine import ForeignLoad, describe, tree_seconds, wait_until_quiet
from report import spread

MOST_ADDED_P99 = 0.010
"""Seconds that a router may add at p99 where it is asked how much it carries."""
RESOLUTION = 0.0005
"""Seconds: two runs of the direct way differ by as much."""
MOST_FOREIGN = 0.1
"""Cores that others may keep busy during a run that counts."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Sample:
    """One run of one router at one rate."""

    figures: dict[str, Any]
    """gateway.load.Figures."""
    cores: float
    """That the router kept busy on average; NaN of the direct way."""
    foreign: float


@dataclass
class Results:
    routers: list[Router]
    missing: dict[str, str]
    rates: list[float]
    samples: dict[tuple[str, float], dict[int, Sample]] = field(default_factory=dict)
    """(Router, rate) -> round -> sample."""
    idle: dict[str, list[float]] = field(default_factory=dict)
    """Cores that a router keeps busy with nothing to do, by round."""

    def added(self, name: str, rate: float, figure: str) -> dict[int, float]:
        """By round, seconds more than the direct way; infinite where more failed than the percentile allows."""
        direct = self.samples.get(("direct", rate), {})
        return {
            number: sample.figures[figure] - direct[number].figures[figure]
            for number, sample in self.samples.get((name, rate), {}).items()
            if number in direct and sample.figures["valid"] and direct[number].figures["valid"]
        }

    def carries(self, name: str, figures: Sequence[str]) -> list[float]:
        """By round, the highest rate up to which all of these were added at less than MOST_ADDED_P99, none failed.

        Rounds in which the generator was disturbed while it asked this router are left out: they say nothing of it.
        """
        rounds = sorted({number for samples in self.samples.values() for number in samples})
        return [most for number in rounds if (most := self._carries(name, figures, number)) is not None]

    def _carries(self, name: str, figures: Sequence[str], number: int) -> float | None:
        reached = 0.0
        for rate in self.rates:
            sample, direct = (self.samples.get((who, rate), {}).get(number) for who in (name, "direct"))
            if direct is None or not direct.figures["valid"]:
                break  # more than mocks and generator carry
            if sample is None or not sample.figures["valid"]:
                return None
            added = [sample.figures[figure] - direct.figures[figure] for figure in figures]
            if sample.figures["completed"] < sample.figures["offered"] or max(added, default=0.0) > MOST_ADDED_P99:
                return reached
            reached = rate
        return reached or None


class Benchmark:
    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments, self._folder = arguments, folder
        self.cores = choose_cores()

    def run(self, routers: list[Router], missing: dict[str, str]) -> Results:
        arguments = self._arguments
        results = Results(routers, missing, [float(rate) for rate in arguments.rates.split(",")])
        options = ["--ttft-ms", str(arguments.ttft_ms), "--itl-ms", str(arguments.itl_ms)]
        with mock_engines(arguments.engines, options, self.cores.mocks, self._folder) as engines:
            for number in range(arguments.rounds):
                # The direct way first: a rate that the mocks do not carry is not put to a router.
                turned = routers[1:] if number % 2 == 0 else routers[:0:-1]
                for router in [routers[0], *turned]:
                    if router.name not in missing:
                        self._run_router(router, engines, number, results)
        return results

    def _run_router(self, router: Router, engines: list[str], number: int, results: Results) -> None:
        try:
            with running(router, engines, self.cores.router, self._folder) as (urls, pid):
                if pid is not None:
                    results.idle.setdefault(router.name, []).append(self._idle(pid))
                for rate in results.rates:
                    direct = results.samples.get(("direct", rate), {}).get(number)
                    if router.name != "direct" and (direct is None or not direct.figures["valid"]):
                        break
                    sample = self._measure(router.name, urls, pid, rate)
                    results.samples.setdefault((router.name, rate), {})[number] = sample
                    if not sample.figures["valid"] or sample.figures["completed"] < 0.9 * sample.figures["offered"]:
                        break  # higher rates would only be worse
        except RouterFailed as error:
            results.missing[router.name] = str(error)
            say(str(error))

    def _idle(self, pid: int) -> float:
        time.sleep(2.0)  # what it does once after its start is not what it does all the time
        began, before = time.monotonic(), tree_seconds(pid)
        time.sleep(self._arguments.idle_seconds)
        return (tree_seconds(pid) - before) / (time.monotonic() - began)

    def _measure(self, name: str, urls: list[str], pid: int | None, rate: float) -> Sample:
        """The least disturbed of some attempts: what is compared then is the load of others, never the result."""
        best: Sample | None = None
        for _ in range(self._arguments.attempts):
            wait_until_quiet(MOST_FOREIGN, self._arguments.patience_quiet)
            sample = self._attempt(urls, pid, rate)
            if best is None or sample.foreign < best.foreign:
                best = sample
            if best.foreign <= MOST_FOREIGN:
                break
        assert best is not None
        figures = best.figures
        say(
            f"{name} {rate:g}/s: TTFT {figures['ttft_p50'] * 1e3:.1f} / {figures['ttft_p99'] * 1e3:.1f} ms, gap p99 "
            f"{figures['gap_p99'] * 1e3:.1f} ms, {best.cores:.2f} cores, foreign {best.foreign:.2f} "
            f"{figures['why_invalid']} {figures['first_error']}"
        )
        return best

    def _attempt(self, urls: list[str], pid: int | None, rate: float) -> Sample:
        arguments = self._arguments
        command = ["taskset", "-c", str(self.cores.load), sys.executable, str(PROGRAM), "load"]
        warm = int(rate * (arguments.ttft_ms + arguments.itl_ms * arguments.output_tokens) / 1e3 * 1.2 / len(urls)) + 8
        for url in urls:
            command += ["--url", url]
        command += ["--rate", str(rate), "--seconds", str(arguments.seconds), "--warm", str(warm)]
        for option in ("api", "prompt", "prompt_tokens", "output_tokens", "seed", "patience", "extra"):
            command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
        for header in arguments.header:
            command += ["--header", header]
        foreign, before = ForeignLoad(os.getpid()), tree_seconds(pid)
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        figures = json.loads(done.stdout)
        used = tree_seconds(pid) - before
        return Sample(figures, used / figures["seconds"] if pid is not None else math.nan, foreign.cores())


# --- the report -----------------------------------------------------------------------------------------------------


def render(results: Results, arguments: argparse.Namespace, pinning: str) -> str:
    machine = describe()
    foreign = [sample.foreign for samples in results.samples.values() for sample in samples.values()]
    versions = "; ".join(router.version for router in results.routers if router.version)
    lines = [
        f"`{' '.join(['python', 'benchmarks/gateway.py', 'compare', *sys.argv[2:]])}`, {time.strftime('%Y-%m-%d')}",
        "",
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['system']}; {versions}",
        f"- {arguments.engines} mock engines: first token after {arguments.ttft_ms:g} ms, then one every "
        f"{arguments.itl_ms:g} ms; prompts of {arguments.prompt_tokens} tokens as {arguments.prompt}, "
        f"{arguments.output_tokens} tokens out, {arguments.api}, streamed; Poisson arrivals, "
        f"{arguments.seconds:g} s a run",
        f"- {pinning}",
        f"- cores busy with other processes during a run: {spread(foreign, 2)}",
        f"- rounds: {arguments.rounds}; medians, with the range over rounds in brackets",
        "",
        "### What a router adds",
        "",
        _latency_table(results),
        "",
        "### What a router carries",
        "",
        _capacity_table(results),
        "",
        _ratio_table(results),
    ]
    if results.missing:
        lines += ["", *(f"- {name} was not measured: {reason}" for name, reason in results.missing.items())]
    return "\n".join(lines).rstrip() + "\n"


def table(titles: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [titles, ["---"] * len(titles), *rows])


def _latency_table(results: Results) -> str:
    titles = ["streams/s", "router", "TTFT p50 ms", "TTFT p99 ms", "gap p99 ms", "E2E p50 ms", "cores"]
    titles += ["token events/s per core", "completed", "tokens lost / twice", "unequal"]
    rows = []
    for rate in results.rates:
        for router in results.routers:
            samples = [s for s in results.samples.get((router.name, rate), {}).values() if s.figures["valid"]]
            if samples:
                rows.append([f"{rate:g}", router.name, *_latency_cells(results, router, rate, samples)])
    return "The direct way's own figures; of the routers what they add to it.\n\n" + table(titles, rows)


def _latency_cells(results: Results, router: Router, rate: float, samples: list[Sample]) -> list[str]:
    cells = []
    for figure in ("ttft_p50", "ttft_p99", "gap_p99", "e2e_p50"):
        if router.command is None:
            cells.append(spread((sample.figures[figure] for sample in samples), 1, 1e3))
        else:
            added = results.added(router.name, rate, figure).values()
            cells.append(("+" if added and statistics.median(added) >= 0 else "") + spread(added, 1, 1e3))
    if router.command is None:
        cells += ["–", "–"]
    else:
        per_core = [sample.figures["events_per_second"] / sample.cores for sample in samples if sample.cores]
        cells += [spread((sample.cores for sample in samples), 2), spread(per_core, 0)]
    total = {k: sum(s.figures[k] for s in samples) for k in ("completed", "offered", "missing_tokens", "unequal")}
    twice = sum(sample.figures["duplicate_tokens"] for sample in samples)
    cells.append(f"{total['completed']:,} of {total['offered']:,}")
    return [*cells, f"{total['missing_tokens']} / {twice}", str(total["unequal"])]


def _capacity_table(results: Results) -> str:
    titles = [
        "router",
        "streams/s, added gap p99 < 10 ms",
        "streams/s, added TTFT p99 < 10 ms too",
        "idle, % of a core",
    ]
    rows = []
    for router in results.routers[1:]:
        if router.name in results.missing:
            continue
        gaps = results.carries(router.name, ["gap_p99"])
        both = results.carries(router.name, ["gap_p99", "ttft_p99"])
        idle = results.idle.get(router.name, [])
        rows.append([router.name, spread(gaps, 0), spread(both, 0), spread(idle, 2, 100.0)])
    direct = spread(results.carries("direct", []), 0)
    note = f"Mocks and generator themselves carried {direct}: a router that reaches it may carry more."
    return table(titles, rows) + "\n\n" + note


def _ratio_table(results: Results) -> str:
    """shoal's added p50 beside the Rust routers', round by round."""
    rows = []
    for rate in results.rates:
        ours = results.added("shoal", rate, "ttft_p50")
        for rival in ("vllm-router", "sglang-router"):
            theirs = results.added(rival, rate, "ttft_p50")
            ratios = [ours[n] / max(theirs[n], RESOLUTION) for n in ours if n in theirs]
            if ratios:
                rows.append([f"{rate:g}", rival, spread(ratios, 2)])
    if not rows:
        return ""
    note = f"Two runs of the direct way differ by {RESOLUTION * 1e3:g} ms: where theirs is less, it counts as that."
    title = "### TTFT p50 that shoal adds / that they add"
    return f"{title}\n\n{note}\n\n" + table(["streams/s", "router", "ratio"], rows)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="gateway.py compare", description="The cost of a gateway.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rates", default="50,100,200,400,600,800", help="streams a second, ascending")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each run")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--ttft-ms", type=float, default=20.0)
    parser.add_argument("--itl-ms", type=float, default=20.0)
    parser.add_argument("--only", default="", help="routers beside the direct way, separated by commas; default: all")
    parser.add_argument("--idle-seconds", type=float, default=10.0, help="how long an idle router is watched")
    parser.add_argument("--attempts", type=int, default=3, help="runs of which the least disturbed counts")
    parser.add_argument("--patience-quiet", type=float, default=60.0, help="seconds to wait for other processes")
    parser.add_argument("--venvs", type=Path, default=Path.home() / ".cache" / "shoal" / "bench-venvs")
    parser.add_argument("--pip-option", action="append", default=[])
    add_shape_options(parser)
    arguments = parser.parse_args(argv)
    routers, missing = find_routers(arguments.venvs, arguments.pip_option, say)
    if arguments.only:
        unknown = set(arguments.only.split(",")) - {router.name for router in routers} - set(missing)
        if unknown:
            parser.error(f"--only: {min(unknown)!r} is unknown; there are {', '.join(r.name for r in routers)}")
        routers = [router for router in routers if router.name == "direct" or router.name in arguments.only.split(",")]
    with tempfile.TemporaryDirectory(prefix="shoal-gateway-") as folder:
        benchmark = Benchmark(arguments, Path(folder))
        results = benchmark.run(routers, missing)
    print(render(results, arguments, str(benchmark.cores)))


if __name__ == "__main__":
    main(sys.argv[1:])
