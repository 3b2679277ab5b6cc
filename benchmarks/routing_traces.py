"""Traces for `routing.py`: public ones read from files, and two made up. Each is a list of arrivals, fixed by seed."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from shoal.core.hashing import block_hash, root_hash
from shoal.sim.law import StepTime
from shoal.sim.requests import Arrival

BLOCK_SIZE = 128
"""Of the engines and of the router's view of prompts."""
MOONCAKE_BLOCK = 512
LIMIT = 4096
"""What clients allow: `max_tokens` of every request."""

Drawn = tuple[float, list[tuple[int, int]], int]
"""Seconds, the prompt as runs of (token id, times), tokens of output."""


def mooncake(file: str) -> Callable[[Path, random.Random, int], list[Drawn]]:
    """A window of the trace: prompts share blocks as they did in production."""

    def read(folder: Path, rng: random.Random, count: int) -> list[Drawn]:
        lines = (folder / file).read_text(encoding="utf-8").splitlines()
        begin = rng.randrange(max(len(lines) - count, 0) + 1)
        rows = [json.loads(line) for line in lines[begin : begin + count]]
        drawn = []
        for row in rows:
            last = row["input_length"] - MOONCAKE_BLOCK * (len(row["hash_ids"]) - 1)
            runs = [(number + 2, MOONCAKE_BLOCK) for number in row["hash_ids"]]
            runs[-1] = (runs[-1][0], max(last, 1))
            drawn.append((row["timestamp"] / 1000, runs, row["output_length"]))
        return drawn

    return read


def azure(file: str) -> Callable[[Path, random.Random, int], list[Drawn]]:
    """A window of the trace: it tells lengths only, so no two prompts share anything."""

    def read(folder: Path, rng: random.Random, count: int) -> list[Drawn]:
        with (folder / file).open(encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        begin = rng.randrange(max(len(rows) - count, 0) + 1)
        drawn: list[Drawn] = []
        for number, row in enumerate(rows[begin : begin + count]):
            at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            drawn.append((at, [(number + 2, max(int(row["ContextTokens"]), 1))], int(row["GeneratedTokens"])))
        return drawn

    return read


def skewed(folder: Path, rng: random.Random, count: int) -> list[Drawn]:
    """Short prompts, and one of 200 of 32k tokens; Poisson arrivals. Which one is drawn: at equal distances, all would
    go to a few of the endpoints that are taken in turn."""
    drawn: list[Drawn] = []
    at, long = 0.0, 0
    for number in range(count):
        at += rng.expovariate(1.0)
        if number % 200 == 0:
            long = number + rng.randrange(200)
        length = 32_768 if number == long else min(max(round(rng.lognormvariate(6, 0.8)), 8), 4096)
        drawn.append((at, [(number + 2, length)], min(max(round(rng.lognormvariate(5, 0.8)), 1), 2048)))
    return drawn


def system_prompt(folder: Path, rng: random.Random, count: int) -> list[Drawn]:
    """Four in five prompts begin with the same 4,096 tokens; Poisson arrivals."""
    drawn: list[Drawn] = []
    at = 0.0
    for number in range(count):
        at += rng.expovariate(1.0)
        runs = [(number + 2, min(max(round(rng.lognormvariate(5.5, 0.8)), 8), 4096))]
        if rng.random() < 0.8:
            runs.insert(0, (1, 4096))
        drawn.append((at, runs, min(max(round(rng.lognormvariate(5, 0.8)), 1), 2048)))
    return drawn


TRACES: dict[str, Callable[[Path, random.Random, int], list[Drawn]]] = {
    "skewed": skewed,
    "system prompt": system_prompt,
    "Mooncake conversation": mooncake("mooncake_conversation_trace.jsonl"),
    "Mooncake synthetic": mooncake("mooncake_synthetic_trace.jsonl"),
    "Azure conversation": azure("AzureLLMInferenceTrace_conv.csv"),
    "Azure code": azure("AzureLLMInferenceTrace_code.csv"),
}


def load(name: str, folder: Path, seed: int, count: int, replicas: int, load: float, step: StepTime) -> list[Arrival]:
    """The trace, its clock scaled so that the fleet does `load` of what it could if every step had 16 sequences and
    nothing were cached."""
    drawn = TRACES[name](folder, random.Random(seed), count)
    seconds = sum(_seconds(sum(times for _, times in runs), output, step) for _, runs, output in drawn)
    first, last = drawn[0][0], drawn[-1][0]
    scale = seconds / (replicas * load * (last - first))
    hashes: dict[tuple[bytes, tuple[int, ...]], bytes] = {}
    return [
        Arrival(
            id=str(number),
            at=(at - first) * scale,
            runs=tuple(runs),
            num_output=max(output, 1),
            limit=max(LIMIT, output),
            blocks=_blocks(runs, hashes),
        )
        for number, (at, runs, output) in enumerate(drawn)
    ]


def _seconds(num_prompt: int, num_output: int, step: StepTime) -> float:
    decode = step.base / 16 + step.sequence + step.kv_token * (num_prompt + num_output / 2)
    return num_prompt * step.prefill_token + num_output * decode


def _blocks(runs: list[tuple[int, int]], hashes: dict[tuple[bytes, tuple[int, ...]], bytes]) -> tuple[bytes, ...]:
    """As `hashing.chain`, with what prompts share hashed once."""
    tokens: list[int] = []
    for token, times in runs:
        tokens += [token] * times
    blocks, parent = [], root_hash("")
    for end in range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE):
        key = (parent, tuple(tokens[end - BLOCK_SIZE : end]))
        parent = hashes.get(key) or hashes.setdefault(key, block_hash(*key))
        blocks.append(parent)
    return tuple(blocks)
