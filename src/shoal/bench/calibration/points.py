"""Step shapes to time: a small grid that constants are fitted to, and points between them that are only predicted."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import msgspec

from shoal.core.cost.types import StepShape
from shoal.core.types import Row


class StepPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A mixed step: `decodes` sequences of `context` cached tokens each decode one, and `prompts` prompts get `chunk`
    tokens each behind `behind` that are cached. Either part may be absent (0)."""

    decodes: int = 0
    context: int = 0
    chunk: int = 0
    behind: int = 0
    prompts: int = 1
    """Where chunk is above 0. In a grid of points it is 1."""

    def shape(self) -> StepShape:
        n, prompts = self.chunk, self.prompts if self.chunk else 0
        return StepShape(
            prefill_tokens=prompts * n,
            prefill_rows=prompts,
            prefill_pairs=prompts * n * (self.behind + (n + 1) / 2),
            prefill_context=prompts * (self.behind + n),
            decode_rows=self.decodes,
            decode_context=self.decodes * (self.context + 1),
            sampled=self.decodes + prompts,
        )

    def rows(self) -> list[Row]:
        """Prompts have the first slots; the sequences that decode have those behind them."""
        rows = [Row(self.prompts + number, self.context, 1, True, []) for number in range(self.decodes)]
        prompts = [Row(number, self.behind, self.chunk, True, []) for number in range(self.prompts)]
        return rows + prompts if self.chunk else rows

    def needs(self) -> list[int]:
        """Tokens of KV that each slot must have room for, slot 0 first."""
        return [self.behind + self.chunk] * self.prompts + [self.context + 1] * self.decodes

    def __str__(self) -> str:
        parts = [f"{self.decodes} decode at {self.context}"] if self.decodes else []
        times = f"{self.prompts} x " if self.prompts > 1 else ""
        parts += [f"{times}{self.chunk} tokens behind {self.behind}"] if self.chunk else []
        return " + ".join(parts)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Of the engine that is timed."""

    max_len: int
    max_sequences: int
    max_batch_tokens: int
    cache_tokens: int

    def allow(self, point: StepPoint) -> bool:
        return (
            max(point.needs()) < self.max_len
            and len(point.needs()) <= self.max_sequences
            and point.prompts * point.chunk + point.decodes <= self.max_batch_tokens
            and sum(point.needs()) <= self.cache_tokens
        )


_DECODES = ((1, 32), (1, 1500), (2, 400), (4, 60), (4, 1000), (8, 300), (16, 40), (16, 500), (32, 60), (32, 300))
_CHUNKS = ((16, 0), (48, 300), (128, 0), (128, 1500), (256, 500), (512, 0), (512, 1400))
_MIXED = ((4, 300, 64, 200), (8, 500, 256, 0), (24, 200, 480, 500))
_QUICK = (0, 1, 4, 7, 9, 10, 12, 15, 16, 18)


def grid(limits: Limits, *, quick: bool = False) -> list[StepPoint]:
    """What is fitted to: decode, prefill and both, from the smallest step to the largest that the engine runs."""
    points = [StepPoint(decodes=rows, context=context) for rows, context in _DECODES]
    points += [StepPoint(chunk=chunk, behind=behind) for chunk, behind in _CHUNKS]
    points += [StepPoint(decodes=d, context=c, chunk=n, behind=b) for d, c, n, b in _MIXED]
    if quick:
        points = [points[number] for number in _QUICK]
    return [point for point in points if limits.allow(point)]


def held_out(limits: Limits, count: int, seed: int = 0, among: Iterable[StepPoint] = ()) -> list[StepPoint]:
    """Points of their own: a third each decode, prefill and both, sizes log-uniform. None is one of `among`."""
    draw, taken = random.Random(seed), set(among)
    points: list[StepPoint] = []
    longest = min(limits.max_len, 2048) - 1

    def between(low: int, high: int) -> int:
        return round(math.exp(draw.uniform(math.log(low), math.log(max(low, high)))))

    for _ in range(1000 * count):
        if len(points) == count:
            break
        kind = len(points) % 3
        decodes = 0 if kind == 1 else between(1, min(32, limits.max_sequences - 1))
        chunk = 0 if kind == 0 else between(12, limits.max_batch_tokens - 32)
        context = between(24, min(longest, 12_000 // decodes)) if decodes else 0
        behind = draw.choice((0, between(16, longest))) if chunk else 0
        point = StepPoint(decodes=decodes, context=context, chunk=chunk, behind=behind)
        if limits.allow(point) and point not in taken:
            taken.add(point)
            points.append(point)
    return points
