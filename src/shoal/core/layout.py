"""Layout: how many ranks one engine has along each parallel axis, where each rank stands, and what cannot work.

    tp   tensor     attention heads, MLP features and vocabulary of every layer are split
    pp   pipeline   layers are split into stages
    ep   expert     experts are split; attention and dense layers are tensor-parallel over these ranks too
    cp   context    the KV of every sequence is split
    dp   data       whole engines beside each other

A rank's number counts tp fastest, then ep, cp, pp: neighbours talk most, so they should be near each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import log2
from typing import Literal

import msgspec

from shoal.core.model_spec import ModelSpec

Axis = Literal["tensor", "expert", "context", "pipeline"]


class LayoutError(ValueError):
    """The layout cannot run this model here. The message says why and names layouts that can."""


class Place(msgspec.Struct, frozen=True):
    """Where a rank stands along each axis of its engine."""

    tp: int
    ep: int
    cp: int
    pp: int


class Layout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tp: int = 1
    pp: int = 1
    ep: int = 1
    cp: int = 1
    dp: int = 1

    @property
    def tensor_ranks(self) -> int:
        """Ranks that split heads, dense MLPs and the vocabulary among them."""
        return self.tp * self.ep

    @property
    def ranks(self) -> int:
        """Of one engine."""
        return self.tp * self.ep * self.cp * self.pp

    def place(self, rank: int) -> Place:
        rest, tp = divmod(rank, self.tp)
        rest, ep = divmod(rest, self.ep)
        pp, cp = divmod(rest, self.cp)
        return Place(tp, ep, cp, pp)

    def rank(self, place: Place) -> int:
        return ((place.pp * self.cp + place.cp) * self.ep + place.ep) * self.tp + place.tp

    def group(self, rank: int, axis: Axis) -> list[int]:
        """The ranks that share everything with this one but their place along the axis, in order.

        `tensor` runs over tp and ep together: those ranks hold parts of the same layers.
        """
        free = {"tensor": ("tp", "ep"), "expert": ("ep",), "context": ("cp",), "pipeline": ("pp",)}[axis]
        own = self.place(rank)
        return [
            other
            for other in range(self.ranks)
            if all(getattr(self.place(other), name) == getattr(own, name) for name in _AXES if name not in free)
        ]

    def __str__(self) -> str:
        sizes = [f"{name}{getattr(self, name)}" for name in ("tp", "pp", "ep", "cp", "dp") if getattr(self, name) != 1]
        return " x ".join(sizes) or "tp1"


_AXES = ("tp", "ep", "cp", "pp")


def refusal(layout: Layout, spec: ModelSpec) -> str | None:
    """Why this model cannot run in this layout; None if it can."""
    for name in (*_AXES, "dp"):
        if getattr(layout, name) < 1:
            return f"{name} must be at least 1, got {getattr(layout, name)}"
    ranks = layout.tensor_ranks
    what = f"tp {layout.tp}" if layout.ep == 1 else f"tp {layout.tp} x ep {layout.ep}"
    if ranks > spec.num_heads:
        return f"{what} needs as many attention heads, and the model has {spec.num_heads}"
    group = spec.num_heads // spec.num_kv_heads
    if spec.mla is None and -(-ranks // spec.num_kv_heads) > group:
        return (
            f"{what}: each of the {spec.num_kv_heads} key/value heads would be needed by "
            f"{-(-ranks // spec.num_kv_heads)} ranks, and only {group} query heads share one"
        )
    if ranks > min(spec.intermediate_size, spec.vocab_size):
        return f"{what} is more than the model's MLP features or vocabulary"
    if layout.pp > spec.num_layers:
        return f"pp {layout.pp} is more stages than the model has layers ({spec.num_layers})"
    if layout.ep > 1:
        if spec.moe is None:
            return f"ep {layout.ep} splits experts, and {spec.family} has none"
        if spec.moe.num_experts % layout.ep:
            return f"ep {layout.ep} does not divide the model's {spec.moe.num_experts} experts"
    if spec.moe is not None and layout.tp > spec.moe.expert_intermediate_size:
        return f"tp {layout.tp} is more than an expert's {spec.moe.expert_intermediate_size} features"
    return None


def require_possible(layout: Layout, spec: ModelSpec, num_devices: int | None = None) -> None:
    """Raise LayoutError unless the model can run so. `num_devices` None is no limit (CPU ranks share cores)."""
    reason = refusal(layout, spec)
    if reason is None and num_devices is not None and layout.ranks * layout.dp > num_devices:
        reason = f"{layout} needs {layout.ranks * layout.dp} devices, and {num_devices} are there"
    if reason is None:
        return
    near = nearest(layout, spec, num_devices)
    raise LayoutError(f"{reason}; layouts that work: {', '.join(map(str, near))}")


def nearest(layout: Layout, spec: ModelSpec, num_devices: int | None = None, count: int = 3) -> list[Layout]:
    """Layouts that work, nearest first: by how much the number of ranks changes, then each axis (in powers of two)."""

    def distance(other: Layout) -> tuple[float, float]:
        axes = sum(abs(log2(getattr(other, name) / max(1, getattr(layout, name)))) for name in _AXES)
        return abs(log2(other.ranks * other.dp / max(1, layout.ranks * layout.dp))), axes

    works = [
        other
        for other in _candidates(layout)
        if refusal(other, spec) is None and (num_devices is None or other.ranks * other.dp <= num_devices)
    ]
    return sorted(works, key=distance)[:count] or [Layout()]


def _candidates(layout: Layout) -> Iterator[Layout]:
    """Every axis up to what was asked for, or 8; axes that were not asked for stay at 1 but for tp and pp."""
    most = max(1, min(64, max(layout.tp, layout.pp, layout.ep, layout.cp)))
    sizes = range(1, most + 1)
    eps = sizes if layout.ep > 1 else (1,)
    cps = (1, layout.cp) if layout.cp > 1 else (1,)
    ranks = max(1, layout.ranks)
    for tp, pp, ep, cp in product(sizes, sizes, eps, cps):
        if tp * pp * ep * cp <= ranks:
            yield Layout(tp=tp, pp=pp, ep=ep, cp=cp, dp=max(1, layout.dp))
