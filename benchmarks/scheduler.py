"""Time that the scheduler takes for a step: plan and commit, with 64 sequences and no model.

    python benchmarks/scheduler.py

The results that it commits are made up, so nothing else is measured. Target: under 0.3 ms a step.

Three mixes, each at 64 running sequences:
- decode: all past their prompts, a token each, which is what most steps are;
- mixed: new ones arrive as others end, so chunks of prompts run beside decodes;
- pressure: the KV cache holds less than half of what 64 sequences need, so they wait for blocks and some are preempted.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import machine
from shoal.core.config import SchedulerConfig
from shoal.core.engine_core import EngineCore
from shoal.core.types import Request, Sampled, Sampling, StepPlan, StepResult

NUM_SEQUENCES = 64
VOCAB_SIZE = 49152
BLOCK_SIZE = 16
TARGET_MS = 0.3


@dataclass(frozen=True)
class Mix:
    name: str
    prompt_lens: tuple[int, int]
    """Inclusive range, tokens."""
    output_lens: tuple[int, int]
    num_blocks: int
    warm_up_steps: int
    """Not counted: until the mix is what its name says."""


MIXES = (
    Mix("decode", (32, 512), (4000, 4000), 24_000, 120),
    Mix("mixed", (32, 512), (32, 256), 4_000, 120),
    Mix("pressure", (32, 512), (32, 256), 700, 120),
)


def requests(mix: Mix) -> Iterator[Request]:
    """Endless, the same in every run."""
    rng = random.Random(mix.name)
    number = 0
    while True:
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(*mix.prompt_lens))]
        yield Request(
            id=str(number), prompt=prompt, max_tokens=rng.randint(*mix.output_lens), sampling=Sampling(temperature=0.0)
        )
        number += 1


def made_up_result(plan: StepPlan) -> StepResult:
    """A token for each row that draws one; which token does not matter to the scheduler."""
    return StepResult(plan.plan_id, [Sampled(row.slot, row.start % VOCAB_SIZE) for row in plan.rows if row.sample])


@dataclass
class Timings:
    plan_ms: list[float]
    commit_ms: list[float]
    num_rows: list[int]
    preemptions: int

    @property
    def step_ms(self) -> list[float]:
        return [plan + commit for plan, commit in zip(self.plan_ms, self.commit_ms, strict=True)]


def measure(mix: Mix, steps: int) -> Timings:
    """Milliseconds of each plan and commit, over `steps` steps behind the warm-up."""
    core = EngineCore(
        SchedulerConfig(
            num_blocks=mix.num_blocks,
            max_len=8192,
            vocab_size=VOCAB_SIZE,
            block_size=BLOCK_SIZE,
            max_sequences=NUM_SEQUENCES,
        )
    )
    source = requests(mix)
    timings = Timings([], [], [], 0)
    for step in range(mix.warm_up_steps + steps):
        load = core.load()
        for _ in range(NUM_SEQUENCES - load.num_running - load.num_waiting):
            rejected = core.add(next(source), float(step))
            if rejected is not None:
                raise RuntimeError(f"{mix.name}: a request was rejected: {rejected.reason}")
        began = time.perf_counter()
        plan = core.plan(float(step))
        planned = time.perf_counter()
        if plan is None:
            raise RuntimeError(f"{mix.name}: no step was planned though there is work")
        result = made_up_result(plan)
        commit_began = time.perf_counter()
        core.commit(plan.plan_id, result, float(step))
        committed = time.perf_counter()
        if step >= mix.warm_up_steps:
            timings.plan_ms.append((planned - began) * 1e3)
            timings.commit_ms.append((committed - commit_began) * 1e3)
            timings.num_rows.append(len(plan.rows))
        else:
            timings.preemptions = -core.load().preemptions
    timings.preemptions += core.load().preemptions
    core.check()
    return timings


def row(mix: Mix, timings: Timings) -> str:
    step_ms = sorted(timings.step_ms)
    median = statistics.median(step_ms)
    cells = [
        mix.name,
        f"{statistics.mean(timings.num_rows):.0f}",
        f"{timings.preemptions}",
        f"{statistics.median(timings.plan_ms):.3f}",
        f"{statistics.median(timings.commit_ms):.3f}",
        f"{median:.3f}",
        f"{step_ms[int(0.99 * len(step_ms))]:.3f}",
        "yes" if median < TARGET_MS else "**no**",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of the scheduler's part of a step at 64 sequences.")
    parser.add_argument("--steps", type=int, default=2000, help="counted steps of each mix; default 2000")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    facts = machine.describe()
    print(f"{facts['cpu']}, Python {facts['python']}, {arguments.steps} steps of each mix; milliseconds\n")
    print("| mix | rows a step | preemptions | plan p50 | commit p50 | step p50 | step p99 | p50 under 0.3 ms |")
    print("|" + " --- |" * 8)
    for mix in MIXES:
        print(row(mix, measure(mix, arguments.steps)), flush=True)


if __name__ == "__main__":
    main()
