"""The Pareto front: setups that no other beats in cost, TTFT, ITL and throughput at once.

The closed form says which may be on it; of an even choice of those the event loop says what is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import TypeVar

import msgspec

from shoal.plan.candidates import engines_that_fit
from shoal.plan.engines import SLACK, Engine
from shoal.plan.screen import Load
from shoal.plan.search import Candidate, Search
from shoal.plan.setups import Verdict

MOST = 5
"""Setups that are shown, evenly over cost."""
Item = TypeVar("Item")
Marks = tuple[float, float, float, float]
"""Cost, TTFT p99, ITL p99, and requests a second, negative: less is better."""


class _Screened(msgspec.Struct, frozen=True, kw_only=True):
    engine: Engine
    replicas: int
    load: Load
    """An engine's, at the asked rate."""

    def marks(self, search: Search) -> Marks:
        cost = search.cost(self.replicas * self.engine.choice.shape.devices)
        return cost, self.load.ttft_p99, self.load.itl_p99, -self.engine.capacity * self.replicas


def front(search: Search, known: list[Verdict]) -> list[Verdict]:
    """The cheapest first, among them those of `known` (looked at closely) that no other beats."""
    screened = [one for engine in search.engines for one in _screened(search, engine)]
    judged: list[tuple[Candidate, Verdict]] = []
    setups = {one.setup for one in known}
    for one in thinned(unbeaten(screened, lambda one: one.marks(search)), MOST):
        load = one.engine.curve.best(search.goal.targets, SLACK) or one.load
        candidate = search.candidate(one.engine, one.replicas, load)
        if search.setup(candidate) not in setups and (made := search.judge(candidate)) is not None:
            judged.append((candidate, made))
    # What the closed form takes for equal often is not: only what is still on the front is asked what it carries.
    left = unbeaten(judged, lambda pair: _marks(pair[1], pair[0].engine.capacity * pair[0].replicas))
    found = [*known, *(search.carried(candidate, one) for candidate, one in left)]
    return unbeaten(found, lambda one: _marks(one, one.capacity or 0.0))


def _screened(search: Search, engine: Engine) -> list[_Screened]:
    """As few engines as sustain the rate, and twice as many."""
    loads, rate, cluster = engine.curve.loads, search.goal.demand.rate, search.goal.cluster
    if len(loads) < 2:
        return []
    fits = engines_that_fit(engine.choice.shape.devices, cluster)
    least = max(1, ceil(rate / loads[-1].rate - 1e-9))
    return [
        _Screened(engine=engine, replicas=replicas, load=load)
        for replicas in (least, 2 * least)
        if replicas <= fits and (load := engine.curve.at(rate / replicas)) is not None
    ]


def _marks(one: Verdict, capacity: float) -> Marks:
    prediction = one.prediction
    return one.setup.cost, prediction.ttft_p99.value, prediction.itl_p99.value, -capacity


def unbeaten(items: list[Item], marks: Callable[[Item], Marks]) -> list[Item]:
    """In the order of their marks."""
    best: list[tuple[Marks, Item]] = []
    for own, one in sorted(((_rounded(marks(one)), one) for one in items), key=lambda pair: pair[0]):
        if not any(all(a <= b for a, b in zip(other, own, strict=True)) for other, _ in best):
            best.append((own, one))
    return [one for _, one in best]


def _rounded(marks: Marks) -> Marks:
    """So that no tenth of a percent keeps a setup on the front."""
    cost, *others = marks
    ttft, itl, rate = (float(f"{value:.2g}") for value in others)
    return cost, ttft, itl, rate


def thinned(items: list[Item], most: int) -> list[Item]:
    """So many of them, evenly."""
    if len(items) <= most:
        return items
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]
