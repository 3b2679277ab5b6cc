"""What is asked, and when: fixed before a run begins, so that a slow server cannot slow down the load that it gets."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True)
class Arrival:
    at: float
    """Seconds from the beginning of the run: the intended send."""
    num_prompt: int
    num_output: int
    num_shared: int = 0
    """Tokens at the beginning of the prompt that are those of all other prompts."""


@dataclass(frozen=True)
class Phase:
    """A stretch of constant load."""

    seconds: float
    rate: float
    """Requests a second, on average."""


def poisson(phases: Sequence[Phase], num_prompt: int, num_output: int, seed: int) -> list[Arrival]:
    """Independent arrivals at each phase's rate, one phase after another."""
    draw = random.Random(seed)
    arrivals, began = [], 0.0
    for phase in phases:
        at = began + draw.expovariate(phase.rate)
        while at < began + phase.seconds:
            arrivals.append(Arrival(at, num_prompt, num_output))
            at += draw.expovariate(phase.rate)
        began += phase.seconds
    return arrivals


def from_trace(path: Path, *, speed: float = 1.0, limit: int | None = None) -> list[Arrival]:
    """An Azure trace (CSV: TIMESTAMP, ContextTokens, GeneratedTokens) or a Mooncake trace (JSON lines: timestamp in
    milliseconds, input_length, output_length; beside what Mooncake has, shared_length may say how much of the prompt
    all have in common), `speed` times as fast as it was recorded.
    """
    with path.open(encoding="utf-8-sig") as file:
        if path.suffix == ".jsonl":
            rows = [
                (r["timestamp"] / 1e3, r["input_length"], r["output_length"], r.get("shared_length", 0))
                for r in map(json.loads, file)
            ]
        else:
            rows = [
                # Seven decimals of a second are one more than `fromisoformat` of Python 3.11 is sure to take.
                (
                    datetime.fromisoformat(r["TIMESTAMP"][:26]).timestamp(),
                    int(r["ContextTokens"]),
                    int(r["GeneratedTokens"]),
                    0,
                )
                for r in csv.DictReader(file)
            ]
    rows.sort()
    first = rows[0][0]
    return [
        Arrival((at - first) / speed, prompt, max(1, output), shared) for at, prompt, output, shared in rows[:limit]
    ]


def to_trace(arrivals: Sequence[Arrival], path: Path) -> None:
    """As JSON lines that `from_trace` reads."""
    with path.open("w", encoding="utf-8") as file:
        for a in arrivals:
            row = {"timestamp": a.at * 1e3, "input_length": a.num_prompt, "output_length": a.num_output}
            file.write(json.dumps(row | {"shared_length": a.num_shared}) + "\n")
