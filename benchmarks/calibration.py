"""What a calibrated cost model predicts beside what this machine does: single steps, and a trace. As Markdown.

    python benchmarks/calibration.py            smollm2-135m, tp 1 and 2: ten minutes
    python benchmarks/calibration.py --quick    a look

Steps: constants are fitted to a grid of points, as `shoal calibrate` does, and 30 other points, drawn from everything
in between, are predicted. All are timed in the same rounds, in another order each.

Trace: requests arrive at random at 60% of what the simulator says the engine can take. Live, EngineCore and executor
run in this process against the clock, as `shoal serve` runs them without its sockets; the simulator runs the same
requests through the same EngineCore in virtual time, with the calibrated cost model for the device. Medians of several
live runs, of the quiet ones if there are any, stand beside one simulation, which is always the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from machine import ForeignLoad, describe, wait_until_quiet
from report import spread
from shoal.bench.calibration.fit import constants, quantile
from shoal.bench.calibration.points import Limits, StepPoint, grid, held_out
from shoal.bench.calibration.session import Checked, Outcome, Subject, check, concluded, time_engine
from shoal.checkpoint.resolve import resolve
from shoal.cli.calibration import make_subject, open_engine, provenance_of
from shoal.core.config import SchedulerConfig
from shoal.core.cost.calibration import Calibration, encode
from shoal.core.cost.model import CostModel
from shoal.core.engine_core import EngineCore
from shoal.core.router import Router, RoutingConfig
from shoal.core.types import Request, Sampling, WorkerFailure
from shoal.sim.fleet_simulation import FleetSimulation
from shoal.sim.requests import Arrival
from shoal.sim.summary import Target, summarise

QUIET = 0.1
"""Cores that others may keep busy beside a live run that counts."""
CHECKS = 6
"""Points that calibrate itself keeps out of its fit, by number of ranks."""
LOAD = 0.6
"""Of the simulated capacity."""
TARGETS = {"throughput": 0.05, "ttft p50": 0.10, "ttft p99": 0.20, "itl p50": 0.10, "itl p99": 0.20}
STEP_TARGETS = {"median": 0.08, "p90": 0.20}


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def table(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- steps ------------------------------------------------------------------------------------------------------------


def measure_steps(subject: Subject, arguments: argparse.Namespace) -> tuple[Outcome, list[Checked]]:
    """The calibration, and what it predicts of `arguments.points` points that it never saw."""
    fitted, kept, unseen = [], [], []
    each = -(-arguments.points // len(subject.ranks))
    for tp in subject.ranks:
        wait_until_quiet(QUIET, arguments.patience)
        known: list[StepPoint] = []

        def points_of(limits: Limits, known: list[StepPoint] = known, tp: int = tp) -> list[StepPoint]:
            known += grid(limits, quick=arguments.quick)
            return known + held_out(limits, CHECKS + each, arguments.seed + tp, known)

        heard = [0.0]

        def report(what: str, share: float, heard: list[float] = heard) -> None:
            if time.monotonic() > heard[0] + 15:
                heard[0] = time.monotonic()
                say(f"{what}: {share:.0%}")

        seconds = 30.0 if arguments.quick else 120.0
        steps = time_engine(subject, tp, open_engine, points_of, arguments.rounds, seconds, report)
        fitted += steps[: len(known)]
        kept += steps[len(known) : len(known) + CHECKS]
        unseen += steps[len(known) + CHECKS :]
    outcome = concluded(subject, fitted, kept, provenance_of(subject, "python benchmarks/calibration.py"))
    return outcome, check(subject, outcome.calibration, unseen[: arguments.points])


def steps_table(checked: list[Checked], calibration: Calibration) -> str:
    interval = calibration.residuals["step"]
    lines = [["step", "tp", "measured ms", "visits, of which disturbed", "predicted ms", "error", "in the interval"]]
    for one in checked:
        step = one.step
        measured = f"{step.seconds * 1e3:.1f} ({step.low * 1e3:.1f}–{step.high * 1e3:.1f})"
        inside = interval.low <= step.seconds / one.predicted <= interval.high
        visits = f"{step.visits}, {step.disturbed}"
        predicted = f"{one.predicted * 1e3:.1f}"
        lines.append(
            [str(step.point), str(step.tp), measured, visits, predicted, f"{one.error:+.1%}", "yes" if inside else "no"]
        )
    return table(lines)


def step_figures(checked: list[Checked]) -> dict[str, float]:
    errors = sorted(abs(one.error) for one in checked)
    bias = statistics.median(one.error for one in checked)
    return {"median": quantile(errors, 0.5), "p90": quantile(errors, 0.9), "most": errors[-1], "bias": bias}


# --- the trace --------------------------------------------------------------------------------------------------------


def trace(count: int, rate: float, seed: int) -> list[Arrival]:
    """Prompts of 32 to 512 tokens, outputs of 16 to 128, both log-uniform, Poisson arrivals; no two prompts alike."""
    draw, at, requests = random.Random(seed), 0.0, []
    for number in range(count):
        prompt, output = round(32 * 16 ** draw.random()), round(16 * 8 ** draw.random())
        requests.append(
            Arrival(id=str(number), at=at, runs=((number + 2, prompt),), num_output=output, limit=output, blocks=())
        )
        at += draw.expovariate(rate)
    return requests


def scheduler_config(subject: Subject, num_blocks: int, max_len: int) -> SchedulerConfig:
    config = subject.config
    return SchedulerConfig(
        num_blocks=num_blocks,
        max_len=max_len,
        vocab_size=subject.vocab_size,
        block_size=config.block_size,
        max_sequences=config.max_sequences,
        max_batch_tokens=config.max_batch_tokens,
        prefix_caching=False,
    )


def simulated(requests: list[Arrival], config: SchedulerConfig, model: CostModel) -> dict[str, float]:
    router = Router(RoutingConfig(block_size=config.block_size))
    simulation = FleetSimulation(router, requests, 1, config, model.seconds)
    simulation.run()
    summary = summarise(simulation, Target(), 1, None)
    assert summary.completed == len(requests), "the simulation lost requests"
    figures = {"throughput": summary.output_tokens_per_second, "seconds": summary.seconds}
    for name, latency in (("ttft", summary.ttft), ("itl", summary.itl)):
        figures |= {f"{name} p50": latency.p50 or 0.0, f"{name} p99": latency.p99 or 0.0}
    return figures


def live(requests: list[Arrival], config: SchedulerConfig, executor: Any) -> dict[str, float]:
    """The loop of an engine's process, with arrivals by the clock in the place of its inbox."""
    core, sampling = EngineCore(config), Sampling(temperature=0.0)
    times: dict[str, list[float]] = {request.id: [] for request in requests}
    draw, came = random.Random(1), 0
    prompts = [[draw.randrange(config.vocab_size) for _ in range(request.num_prompt)] for request in requests]
    origin = time.perf_counter()
    while came < len(requests) or core.has_work():
        now = time.perf_counter() - origin
        while came < len(requests) and requests[came].at <= now:
            one = requests[came]
            request = Request(id=one.id, prompt=prompts[came], max_tokens=one.num_output, sampling=sampling)
            assert core.add(request, now) is None, "a request was refused"
            came += 1
        plan = core.plan(now)
        if plan is None:
            time.sleep(max(0.0, min(0.001, requests[came].at - now)) if came < len(requests) else 0.0)
            continue
        executor.submit(plan)
        result = executor.poll()
        if isinstance(result, WorkerFailure):
            raise RuntimeError(result.message)
        now = time.perf_counter() - origin
        for output in core.commit(plan.plan_id, result, now):
            times[output.request_id].append(now)
    return live_figures(requests, times)


