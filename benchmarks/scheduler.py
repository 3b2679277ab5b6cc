"""Time that the scheduler takes a step: plan and commit of 64 decoding sequences, and of a step that mixes prefill in.

    python benchmarks/scheduler.py

No model: the result of each step is made up, its making is not timed. A step of 64 sequences of the built-in model
takes about 100 ms on two cores, so this is what the Python around it costs.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from shoal.core.config import SchedulerConfig
from shoal.core.engine_core import EngineCore
from shoal.core.types import Request, Sampled, Sampling, StepPlan, StepResult

BLOCK_SIZE = 16
VOCAB_SIZE = 49152
TARGET_MS = 0.3


def measure(num_sequences: int, num_steps: int, *, prefix_caching: bool) -> dict[str, list[float]]:
    """Milliseconds of plan and commit together, by kind of step: `decode` (a token of every sequence), `mixed`."""
    rng = random.Random(0)
    prompt_len, max_len = 256, 256 + num_steps + 64
    core = EngineCore(
        SchedulerConfig(
            num_blocks=2 * num_sequences * max_len // BLOCK_SIZE,
            max_len=max_len,
            vocab_size=VOCAB_SIZE,
            block_size=BLOCK_SIZE,
            max_sequences=num_sequences,
            prefix_caching=prefix_caching,
        )
    )
    for number in range(num_sequences):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(prompt_len)]
        core.add(Request(id=str(number), prompt=prompt, max_tokens=num_steps, sampling=Sampling(temperature=0.0)), 0.0)
    milliseconds: dict[str, list[float]] = {"decode": [], "mixed": []}
    while core.has_work():
        began = time.perf_counter()
        plan = core.plan(0.0)
        planned = time.perf_counter()
        if plan is None:
            raise RuntimeError("the scheduler has work but planned no step")
        result = _made_up(plan, rng)
        committing = time.perf_counter()
        core.commit(plan.plan_id, result, 0.0)
        took = planned - began + time.perf_counter() - committing
        if len(plan.rows) == num_sequences:
            milliseconds["decode" if plan.num_tokens == num_sequences else "mixed"].append(took * 1e3)
        elif plan.num_tokens > len(plan.rows):
            milliseconds["mixed"].append(took * 1e3)
    return milliseconds


def _made_up(plan: StepPlan, rng: random.Random) -> StepResult:
    return StepResult(plan.plan_id, [Sampled(row.slot, rng.randrange(VOCAB_SIZE)) for row in plan.rows if row.sample])


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of the scheduler's plan and commit, as a Markdown table.")
    parser.add_argument("--sequences", type=int, default=64, help="running at once; default 64")
    parser.add_argument("--steps", type=int, default=512, help="decode steps; default 512")
    arguments = parser.parse_args()
    for option in ("sequences", "steps"):
        if getattr(arguments, option) < 2:
            parser.error(f"--{option} must be at least 2, got {getattr(arguments, option)}")
    print(f"Plan and commit of {arguments.sequences} sequences, milliseconds (target {TARGET_MS})\n")
    print("| prefix caching | step | median | p99 | steps |\n| --- | --- | --- | --- | --- |")
    for prefix_caching in (False, True):
        measured = measure(arguments.sequences, arguments.steps, prefix_caching=prefix_caching)
        for kind, values in measured.items():
            p99 = statistics.quantiles(values, n=100)[98] if len(values) > 1 else values[0]
            cached = "on" if prefix_caching else "off"
            print(f"| {cached} | {kind} | {statistics.median(values):.3f} | {p99:.3f} | {len(values)} |")


if __name__ == "__main__":
    main()
