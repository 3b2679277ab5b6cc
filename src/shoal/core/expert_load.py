"""What the experts of an engine have computed: counted by its ranks, put together, and read again to place experts.

Rows are tokens times the experts that each visits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from shoal.core.expert_placement import Placement, balanced, contiguous
from shoal.core.model_spec import ModelSpec


class HeldRows(msgspec.Struct, frozen=True, array_like=True):
    """What one rank's experts of one layer have computed since it began to serve."""

    layer: int
    place: int
    """Of the rank, along the expert axis."""
    experts: list[int]
    rows: list[int]
    """Of each of them."""


class LayerLoad(msgspec.Struct, frozen=True, kw_only=True):
    layer: int
    experts: list[int]
    """Rows by expert."""
    ranks: list[int]
    """Rows by place along the expert axis."""


class ExpertLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Of one engine since its ranks were started, warm-up left out."""

    layers: list[LayerLoad]
    expert_imbalance: float
    """Rows of the busiest expert over the mean, of all layers together: 1 is even."""
    rank_imbalance: float
    """The same of ranks: by how much the busiest lengthens what experts cost."""


class ExpertReport(msgspec.Struct, frozen=True, kw_only=True):
    """What GET /v1/experts answers, and what `expert_load` names a file of."""

    engines: list[ExpertLoad]


class BadExpertLoad(ValueError):
    """It is no report, or of another model. The message is for the user."""


def imbalance(layers: Sequence[Sequence[int]]) -> float:
    """Maximum over mean. Each layer waits for its own maximum, so maxima are added up, and so are means."""
    mean = sum(sum(rows) / len(rows) for rows in layers)
    return sum(map(max, layers)) / mean if mean else 1.0


def merged(counts: Iterable[HeldRows], num_experts: int, places: int) -> ExpertLoad:
    """Of what all ranks counted; of the ranks that hold slices of the same experts one counts."""
    layers: dict[int, LayerLoad] = {}
    for held in counts:
        empty = LayerLoad(layer=held.layer, experts=[0] * num_experts, ranks=[0] * places)
        load = layers.setdefault(held.layer, empty)
        load.ranks[held.place] += sum(held.rows)
        for expert, rows in zip(held.experts, held.rows, strict=True):
            load.experts[expert] += rows
    loads = [layers[layer] for layer in sorted(layers)]
    return ExpertLoad(
        layers=loads,
        expert_imbalance=imbalance([load.experts for load in loads]),
        rank_imbalance=imbalance([load.ranks for load in loads]),
    )


def rows_of(report: bytes, spec: ModelSpec) -> dict[int, list[int]]:
    """By layer, the rows of each expert, summed over engines. Raises BadExpertLoad."""
    try:
        engines = msgspec.json.decode(report, type=ExpertReport).engines
    except msgspec.MsgspecError as error:
        raise BadExpertLoad(f"is not what GET /v1/experts answers: {error}") from None
    num_experts = spec.moe.num_experts if spec.moe is not None else 0
    total: dict[int, list[int]] = {}
    for load in (layer for engine in engines for layer in engine.layers):
        is_known = 0 <= load.layer < spec.num_layers and len(load.experts) == num_experts
        if not is_known or min(load.experts, default=0) < 0:
            raise BadExpertLoad(
                f"is of another model: its layer {load.layer} has {len(load.experts)} experts, and the model "
                f"{spec.num_layers} layers with {num_experts}"
            )
        before = total.get(load.layer, [0] * num_experts)
        total[load.layer] = [a + b for a, b in zip(before, load.experts, strict=True)]
    return total


def placements(spec: ModelSpec, places: int, rows: dict[int, list[int]], redundant: int) -> tuple[Placement, ...]:
    """Of every layer. One of which no rows are known keeps its experts in order, without copies."""
    in_order = contiguous(spec.moe.num_experts if spec.moe is not None else 0, places)
    return tuple(
        balanced(rows[layer], places, redundant) if layer in rows else in_order for layer in range(spec.num_layers)
    )
