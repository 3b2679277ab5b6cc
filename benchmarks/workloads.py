"""The four workloads: random token ids, fixed by seed, so that every engine computes exactly the same thing.

Lengths and ids come from one generator, in this order: 64 prompt lengths in 32..512, 64 output lengths in 32..256, the
ids of those 64 prompts, 128 ids for (a), 2,048 ids for (d). Bounds are inclusive.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

SEED = 1234
FIRST_TOKEN_ID = 17
"""Ids below are SmolLM2's control tokens, which an engine might treat as such."""


@dataclass(frozen=True)
class WorkItem:
    """One request: greedy, ends after `max_tokens` tokens whatever they are."""

    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    name: str
    description: str
    items: list[WorkItem]

    @property
    def num_output_tokens(self) -> int:
        return sum(item.max_tokens for item in self.items)

    def as_message(self) -> list[dict[str, Any]]:
        """What goes to an engine's runner."""
        return [asdict(item) for item in self.items]


def make_workloads(vocab_size: int) -> dict[str, Workload]:
    """By name, in the order in which a round runs them."""
    rng = np.random.default_rng(SEED)
    prompt_lens = rng.integers(32, 513, 64)
    output_lens = rng.integers(32, 257, 64)

    def prompt(length: int) -> list[int]:
        return [int(i) for i in rng.integers(FIRST_TOKEN_ID, vocab_size, length)]

    mixed = [WorkItem(prompt(int(n)), int(m)) for n, m in zip(prompt_lens, output_lens, strict=True)]
    single, long = WorkItem(prompt(128), 128), WorkItem(prompt(2048), 16)
    return {
        workload.name: workload
        for workload in (
            Workload("a", "1 request, 128 in, 128 out", [single]),
            Workload("b", "16 at once, 32-512 in, 32-256 out", mixed[:16]),
            Workload("c", "64 at once, 32-512 in, 32-256 out", mixed),
            Workload("d", "1 request, 2,048 in, 16 out", [long]),
        )
    }
