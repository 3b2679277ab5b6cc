"""The ledger of a search: why each family of setups is not the answer, with its number, and what would admit it.

A family is the setups that are split alike (same tp, same other axes, same axes across nodes) and fail for the same
reason; of each the one nearest to being admitted speaks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from shoal.core.cost.types import StepCost
from shoal.core.hardware import Cluster
from shoal.plan.candidates import Shape, crosses_nodes
from shoal.plan.units import show_duration

Reason = Literal[
    "layout", "weights", "cache", "ttft", "itl", "tpot", "rate", "devices", "survive", "budget", "estimate", "larger"
]
ORDER: tuple[Reason, ...] = (
    "larger",
    "estimate",
    "budget",
    "survive",
    "devices",
    "rate",
    "itl",
    "tpot",
    "ttft",
    "cache",
    "weights",
    "layout",
)
"""From those that nearly were the answer to those that could not be."""


class Rejection(msgspec.Struct, frozen=True, kw_only=True):
    family: str
    precision: str
    reason: Reason
    why: str
    """With its number."""
    relaxation: str
    """The nearest change that would admit the setup that speaks; empty where none would."""
    setups: int
    """That were looked at, of this family."""

    def __str__(self) -> str:
        tail = f"; admitted by {self.relaxation}" if self.relaxation else ""
        return f"{self.family} ({self.precision}): {self.why}{tail}"


class _Entry(msgspec.Struct):
    distance: float
    family: str
    precision: str
    reason: Reason
    why: Callable[[], tuple[str, str]]
    setups: int = 1


class Ledger:
    """`distance` says how far a setup is from being admitted, within its reason; of equals the first speaks."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._entries: dict[tuple[object, ...], _Entry] = {}

    def add(
        self,
        reason: Reason,
        shape: Shape,
        precision: str,
        distance: float,
        why: Callable[[], tuple[str, str]],
        kind: str = "",
    ) -> None:
        """`why` gives the reason and the relaxation; it is called only for the setup that speaks."""
        key = (reason, precision, kind, *self._family(shape))
        known = self._entries.get(key)
        if known is None:
            self._entries[key] = _Entry(distance, kind or str(shape), precision, reason, why)
            return
        known.setups += 1
        if distance < known.distance:
            known.distance, known.family, known.why = distance, kind or str(shape), why

    def _family(self, shape: Shape) -> tuple[object, ...]:
        axes = tuple(name for name in ("pp", "ep", "cp", "attention_dp") if getattr(shape, name) > 1)
        return shape.tp, axes, tuple(crosses_nodes(shape, self._cluster))

    def lines(self) -> list[Rejection]:
        """Those nearest to the answer first. A family that failed early and got further in another way is told of
        once, by the way in which it got furthest."""
        furthest: dict[tuple[object, ...], tuple[int, float, tuple[object, ...]]] = {}
        counts: dict[tuple[object, ...], int] = {}
        for key, entry in self._entries.items():
            family = key[1:]
            rank = ORDER.index(entry.reason), entry.distance, key
            counts[family] = counts.get(family, 0) + entry.setups
            if family not in furthest or rank[:2] < furthest[family][:2]:
                furthest[family] = rank
        lines = []
        for family, (_, _, key) in sorted(furthest.items(), key=lambda item: item[1][:2]):
            entry = self._entries[key]
            why, relaxation = entry.why()
            lines.append(
                Rejection(
                    family=entry.family,
                    precision=entry.precision,
                    reason=entry.reason,
                    why=why,
                    relaxation=relaxation,
                    setups=counts[family],
                )
            )
        return lines


def where_time_goes(cost: StepCost, shape: Shape, cluster: Cluster) -> str:
    """The largest part of a step in words, and the network where that is what it is spent on."""
    part = max(cost.parts, key=lambda part: part.seconds)
    share = part.seconds / cost.seconds if cost.seconds else 0.0
    crossing = crosses_nodes(shape, cluster)
    talking = {"tp", "ep", "attention-dp", "cp"} & set(crossing)
    if part.name == "collectives":
        what = _collectives(shape)
        if talking and cluster.network is not None:
            axis = next(name for name in crossing if name in talking)
            size = getattr(shape, axis.replace("-", "_"))
            return (
                f"{axis}={size} crosses nodes: {what} would be {share:.0%} of a decode step over {cluster.network.name}"
            )
        return f"{what} would be {share:.0%} of a decode step over {cluster.scale_up.name}"
    names = {
        "linear": "reading the weights",
        "experts": "the experts",
        "host": "the host's work",
        "kernels": "launches",
    }
    what = names.get(part.name, part.name)
    if part.name == "pipeline":
        what = "passing the other stages"
    return f"{what} is {share:.0%} of a decode step of {show_duration(cost.seconds)}"


def _collectives(shape: Shape) -> str:
    """That ranks of one layer take part in."""
    told = [
        name
        for name, size in (
            ("all-reduce", shape.tp * shape.ep),
            ("all-to-all", shape.ep * shape.attention_dp),
            ("exchanging attention", shape.cp),
        )
        if size > 1
    ]
    return " and ".join(told) or "communication"
