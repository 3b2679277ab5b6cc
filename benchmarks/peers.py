"""shoal beside vLLM, transformers and llama.cpp on this machine's CPU, in one run. See benchmarks/README.md.

    python benchmarks/peers.py                   five rounds; prints a Markdown report
    python benchmarks/peers.py --quick           one round

A round measures the machine, then runs each workload on every engine in turn, so that a machine that drifts, drifts
for all; the order of the engines turns around from round to round. Only one engine computes at a time: the others are
stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import machine
import model_files
import peer_builds
from engines import QUICK_START, EngineFailed, EngineProcess, EngineSpec, engine_specs, interpreter
from measures import decode_bytes_per_token, measure, workload_flops
from model_files import ModelPaths
from report import EngineResults, Report, render
from workloads import Workload, make_workloads

DEFAULT_ENGINES = [
    "shoal float32",
    "vLLM float32",
    "transformers batching",
    "transformers generate",
    "shoal bfloat16",
    "shoal int8",
    "llama.cpp Q8_0",
]
QUIET = 0.1
"""Cores. A run beside which more than that was busy with something else is repeated."""
REFERENCE = "transformers generate"
PEER_OF = {"vLLM": "vllm", "transformers": "transformers", "llama.cpp": "llama.cpp"}


def say(text: str) -> None:
    """Progress; stdout is for the report."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


