"""Which rank holds which experts of a layer: in order of their numbers, or so that a measured load spreads evenly.

An expert may have copies on several ranks, which then share its rows. `places` are the ranks along the expert axis; the
tensor-parallel ranks of a place hold slices of the same experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import msgspec

from shoal.core.config import EngineConfig
from shoal.core.layout import LayoutError


class Placement(msgspec.Struct, frozen=True):
    """Of one layer."""

    held: tuple[tuple[int, ...], ...]
    """By place: the numbers of its experts, ascending."""

    def copies(self, num_experts: int) -> list[list[tuple[int, int]]]:
        """Of each expert: places that hold it, and its index among what each of them holds."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
        for place, experts in enumerate(self.held):
            for index, expert in enumerate(experts):
                found[expert].append((place, index))
        return found

    def load(self, rows: Sequence[int]) -> list[float]:
        """Of each place, where expert e has rows[e] and its copies share them equally."""
        load = [0.0] * len(self.held)
        for expert, copies in enumerate(self.copies(len(rows))):
            for place, _ in copies:
                load[place] += rows[expert] / len(copies)
        return load


def contiguous(num_experts: int, places: int) -> Placement:
    """No copies, equally many on each; `places` divides the number of experts."""
    each = num_experts // places
    return Placement(tuple(tuple(range(place * each, (place + 1) * each)) for place in range(places)))


def balanced(rows: Sequence[int], places: int, redundant: int) -> Placement:
    """Where expert e has rows[e]; each place has room for its equal share of experts and `redundant` more.

    Greedy, as the balancer that DeepSeek published with V3 (github.com/deepseek-ai/EPLB): the expert with the most rows
    a copy gets the next copy, then the heaviest experts go first, each to the places with the least. Never worse, by
    the busiest place, than the same without copies or than `contiguous`.
    """
    each = len(rows) // places
    candidates = [contiguous(len(rows), places)]
    for spare in (0, redundant):
        candidates.append(_packed(rows, _num_copies(rows, places, places * spare), places, each + spare))
    return min(candidates, key=lambda placement: max(placement.load(rows)))


def _num_copies(rows: Sequence[int], places: int, extra: int) -> list[int]:
    """Of each expert, the first one included. More than one on a place would be of no use."""
    copies = [1] * len(rows)
    heap = [(-float(count), expert) for expert, count in enumerate(rows) if count and places > 1]
    heapify(heap)
    while extra and heap:
        _, expert = heappop(heap)
        copies[expert] += 1
        extra -= 1
        if copies[expert] < places:
            heappush(heap, (-rows[expert] / copies[expert], expert))
    return copies


def _packed(rows: Sequence[int], copies: list[int], places: int, room: int) -> Placement:
    """There is room for all copies together. One that finds only places which have the expert already is left out."""
    held: list[list[int]] = [[] for _ in range(places)]
    load = [0.0] * places
    for expert in sorted(range(len(rows)), key=lambda expert: (-rows[expert] / copies[expert], expert)):
        free = [place for place in range(places) if len(held[place]) < room]
        chosen = sorted(free, key=lambda place: (load[place], len(held[place]), place))[: copies[expert]]
        for place in chosen:
            held[place].append(expert)
            load[place] += rows[expert] / len(chosen)
    return Placement(tuple(tuple(sorted(experts)) for experts in held))


def require_dispatch(config: EngineConfig) -> None:
    """Raise LayoutError for settings of experts that make no sense together."""
    if config.layout.ep == 1:
        for name, unset in (("expert_dispatch", "replicate"), ("redundant_experts", 0), ("expert_load", None)):
            if getattr(config, name) != unset:
                raise LayoutError(f"{name} is for experts on several ranks: set expert parallelism (ep) to 2 or more")
    if config.redundant_experts < 0:
        raise LayoutError(f"redundant_experts must be at least 0, got {config.redundant_experts}")
    if config.redundant_experts and config.expert_dispatch != "all_to_all":
        # Elsewhere ranks' contributions are summed: which copy computes a row would decide in which order it is added.
        raise LayoutError(f"redundant_experts goes with expert_dispatch all_to_all, not with {config.expert_dispatch}")
    if config.redundant_experts and config.expert_load is None:
        raise LayoutError("redundant_experts needs expert_load, a file that says which experts are to have copies")
