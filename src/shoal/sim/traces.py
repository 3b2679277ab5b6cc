"""From traces, or from made-up lengths, to the arrivals of a simulation."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from math import log, sqrt

from shoal.core.request_trace import BLOCK_TOKENS, TraceError, TraceRow
from shoal.sim.requests import Arrival

FIRST_TOKEN = 16
"""Ids below are not used for prompts: what is drawn is one of them."""


def arrivals(
    rows: Sequence[TraceRow],
    rng: random.Random,
    *,
    rate: float | None = None,
    repeat: int = 1,
    limit: int | None = None,
    prefix: int = 0,
) -> list[Arrival]:
    """Requests of a trace. `repeat`: so many copies lie over one another, each moved by a random part of the trace's
    length, and none shares prompts with another. `rate`: requests a second, of all copies together; a trace without
    times has Poisson arrivals at it, the clock of one with times is scaled to it. `limit`: what clients allow as
    output; None is twice what comes. `prefix`: so many tokens at the beginning of every prompt are the same.
    """
    if rate is not None and not rate > 0:
        raise TraceError(f"the rate must be above 0, got {rate:g}")
    if prefix and any(row.blocks for row in rows):
        raise TraceError("the trace says itself which prompts begin alike: leave --prefix")
    times = _times(rows, rng, None if rate is None else rate / repeat)
    span = times[-1] * len(rows) / max(len(rows) - 1, 1) if times else 0.0
    names = _names(rows)
    made = []
    for copy in range(repeat):
        moved = rng.random() * span if copy else 0.0
        for number, (row, time) in enumerate(zip(rows, times, strict=True)):
            own = copy * len(rows) + number
            at = time + moved
            made.append(
                Arrival(
                    id=f"{own}",
                    at=at - span if at >= span > 0 else at,
                    runs=_runs(
                        row, own + repeat * len(names), [copy * len(names) + names[b] for b in row.blocks], prefix
                    ),
                    num_output=row.num_output,
                    limit=max(row.num_output, limit or 2 * row.num_output),
                    blocks=None,
                )
            )
    return sorted(made, key=lambda arrival: arrival.at)


def _times(rows: Sequence[TraceRow], rng: random.Random, rate: float | None) -> list[float]:
    if any(row.at is None for row in rows):
        if rate is None:
            raise TraceError("the trace tells lengths only: give the rate of arrivals with --rate")
        at, times = 0.0, []
        for _ in rows:
            at += rng.expovariate(rate)
            times.append(at)
        return times
    times = [row.at or 0.0 for row in rows]
    if rate is None:
        return times
    if times[-1] <= 0.0:
        raise TraceError("all requests of the trace come at one time: there is no rate to scale")
    factor = (len(rows) - 1) / times[-1] / rate
    return [time * factor for time in times]


def _names(rows: Sequence[TraceRow]) -> dict[int, int]:
    """Of blocks, numbered as they come: what stands in a trace may be larger than any token id."""
    names: dict[int, int] = {}
    for row in rows:
        for block in row.blocks:
            names.setdefault(block, len(names))
    return names


def _runs(row: TraceRow, own: int, blocks: Sequence[int], prefix: int) -> tuple[tuple[int, int], ...]:
    """The prompt, of tokens that stand for what is known of it: a common prefix, then blocks, or what nobody shares."""
    if blocks:
        lengths = [BLOCK_TOKENS] * (len(blocks) - 1) + [row.num_prompt - BLOCK_TOKENS * (len(blocks) - 1)]
        return tuple((FIRST_TOKEN + 1 + name, length) for name, length in zip(blocks, lengths, strict=True))
    shared = min(prefix, row.num_prompt)
    runs = ((FIRST_TOKEN, shared), (FIRST_TOKEN + 1 + own, row.num_prompt - shared))
    return tuple((token, times) for token, times in runs if times)


def synthetic(count: int, num_prompt: int, num_output: int, spread: float, rng: random.Random) -> list[TraceRow]:
    """Lengths without times: log-normal with these means, and `spread` as the ratio of deviation to mean."""

    def draw(mean: int) -> Callable[[], int]:
        if spread <= 0:
            return lambda: mean
        sigma = sqrt(log(1 + spread * spread))
        return lambda: max(1, round(rng.lognormvariate(log(mean) - sigma * sigma / 2, sigma)))

    prompt, output = draw(num_prompt), draw(num_output)
    return [TraceRow(number, None, prompt(), output()) for number in range(1, count + 1)]
