"""How fast the simulator is, and how near to logs of a real engine.

    python benchmarks/simulator.py                    speed: tokens a second of one core; an hour of 1,024 GPUs
    python benchmarks/simulator.py --logs FOLDER      accuracy against per-request logs of vLLM

The first simulates the public Azure conversation trace (an hour, 19,366 requests) where SHOAL_DATA or --traces has it,
and a Poisson process with its rate and mean lengths where not. Logs are `NAME.requests.jsonl` with `NAME.meta.json`
beside it, which says what engine it was; nothing is fitted to them.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shoal.cli.simulation import REPORT_SECONDS
from shoal.cli.trace_file import read_trace
from shoal.core.config import SchedulerConfig
from shoal.core.cost.model import CostModel
from shoal.core.cost.types import EngineShape
from shoal.core.layout import Layout
from shoal.core.router import Router, RoutingConfig
from shoal.plan.catalogue import cluster
from shoal.plan.models import model_shape
from shoal.sim import traces
from shoal.sim.fleet_simulation import FleetSimulation
from shoal.sim.gateway import Rules
from shoal.sim.histogram import percentile
from shoal.sim.law import remembered
from shoal.sim.requests import Arrival, Outcome

ROOT = Path(__file__).parents[1]
CONVERSATION = "AzureLLMInferenceTrace_conv.csv"
LIMITS = {"TPOT p50": 0.08, "TTFT p50": 0.15, "E2E p99": 0.20}
"""By how much a simulation may be off."""


@dataclass(frozen=True)
class Scene:
    name: str
    model: str
    cluster: str
    layout: Layout
    weights: str
    replicas: int


BUSY = Scene("8 x Llama-3.1-8B, all busy", "llama-3.1-8b", "8xH100", Layout(), "bfloat16", 8)
LARGE = Scene("1,024 H100: 128 x Llama-3.1-405B tp8", "llama-3.1-405b", "128x8xH100:ndr", Layout(tp=8), "float8", 128)


def simulation(scene: Scene, arrivals: list[Arrival]) -> FleetSimulation:
    shape = EngineShape(
        model=model_shape(scene.model),
        cluster=cluster(scene.cluster),
        layout=scene.layout,
        weights=scene.weights,  # type: ignore[arg-type]
    )
    cost = CostModel(shape)
    config = SchedulerConfig(
        num_blocks=cost.memory().cache_tokens // shape.block_size,
        max_len=shape.model.max_len,
        vocab_size=1 << 31,
        block_size=shape.block_size,
        max_sequences=shape.max_sequences,
        max_batch_tokens=shape.max_batch_tokens,
    )
    router = Router(RoutingConfig())
    return FleetSimulation(
        router,
        arrivals,
        scene.replicas,
        config,
        remembered(cost.seconds),
        rules=Rules(),
        report_interval=REPORT_SECONDS,
        sample_interval=10.0,
    )


def speed(scene: Scene, arrivals: list[Arrival], what: str) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    run = simulation(scene, arrivals)
    outcomes = run.run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = run.gateway.generated_tokens
    steps = sum(replica.totals()[0] for replica in run.replicas.values())
    done = sum(outcome.status == "done" for outcome in outcomes)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cells = [scene.name, what, f"{done:,} of {len(outcomes):,}", f"{tokens:,}", f"{steps:,}", f"{run.now:,.0f}"]
    cells += [f"{wall:,.1f}", f"{cpu:,.1f}", f"{tokens / cpu:,.0f}", f"{cpu / steps * 1e6:.0f}", f"{memory:,.0f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def speeds(folder: Path, repeat: int, seconds: float) -> None:
    print("| fleet | load | completed | tokens | steps | simulated s | wall s | CPU s | tokens/CPU s | us/step | MiB |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    rng = random.Random(0)
    speed(
        BUSY,
        traces.arrivals(traces.synthetic(6000, 1000, 300, 0.5, rng), rng, rate=120.0),
        "120/s of 1,000 + 300 tokens",
    )
    file = folder / CONVERSATION
    if file.exists():
        rows, rate, what = read_trace(file), None, "Azure conversation"
    else:
        rows, rate, what = (
            traces.synthetic(19_366, 1155, 211, 0.8, rng),
            5.53 * repeat,
            "Poisson, as Azure conversation",
        )
    load = [one for one in traces.arrivals(rows, rng, rate=rate, repeat=repeat) if one.at <= seconds]
    speed(LARGE, load, what + (f" x {repeat}" if repeat > 1 else "") + f", first {seconds:,.0f} s")


# --- against logs -----------------------------------------------------------------------------------------------------

DEVICES = {"NVIDIA GeForce RTX 4090": "RTX4090", "NVIDIA H100 80GB HBM3": "H100"}


def against_logs(folder: Path) -> bool:
    """Whether every log is within the limits."""
    print("| log | metric | measured s | simulated s | error | limit |")
    print("|---|---|---|---|---|---|")
    ok = True
    logs = sorted(folder.glob("*.requests.jsonl"))
    if not logs:
        sys.exit(f"{folder} has no *.requests.jsonl")
    for file in logs:
        name = file.name.removesuffix(".requests.jsonl")
        meta = msgspec.json.decode((folder / f"{name}.meta.json").read_bytes())
        ok &= _against_log(name, file, meta)
    return ok


def _against_log(name: str, file: Path, meta: dict[str, Any]) -> bool:
    records = [msgspec.json.decode(line) for line in file.read_bytes().splitlines() if line.strip()]
    outcomes = _replayed(name, file, meta)
    measured = {
        "TTFT": sorted(r["first_token_ts"] - r["queued_ts"] for r in records),
        "TPOT": sorted(
            (r["last_token_ts"] - r["first_token_ts"]) / (r["output_toks"] - 1) for r in records if r["output_toks"] > 1
        ),
        "E2E": sorted(r["last_token_ts"] - r["queued_ts"] for r in records),
    }
    simulated = {
        "TTFT": sorted(o.ttft for o in outcomes if o.ttft is not None),
        "TPOT": sorted(o.tpot for o in outcomes if o.tpot is not None),
        "E2E": sorted(o.e2e for o in outcomes if o.e2e is not None),
    }
    ok = True
    for metric in measured:
        for share in (0.5, 0.9, 0.99):
            was, is_now = percentile(measured[metric], share) or 0.0, percentile(simulated[metric], share) or 0.0
            label = f"{metric} p{share * 100:.0f}"
            error, limit = is_now / was - 1, LIMITS.get(label)
            verdict = "" if limit is None else f"{limit:.0%}: {'met' if abs(error) <= limit else 'MISSED'}"
            ok &= limit is None or abs(error) <= limit
            print(f"| {name} | {label} | {was:.4f} | {is_now:.4f} | {error:+.1%} | {verdict} |")
    return ok


def _replayed(name: str, file: Path, meta: dict[str, Any]) -> list[Outcome]:
    """One engine as the log's settings describe it, in front of the log's own arrivals. Times of the log begin where
    the engine queued a request, so there is no front end."""
    settings = meta["engine_kwargs"]
    device = DEVICES.get(meta.get("hardware", {}).get("device_name", ""), name.split("_")[0])
    layout = Layout(tp=settings["tensor_parallel_size"])
    shape = EngineShape(
        model=model_shape(settings["model"]),
        cluster=cluster(f"{layout.ranks}x{device}"),
        layout=layout,
        profile="vllm",
        max_batch_tokens=settings["max_num_batched_tokens"],
        max_sequences=settings["max_num_seqs"],
    )
    cost = CostModel(shape)
    # Where the log tells how many blocks there were, timing alone is judged.
    num_blocks = meta.get("kv_cache", {}).get("num_gpu_blocks") or cost.memory().cache_tokens // shape.block_size
    config = SchedulerConfig(
        num_blocks=num_blocks,
        max_len=min(settings["max_model_len"] or shape.model.max_len, num_blocks * shape.block_size),
        vocab_size=1 << 31,
        block_size=shape.block_size,
        max_sequences=shape.max_sequences,
        max_batch_tokens=shape.max_batch_tokens,
        depth=2,  # asynchronous scheduling, vLLM's default
    )
    load = traces.arrivals(read_trace(file), random.Random(0))
    return FleetSimulation(Router(RoutingConfig()), load, 1, config, cost.seconds).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="compare with these request logs instead")
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="where the public traces are")
    parser.add_argument("--repeat", type=int, default=1, help="copies of the trace over one another")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of the trace")
    options = parser.parse_args()
    if options.logs is not None:
        sys.exit(0 if against_logs(options.logs) else 1)
    data = Path(os.environ.get("SHOAL_DATA", ROOT.parent / "shared"))
    speeds(options.traces or data / "traces", options.repeat, options.seconds)


if __name__ == "__main__":
    main()