class Benchmark:
    """State of one run of the whole benchmark."""

    def __init__(self, arguments: argparse.Namespace, paths: ModelPaths) -> None:
        self._arguments = arguments
        self._paths = paths
        everything = make_workloads(paths.spec.vocab_size)
        self.workloads: list[Workload] = [everything[name] for name in arguments.workloads]
        self._logs = arguments.venvs / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self.peers: dict[str, peer_builds.Peer] = {}
        self.missing_peers: dict[str, str] = {}
        self.rates: dict[int, dict[str, float]] = {}
        self.machine: dict[str, Any] = {}
        self.results: dict[str, EngineResults] = {}
        self._running: dict[str, EngineProcess] = {}
        self._outputs: dict[tuple[str, str], list[list[int]]] = {}
        """Engine and workload -> tokens of the last run."""

    def build_peers(self) -> list[EngineSpec]:
        """Make what is missing; the engines to run, in the order asked for."""
        wanted = {
            peer for name in self._arguments.engines for prefix, peer in PEER_OF.items() if name.startswith(prefix)
        }
        for name in sorted(wanted):
            try:
                self.peers[name] = peer_builds.build(
                    name,
                    self._arguments.venvs,
                    jobs=self._arguments.jobs,
                    pip_options=self._arguments.pip_option,
                    say=say,
                )
            except peer_builds.PeerUnavailable as error:
                say(f"{name} is left out: {error}")
                self.missing_peers[name] = str(error)
        specs = {spec.name: spec for spec in engine_specs(self._paths, self.peers, self._arguments.threads)}
        return [specs[name] for name in self._arguments.engines if name in specs]

    def run(self, specs: list[EngineSpec]) -> None:
        """All rounds. Whatever engine fails is dropped, with the reason kept."""
        for spec in specs:
            peer = self.peers.get(next((p for prefix, p in PEER_OF.items() if spec.name.startswith(prefix)), ""))
            self.results[spec.name] = EngineResults(spec.name, spec.precision, peer.version if peer else "")
            self._start(spec)
        for number in range(self._arguments.rounds):
            self._measure_machine(number)
            if number > 0:
                self._restart_quick_ones(specs)
            order = specs if number % 2 == 0 else specs[::-1]
            for workload in self.workloads:
                for spec in order:
                    if not self._is_too_slow(spec, workload):
                        self._run_one(number, spec, workload)
        if not self._arguments.no_verify:
            self._verify()

    def close(self) -> None:
        for process in self._running.values():
            process.close()

    def _start(self, spec: EngineSpec) -> None:
        result = self.results[spec.name]
        with self._failures_of(spec):
            process = EngineProcess(spec, interpreter(spec, self.peers), self._logs / f"{spec.name}.log")
            self._running[spec.name] = process
            result.starts.append(process.start_seconds)
            result.facts |= process.facts
            say(f"{spec.name}: first token {process.start_seconds:.1f} s after its start")

    def _restart_quick_ones(self, specs: list[EngineSpec]) -> None:
        for spec in specs:
            process = self._running.get(spec.name)
            if process is not None and process.start_seconds < QUICK_START:
                process.close()
                self._start(spec)

    def _measure_machine(self, number: int) -> None:
        command = [sys.executable, str(Path(machine.__file__))]
        for _ in range(self._arguments.attempts):
            machine.wait_until_quiet(QUIET, self._arguments.patience)
            foreign = machine.ForeignLoad()
            measured = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
            if foreign.cores() <= QUIET:
                break
        self.machine, self.rates[number] = measured["machine"], measured["rates"]
        rates = measured["rates"]
        say(f"round {number + 1}: GEMM {rates['gemm_gflops']:.0f} GFLOP/s, memory {rates['read_gbps']:.1f} GB/s")

    def _is_too_slow(self, spec: EngineSpec, workload: Workload) -> bool:
        """To be measured once more: minutes a round would buy the spread of a figure that is far from every other."""
        rounds = self.results[spec.name].rounds.get(workload.name, {})
        return any(figures["seconds"] > self._arguments.repeat_seconds for figures in rounds.values())

    def _run_one(self, number: int, spec: EngineSpec, workload: Workload) -> None:
        process = self._running.get(spec.name)
        if process is None:
            return
        result = self.results[spec.name]
        with self._failures_of(spec):
            raw, foreign_load = self._least_disturbed(process, workload)
            figures = measure(workload, raw) | {"foreign_load": foreign_load}
            figures |= {key: raw[key] for key in ("kv_fill", "steps") if key in raw}
            figures |= self._of_machine(number, workload, figures, result.facts)
            result.rounds.setdefault(workload.name, {})[number] = figures
            result.peak_rss_bytes = max(result.peak_rss_bytes, raw["peak_rss_bytes"])
            if "kv_peak_bytes" in raw:
                needed = result.facts["weight_bytes"] + raw["kv_peak_bytes"]
                result.facts["needed_bytes"] = max(result.facts.get("needed_bytes", 0), needed)
            self._outputs[spec.name, workload.name] = raw["tokens"]
            disturbed = f", beside {foreign_load:.1f} cores of something else" if foreign_load > QUIET else ""
            rate = f"{figures['output_rate']:.1f} output tok/s"
            say(f"round {number + 1} ({workload.name}) {spec.name}: {rate}{disturbed}")

    def _least_disturbed(self, process: EngineProcess, workload: Workload) -> tuple[dict[str, Any], float]:
        """Of up to `attempts` runs the first that ran alone, else the least disturbed; and the cores busy beside it.

        What is compared is the load of others, never the result, so no engine gets the better of several tries.
        """
        best: tuple[dict[str, Any], float] | None = None
        for _ in range(self._arguments.attempts):
            machine.wait_until_quiet(QUIET, self._arguments.patience)
            raw = process.call("run", items=workload.as_message())
            if best is None or process.foreign_load < best[1]:
                best = raw, process.foreign_load
            if best[1] <= QUIET:
                break
        if best is None:
            raise EngineFailed("no run was attempted")
        return best

    def _of_machine(
        self, number: int, workload: Workload, figures: dict[str, float], facts: dict[str, Any]
    ) -> dict[str, float]:
        """The same work as a fraction of what the machine was measured to do in this round."""
        rates = self.rates[number]
        flops = workload_flops(workload, self._paths.spec)
        fractions = {"gemm_fraction": flops / figures["seconds"] / (rates["gemm_gflops"] * 1e9)}
        if "weight_bytes" in facts and "decode_rate" in figures:
            moved = decode_bytes_per_token(workload, self._paths.spec, facts["weight_bytes"]) * figures["decode_rate"]
            fractions["bandwidth_fraction"] = moved / (rates["read_gbps"] * 1e9)
        return fractions

    def _verify(self) -> None:
        """Check the tokens of every engine against transformers' own logits; the same output is checked only once."""
        reference = self._running.get(REFERENCE)
        if reference is None:
            return
        say("checking the tokens against transformers")
        checked: dict[tuple[str, int, tuple[int, ...]], dict[str, int]] = {}
        for name, result in self.results.items():
            counts = {"equal": 0, "ties": 0, "different": 0}
            for workload in self.workloads:
                outputs = self._outputs.get((name, workload.name), [])
                if any(-1 in output for output in outputs):
                    counts = {}  # the server did not say every id
                    break
                for index, output in enumerate(outputs):
                    key = (workload.name, index, tuple(output))
                    if key not in checked:
                        sequence = {"prompt": workload.items[index].prompt, "output": output}
                        checked[key] = reference.call("verify", sequences=[sequence])[0]
                    counts = {kind: counts[kind] + checked[key][kind] for kind in counts}
            total = sum(counts.values())
            if total:
                ties = f", {counts['ties']} within 1e-4" if counts["ties"] else ""
                result.agreement = f"{counts['equal']:,} of {total:,}{ties}"

    @contextmanager
    def _failures_of(self, spec: EngineSpec) -> Iterator[None]:
        try:
            yield
        except EngineFailed as error:
            say(f"{spec.name} is dropped: {error}")
            self.results[spec.name].problem = str(error)
            process = self._running.pop(spec.name, None)
            if process is not None:
                process.close()

    def report(self, command: str) -> Report:
        date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        return Report(self.machine, self.rates, list(self.results.values()), self.missing_peers, command, date)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="shoal beside its peers on this machine's CPU, as a Markdown report.")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--venvs", type=Path, default=Path("~/.cache/shoal/bench-venvs"), help="where peers are kept")
    parser.add_argument(
        "--models", type=Path, default=Path("~/.cache/shoal/bench-models"), help="where weights are kept"
    )
    parser.add_argument("--engines", default=",".join(DEFAULT_ENGINES), help="names, separated by commas")
    parser.add_argument("--workloads", default="a,b,c,d", help="names, separated by commas")
    parser.add_argument("--threads", type=int, default=machine.num_cores(), help="of every engine; default: all cores")
    parser.add_argument("--jobs", type=int, default=2, help="of the llama.cpp build; default 2")
    parser.add_argument("--pip-option", action="append", default=[], help="handed to pip where it makes a peer")
    parser.add_argument(
        "--attempts", type=int, default=3, help="runs at most, where other processes were busy beside one; default 3"
    )
    parser.add_argument(
        "--patience", type=float, default=60.0, help="seconds to wait at most, before a run, until others are quiet"
    )
    parser.add_argument(
        "--repeat-seconds",
        type=float,
        default=120.0,
        help="an engine whose run of a workload takes longer is measured in one round only; default 120",
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare tokens with transformers'")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    parser.add_argument("--json", type=Path, help="write every figure of every round to this file")
    arguments = parser.parse_args()
    arguments.rounds = 1 if arguments.quick else arguments.rounds
    arguments.venvs, arguments.models = arguments.venvs.expanduser(), arguments.models.expanduser()
    arguments.engines, arguments.workloads = arguments.engines.split(","), arguments.workloads.split(",")
    known = [*DEFAULT_ENGINES, "vLLM bfloat16"]
    for option, given, allowed in (
        ("--engines", arguments.engines, known),
        ("--workloads", arguments.workloads, ["a", "b", "c", "d"]),
    ):
        for name in given:
            if name not in allowed:
                parser.error(f"{option}: {name!r} is unknown; there are {', '.join(allowed)}")
    for option in ("rounds", "threads", "jobs", "attempts"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option} must be at least 1, got {getattr(arguments, option)}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    say("preparing the weights")
    paths = model_files.prepare(arguments.models)
    benchmark = Benchmark(arguments, paths)
    with ExitStack() as stack:
        stack.callback(benchmark.close)
        try:
            benchmark.run(benchmark.build_peers())
        except KeyboardInterrupt:
            if not benchmark.rates:
                sys.exit("interrupted before anything was measured")
            say("interrupted: the report holds what was measured before")
        report = benchmark.report(shlex.join(["python", "benchmarks/peers.py", *sys.argv[1:]]))
    text = render(report)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(asdict(report), indent=1))


if __name__ == "__main__":
    main()
