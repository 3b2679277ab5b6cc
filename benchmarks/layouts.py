"""Layouts beside one rank on the same cores, and beside vLLM's tensor parallelism, as a Markdown report.

    python benchmarks/layouts.py                 five rounds: three quarters of an hour
    python benchmarks/layouts.py --rounds 1      a look

Layouts are compared as peers.py compares engines: interleaved, one at a time, the others stopped, in an order that
turns around from round to round. Every layout has the same cores: tp1 with two threads stands against two ranks of one.
Expert parallelism is measured on a random mixture of experts (peers.py's model has none), against one rank on that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import model_files
import peer_builds
from engines import MAX_LEN, EngineFailed, EngineProcess, EngineSpec, vllm_spec
from report import spread
from shoal.engine.step_log import broadcast_seconds, busy_share, read_ranks, read_submitted
from workloads import Workload, make_workloads

QUIET = 0.1
"""Cores. A run beside which more than that was busy with something else is repeated."""
ATTEMPTS = 3
KV_BYTES = 1 << 30
"""Of each rank."""
NAMES = ["dense", "context", "experts", "vllm"]
STEADY_SEQUENCES = 8
"""Of a pipeline's step in steady decode, at least."""


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def table(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shoal_spec(name: str, model: str, threads: int, logs: Path, depth: int = 1, **layout: int) -> EngineSpec:
    options: dict[str, Any] = {"model": model, "max_len": MAX_LEN, "kv_cache_bytes": KV_BYTES, "prefix_caching": False}
    options |= {"dtype": "float32", "layout": layout, "threads": threads, "depth": depth}
    return EngineSpec(name, "float32", "shoal_runner.py", options | {"step_log": str(logs / name)})


@dataclass
class Comparison:
    """Engines on the same weights: rates by workload and round, tokens of the last round, memory behind the start."""

    title: str
    specs: list[EngineSpec]
    """The first is what the others stand beside."""
    workloads: list[Workload]
    logs: Path
    rates: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    tokens: dict[tuple[str, str], list[list[int]]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def run(self, rounds: int, pythons: dict[str, Path]) -> None:
        with ExitStack() as stack:
            running: dict[str, EngineProcess] = {}
            for spec in self.specs:
                try:
                    process = EngineProcess(spec, pythons[spec.peer or ""], self.logs / f"{spec.name}.log")
                except EngineFailed as error:
                    self.problems[spec.name] = str(error)
                    say(f"{spec.name} is left out: {error}")
                    continue
                stack.callback(process.close)
                running[spec.name], self.facts[spec.name] = process, process.facts
                say(f"{spec.name}: first token after {process.start_seconds:.1f} s")
            for number in range(rounds):
                for workload in self.workloads:
                    for name in list(running) if number % 2 == 0 else list(running)[::-1]:
                        self._run_one(number, running[name], name, workload)

    def _run_one(self, number: int, process: EngineProcess, name: str, workload: Workload) -> None:
        for _ in range(ATTEMPTS):
            machine.wait_until_quiet(QUIET, 60)
            raw = process.call("run", items=workload.as_message())
            if process.foreign_load <= QUIET:
                break
        rate = workload.num_output_tokens / raw["seconds"]
        self.rates.setdefault((name, workload.name), []).append(rate)
        self.tokens[name, workload.name] = raw["tokens"]
        say(f"round {number + 1} ({workload.name}) {name}: {rate:.1f} output tok/s, {process.foreign_load:.2f} foreign")

    def rates_table(self) -> str:
        titles = ["engine"]
        for w in self.workloads:
            titles += [f"({w.name}) output tok/s", f"({w.name}) beside the first"]
        lines, names = [[*titles, "same tokens as the first"]], [spec.name for spec in self.specs]
        for name in names:
            if name in self.problems:
                continue
            cells = []
            for w in self.workloads:
                rates, first = self.rates[name, w.name], self.rates[names[0], w.name]
                ratios = [rate / base for rate, base in zip(rates, first, strict=True)]
                cells += [spread(rates, 1), spread(ratios, 2) + "x"]
            pairs = [
                (own, first)
                for w in self.workloads
                for own, first in zip(self.tokens[name, w.name], self.tokens[names[0], w.name], strict=True)
            ]
            same = sum(own == first for own, first in pairs)
            lines.append([name, *cells, f"{same} of {len(pairs)} sequences"])
        return table(lines)

    def ranks_table(self, baseline: int) -> str:
        """What the step logs and the ranks' memory say. `baseline` is the peak of a process that only imports."""
        weights = self.facts[self.specs[0].name]["weight_bytes"]
        titles = [
            "engine",
            "largest rank's weights / first's",
            "its peak while loading, less the imports / first's weights",
        ]
        lines = [[*titles, f"busy in decode of {STEADY_SEQUENCES} and more", "plan of 64 to all ranks, µs"]]
        for spec in self.specs:
            if spec.name in self.problems or "step_log" not in spec.options:
                continue
            facts, directory = self.facts[spec.name], Path(spec.options["step_log"])
            ranks = read_ranks(directory)
            shares = [busy_share(steps, STEADY_SEQUENCES) for steps in ranks.values()]
            is_lockstep = len(ranks) > 1 and spec.options["depth"] == 1 and "pp" not in spec.options["layout"]
            seconds = broadcast_seconds(read_submitted(directory), ranks, 64) if is_lockstep else []
            peak = max(facts["rank_peak_bytes"]) - baseline
            cells = [f"{facts['rank_weight_bytes'] / weights:.1%}", f"{peak / weights:.1%}"]
            cells.append(", ".join("–" if share is None else f"{share:.1%}" for share in shares))
            cells.append(_median_and_p99([1e6 * s for s in seconds]))
            lines.append([spec.name, *cells])
        return table(lines)


def _median_and_p99(values: list[float]) -> str:
    if len(values) < 2:
        return "–"
    return f"{statistics.median(values):.0f}, p99 {statistics.quantiles(values, n=100)[98]:.0f} ({len(values)} steps)"


def comparisons(models: Path, logs: Path, peers: dict[str, peer_builds.Peer]) -> dict[str, Comparison]:
    """By the name that --only takes. Engines of one comparison run the same weights."""
    cores = machine.num_cores()
    half = max(1, cores // 2)
    one, two = f"{cores} threads", f"{half} thread each"
    peers_model = str(model_files.prepare(models).float32)
    experts = str(model_files.prepare_random(model_files.EXPERTS, models / "random-experts"))
    even = str(model_files.prepare_random(model_files.EVEN, models / "random-even"))
    beside_vllm = [shoal_spec(f"8 heads, tp1, {one}", even, cores, logs)]
    beside_vllm += [shoal_spec(f"8 heads, tp2, {two}", even, half, logs, tp=2)]
    if "vllm" in peers:
        beside_vllm.append(vllm_spec(even, "float32", peers["vllm"], half, ranks=2))
    return {
        "dense": Comparison(
            "SmolLM2-135M, float32",
            [
                shoal_spec(f"tp1, {one}", peers_model, cores, logs),
                shoal_spec(f"tp2, {two}", peers_model, half, logs, tp=2),
                shoal_spec(f"pp2, {two}", peers_model, half, logs, pp=2),
            ],
            _workloads("bc"),
            logs,
        ),
        "context": Comparison(
            "Context, SmolLM2-135M, float32",
            [
                shoal_spec(f"whole context, tp1, {one}", peers_model, cores, logs),
                shoal_spec(f"cp2, {two}", peers_model, half, logs, cp=2),
            ],
            _workloads("bd"),
            logs,
        ),
        "experts": Comparison(
            "Experts, random weights, float32",
            [
                shoal_spec(f"experts on 1 rank, {one}", experts, cores, logs),
                shoal_spec(f"experts, ep2, {two}", experts, half, logs, ep=2),
                shoal_spec(f"experts, tp2, {two}", experts, half, logs, tp=2),
            ],
            _workloads("b"),
            logs,
        ),
        "vllm": Comparison("Beside vLLM: 8 heads, random weights, float32", beside_vllm, _workloads("b"), logs),
    }


def _workloads(names: str) -> list[Workload]:
    every = make_workloads(model_files.VOCAB_SIZE)
    return [every[name] for name in names]


def _peak_of_imports() -> int:
    """Bytes that a rank's process has at most before it loads anything."""
    code = "import os, shoal.engine.worker, runners.protocol as p; print(p.peak_rss_bytes(os.getpid()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True, cwd=Path(__file__).parent
    )
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="What layouts bring on this machine, as Markdown.")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--only", default=",".join(NAMES), help=f"of {', '.join(NAMES)}; default all")
    parser.add_argument("--no-peers", action="store_true", help="leave vLLM out")
    parser.add_argument("--venvs", type=Path, default=Path("~/.cache/shoal/bench-venvs"), help="where peers are kept")
    parser.add_argument(
        "--models", type=Path, default=Path("~/.cache/shoal/bench-models"), help="where weights are kept"
    )
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    only = arguments.only.split(",")
    if unknown := [name for name in only if name not in NAMES]:
        parser.error(f"--only: {unknown[0]!r} is unknown; there are {', '.join(NAMES)}")
    models = arguments.models.expanduser()
    peers = {} if arguments.no_peers or "vllm" not in only else {"vllm": _vllm(arguments.venvs.expanduser())}
    pythons = {"": Path(sys.executable)} | {name: peer.executable for name, peer in peers.items()}
    measured = subprocess.run(
        [sys.executable, str(Path(machine.__file__))], capture_output=True, check=True, text=True
    ).stdout
    host = json.loads(measured)["machine"]
    with tempfile.TemporaryDirectory() as folder:
        every = comparisons(models, Path(folder), peers)
        chosen = [every[name] for name in only]
        for comparison in chosen:
            say(comparison.title)
            comparison.run(arguments.rounds, pythons)
        baseline = _peak_of_imports()
        print(f"`{subprocess.list2cmdline(['python', 'benchmarks/layouts.py', *sys.argv[1:]])}`", end="")
        print(f", {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}\n")
        print(
            f"- {host['cpu']}, {host['cores']} cores, {host['system']}; Python {host['python']}, torch {host['torch']}"
        )
        for peer in peers.values():
            print(f"- {peer.version}")
        print(f"- rounds: {arguments.rounds}; medians, the range over rounds in brackets; ratios round by round")
        for comparison in chosen:
            print(f"\n## {comparison.title}\n\n{comparison.rates_table()}\n\n{comparison.ranks_table(baseline)}")
            for name, problem in comparison.problems.items():
                print(f"\n{name} could not be measured: {problem}")


def _vllm(venvs: Path) -> peer_builds.Peer:
    return peer_builds.build("vllm", venvs, jobs=2, pip_options=[], say=say)


if __name__ == "__main__":
    main()
