"""What parallelism brings on this machine: layouts beside one rank. What collectives cost: collectives.py.

    python benchmarks/parallel.py                five rounds; prints a Markdown report
    python benchmarks/parallel.py --rounds 1     a look

Layouts are compared as peers.py compares engines: interleaved, one at a time, the others stopped, in an order that
turns around from round to round. Every layout has the same cores: tp1 with two threads stands against two ranks of one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import machine
import model_files
from engines import MAX_LEN, EngineProcess, EngineSpec
from report import spread
from workloads import Workload, make_workloads

QUIET = 0.1
KV_BYTES = 1 << 30
"""Of each rank."""


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def _table(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- layouts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    name: str
    layout: dict[str, int]
    threads: int
    """Of each rank."""
    depth: int = 1


def candidates(cores: int) -> list[Candidate]:
    half = max(1, cores // 2)
    return [
        Candidate(f"tp1, {cores} threads", {}, cores),
        Candidate(f"tp2, {half} thread each", {"tp": 2}, half),
        Candidate(f"tp2, {half} thread each, depth 2", {"tp": 2}, half, depth=2),
        Candidate(f"pp2, {half} thread each", {"pp": 2}, half),
    ]


def spec_of(candidate: Candidate, model: str) -> EngineSpec:
    options = {"model": model, "max_len": MAX_LEN, "kv_cache_bytes": KV_BYTES, "prefix_caching": False}
    options |= {"dtype": "float32", "layout": candidate.layout, "threads": candidate.threads, "depth": candidate.depth}
    return EngineSpec(candidate.name, "float32", "shoal_runner.py", options)


class Layouts:
    """Rates of every layout on every workload, round by round, and whether all gave the same tokens."""

    def __init__(self, workloads: list[Workload]) -> None:
        self.workloads = workloads
        self.rates: dict[tuple[str, str], list[float]] = {}
        self.starts: dict[str, float] = {}
        self.tokens: dict[tuple[str, str], list[list[int]]] = {}

    def run(self, rounds: int, model: str, logs: Path) -> None:
        chosen = candidates(machine.num_cores())
        with ExitStack() as stack:
            processes: dict[str, EngineProcess] = {}
            for candidate in chosen:
                log = logs / f"{candidate.name}.log"
                process = EngineProcess(spec_of(candidate, model), Path(sys.executable), log)
                stack.callback(process.close)
                processes[candidate.name] = process
                self.starts[candidate.name] = process.start_seconds
            for number in range(rounds):
                for workload in self.workloads:
                    for candidate in chosen if number % 2 == 0 else chosen[::-1]:
                        self._run_one(number, processes[candidate.name], candidate.name, workload)

    def _run_one(self, number: int, process: EngineProcess, name: str, workload: Workload) -> None:
        machine.wait_until_quiet(QUIET, 60)
        raw = process.call("run", items=workload.as_message())
        rate = workload.num_output_tokens / raw["seconds"]
        self.rates.setdefault((name, workload.name), []).append(rate)
        self.tokens[name, workload.name] = raw["tokens"]
        say(f"round {number + 1} ({workload.name}) {name}: {rate:.1f} output tok/s")

    def table(self) -> str:
        names = list(self.starts)
        titles = ["layout", *(f"({w.name}) output tok/s | ({w.name}) beside the first" for w in self.workloads)]
        lines = [titles + ["start s", "same tokens as the first"], ["---"] * (len(self.workloads) * 2 + 3)]
        for name in names:
            cells = []
            for workload in self.workloads:
                rates, first = self.rates[name, workload.name], self.rates[names[0], workload.name]
                ratios = [rate / base for rate, base in zip(rates, first, strict=True)]
                cells += [spread(rates, 1), spread(ratios, 2) + "x"]
            same = all(self.tokens[name, w.name] == self.tokens[names[0], w.name] for w in self.workloads)
            lines.append([name, *cells, f"{self.starts[name]:.1f}", "yes" if same else "**no**"])
        return _table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What parallelism costs and brings on this machine, as Markdown.")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--workloads", default="b,c", help="of peers.py, separated by commas; default b,c")
    parser.add_argument(
        "--models", type=Path, default=Path("~/.cache/shoal/bench-models"), help="where weights are kept"
    )
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    paths = model_files.prepare(arguments.models.expanduser())
    every = make_workloads(paths.spec.vocab_size)
    unknown = [name for name in arguments.workloads.split(",") if name not in every]
    if unknown:
        parser.error(f"--workloads: {unknown[0]!r} is unknown; there are {', '.join(every)}")
    measured = subprocess.run(
        [sys.executable, str(Path(machine.__file__))], capture_output=True, check=True, text=True
    ).stdout
    host = json.loads(measured)["machine"]
    layouts = Layouts([every[name] for name in arguments.workloads.split(",")])
    with tempfile.TemporaryDirectory() as logs:
        layouts.run(arguments.rounds, str(paths.float32), Path(logs))
    print(f"`python benchmarks/parallel.py {' '.join(sys.argv[1:])}`".replace(" `", "`"), end="")
    print(f", {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}\n")
    print(f"- {host['cpu']}, {host['cores']} cores, {host['system']}; Python {host['python']}, torch {host['torch']}")
    print(f"- rounds: {arguments.rounds}; medians, with the range over rounds in brackets; ratios round by round\n")
    print("## Layouts, float32\n\n" + layouts.table())


if __name__ == "__main__":
    main()