def live_figures(requests: list[Arrival], times: dict[str, list[float]]) -> dict[str, float]:
    """By the simulator's definitions: ITL is of every gap, percentiles are by nearest rank."""
    ttft = sorted(times[request.id][0] - request.at for request in requests)
    gaps = sorted(b - a for each in times.values() for a, b in zip(each, each[1:], strict=False))
    seconds = max(each[-1] for each in times.values()) - requests[0].at
    figures = {"throughput": sum(map(len, times.values())) / seconds, "seconds": seconds}
    for name, values in (("ttft", ttft), ("itl", gaps)):
        for share in (50, 99):
            figures[f"{name} p{share}"] = values[max(-(-len(values) * share // 100), 1) - 1]
    return figures


@dataclass
class TraceResult:
    tp: int
    rate: float
    simulated: dict[str, float]
    runs: list[dict[str, float]]
    foreign: list[float]

    @property
    def counted(self) -> list[dict[str, float]]:
        """The quiet runs, or all where none was."""
        quiet = [run for run, cores in zip(self.runs, self.foreign, strict=True) if cores <= QUIET]
        return quiet or self.runs

    def error(self, name: str) -> float:
        return self.simulated[name] / statistics.median(run[name] for run in self.counted) - 1


def run_traces(subject: Subject, calibration: Calibration, arguments: argparse.Namespace) -> list[TraceResult]:
    """`arguments.live` runs of each number of ranks; while there is time as many more, until so many were quiet."""
    results: dict[int, TraceResult] = {}
    deadline = time.monotonic() + 60 * arguments.live_minutes
    for number in range(2 * arguments.live):
        for tp in subject.ranks:
            if tp in results:
                quiet = sum(cores <= QUIET for cores in results[tp].foreign)
                if quiet >= arguments.live or (number >= 1 and time.monotonic() > deadline):
                    continue
            executor, info = open_engine(subject.engine_config(tp))
            try:
                config = scheduler_config(subject, info.num_blocks, info.max_len)
                if tp not in results:
                    model = CostModel(subject.engine_shape(tp), calibration)
                    at_once = simulated(trace(arguments.requests, 1e6, arguments.seed), config, model)
                    rate = LOAD * arguments.requests / at_once["seconds"]
                    own = simulated(trace(arguments.requests, rate, arguments.seed), config, model)
                    results[tp] = TraceResult(tp, rate, own, [], [])
                result = results[tp]
                live(trace(4, 1e6, arguments.seed + 1), config, executor)  # memory that was never touched is slow
                wait_until_quiet(QUIET, arguments.patience)
                foreign = ForeignLoad(os.getpid())
                result.runs.append(live(trace(arguments.requests, result.rate, arguments.seed), config, executor))
                result.foreign.append(foreign.cores())
                say(f"tp {tp}, live run {number + 1}: {result.foreign[-1]:.2f} cores busy with something else")
            finally:
                executor.stop()
    return list(results.values())


def trace_table(results: list[TraceResult]) -> str:
    lines = [["tp", "figure", "live", "simulated", "error", "target", "reached"]]
    for result in results:
        for name, most in TARGETS.items():
            scale, digits, unit = (1.0, 1, "tok/s") if name == "throughput" else (1e3, 1, "ms")
            error = result.error(name)
            lines.append(
                [
                    str(result.tp),
                    f"{name}, {unit}",
                    spread([run[name] * scale for run in result.counted], digits),
                    f"{result.simulated[name] * scale:.{digits}f}",
                    f"{error:+.1%}",
                    f"≤ {most:.0%}",
                    "yes" if abs(error) <= most else "**no**",
                ]
            )
    return table(lines)


# --- the report -------------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = parse()
    began = time.monotonic()
    whole = ForeignLoad(os.getpid())
    files = resolve(arguments.model)
    ranks = tuple(int(part) for part in arguments.tp.split(","))
    wait_until_quiet(QUIET, arguments.patience)
    say("devices")
    subject = make_subject(files.path, files.name, arguments.dtype, "cpu", ranks)
    outcome, checked = measure_steps(subject, arguments)
    if arguments.output is not None:
        arguments.output.write_bytes(encode(outcome.calibration) + b"\n")
    figures = step_figures(checked)
    results = [] if arguments.live == 0 else run_traces(subject, outcome.calibration, arguments)
    about, made = describe(), outcome.calibration.made
    print(f"`python benchmarks/calibration.py {' '.join(sys.argv[1:])}`".replace(" `", "`") + f", {made['date']}\n")
    print(f"- {about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB, {about['system']}")
    print(f"- {made['versions']}; {made['model']}")
    print(f"- {whole.cores():.2f} cores were busy with something else on average, {outcome.foreign_cores:.2f} in the")
    print(f"  median timing of a step; {outcome.disturbed:.0%} of the timings were disturbed")
    print(f"- {(time.monotonic() - began) / 60:.1f} minutes\n")
    print("### Constants\n")
    known = {constant.name: constant.meaning for constant in constants(arguments.dtype)}
    rows = [[name, f"{value:.3g}", known[name]] for name, value in outcome.fitted.items()]
    print(table([["fitted", "value", "which is"], *rows]), "\n")
    print("### Steps\n")
    print(steps_table(checked, outcome.calibration), "\n")
    rows = [[name, f"≤ {most:.0%}", f"{figures[name]:.1%}", "yes" if figures[name] <= most else "**no**"]
            for name, most in STEP_TARGETS.items()]  # fmt: skip
    print(table([[f"error of {len(checked)} steps", "target", "measured", "reached"], *rows]))
    print(f"\nBias {figures['bias']:+.1%}, largest error {figures['most']:.1%}.\n")
    if results:
        print("### Trace\n")
        for result in results:
            print(f"- tp {result.tp}: {arguments.requests} requests at {result.rate:.2f}/s; cores busy with something")
            print(f"  else during the live runs: {', '.join(f'{cores:.2f}' for cores in result.foreign)};")
            print(f"  {len(result.counted)} of {len(result.runs)} count")
        print("\n" + trace_table(results))
    if arguments.json is not None:
        traces = [msgspec.to_builtins(result) | {"errors": {n: result.error(n) for n in TARGETS}} for result in results]
        steps = [msgspec.to_builtins(one) | {"error": one.error} for one in checked]
        everything = {"machine": about, "made": made, "fitted": outcome.fitted, "figures": figures}
        arguments.json.write_text(json.dumps(everything | {"steps": steps, "traces": traces}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Predicted beside measured, and simulated beside live, as Markdown.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "int8"))
    parser.add_argument("--tp", default="1,2", help="numbers of ranks; default 1,2")
    parser.add_argument("--quick", action="store_true", help="a smaller grid, fewer rounds, one short live run")
    parser.add_argument("--points", type=int, help="that are predicted, in all; default 30, quick 10")
    parser.add_argument("--rounds", type=int, help="visits to each point; default 5, quick 3")
    parser.add_argument("--live", type=int, help="runs of the trace; default 3, quick 1; 0 leaves it out")
    parser.add_argument("--live-minutes", type=float, default=5.0, help="after which no further live run begins")
    parser.add_argument("--requests", type=int, help="of the trace; default 80, quick 25")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=10.0, help="seconds to wait for a quiet machine, each time")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the calibration too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    arguments = parser.parse_args()
    for name, full, quick in (("points", 30, 10), ("rounds", 5, 3), ("live", 3, 1), ("requests", 80, 25)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, quick if arguments.quick else full)
    return arguments


if __name__ == "__main__":
    main()
