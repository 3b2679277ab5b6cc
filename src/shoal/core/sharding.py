"""Which part of a model one rank holds: heads, features, vocabulary, layers, experts. Pure arithmetic on a ModelSpec.

Parts need not be equal: 9 heads over 2 ranks are 4 and 5. Of their 3 key/value heads both ranks have the middle one,
for both have queries that read it.
"""

from __future__ import annotations

from math import lcm

import msgspec

from shoal.core.config import ExpertDispatchKind
from shoal.core.expert_placement import Placement, contiguous
from shoal.core.layout import Layout
from shoal.core.model_spec import ModelSpec

ALIGNMENT = 32
"""Features: what the CPU kernels pack together, and what an int8 scale covers."""


class Span(msgspec.Struct, frozen=True, array_like=True):
    """[start, stop) of a dimension."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)

    def times(self, factor: int) -> Span:
        return Span(self.start * factor, self.stop * factor)


class Heads(msgspec.Struct, frozen=True):
    """Query heads of a rank, and the key/value heads that they read: one that several ranks read is on each of them."""

    query: Span
    kv: Span


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank holds of a model."""

    heads: Heads
    mlp: Span
    """Features of a dense MLP."""
    vocab: Span
    """Rows of the embedding and of the head."""
    layers: Span
    is_first: bool
    """Has the embedding."""
    is_last: bool
    """Has the last norm and the head."""
    adds_bias: bool
    """Exactly one rank adds what is added once: the bias behind a sum over ranks."""
    expert_dispatch: ExpertDispatchKind
    expert_place: int
    """Along the expert axis."""
    placements: tuple[Placement, ...]
    """Of the routed experts of each layer of the model."""
    expert_features: Span
    """Of each routed expert."""
    shared_features: Span
    """Of the shared experts, which are one MLP."""

    def experts(self, layer: int) -> tuple[int, ...]:
        """Routed experts that this rank holds."""
        return self.placements[layer].held[self.expert_place]


DECODE_TOKENS = 4096
"""Tokens in the contexts of a batch that decodes, as stages are balanced for: 8 sequences of 512. Of a large model its
weights outweigh them whatever they are; of a small one they count."""


def split_evenly(size: int, parts: int, alignment: int = 1) -> list[Span]:
    """[0, size) in `parts` spans as equal as can be, cut at multiples of `alignment` where each can have one."""
    unit = alignment if size >= alignment * parts else 1
    units = -(-size // unit)
    cuts = [min(size, units * part // parts * unit) for part in range(parts)] + [size]
    return [Span(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)]


_GROUPS_A_RANK = 8
"""One group more or less is then an eighth of a rank's work at most."""


def _split_features(spec: ModelSpec, size: int, ranks: int) -> list[Span]:
    """An MLP's, between groups that share a scale where that leaves ranks nearly equal.

    Elsewhere a group may be cut, and its scale is on both ranks.
    """
    alignment = ALIGNMENT if spec.quantization is None else lcm(ALIGNMENT, spec.quantization.alignment)
    return split_evenly(size, ranks, alignment if size >= _GROUPS_A_RANK * alignment * ranks else ALIGNMENT)


def split_heads(num_heads: int, num_kv_heads: int, ranks: int) -> list[Heads]:
    """Query heads in order, each rank with the key/value heads that its own read; one may be on several ranks.

    Cut between groups that share a key/value head, or as evenly as can be where that leaves the rank with most to do
    less: every layer waits for it. Only for layouts that `layout.refusal` lets through.
    """
    group = num_heads // num_kv_heads

    def with_kv(query: Span) -> Heads:
        return Heads(query, Span(query.start // group, -(-query.stop // group)))

    def most(heads: list[Heads]) -> int:
        """A query head has two matrices, with its output's, and a key/value head has two."""
        return max(len(head.query) + len(head.kv) for head in heads)

    evenly = [with_kv(query) for query in split_evenly(num_heads, ranks)]
    if ranks > num_kv_heads:
        parts = [
            Span(kv * group + part.start, kv * group + part.stop)
            for kv, owners in enumerate(split_evenly(ranks, num_kv_heads))
            for part in split_evenly(group, len(owners))
        ]
    else:
        parts = [kv.times(group) for kv in split_evenly(num_kv_heads, ranks)]
    by_groups = [with_kv(query) for query in parts]
    return min(by_groups, evenly, key=most)


def split_layers(spec: ModelSpec, stages: int) -> list[Span]:
    """Stages whose most expensive one costs the least in decode, where every stage waits for it in every step.

    A layer costs its active matrices and the KV of DECODE_TOKENS, the last stage the head too: with a small hidden
    size and a large vocabulary it outweighs many layers. The embedding is a lookup and costs nothing.
    """
    kv = spec.kv_elements_per_token() // spec.num_layers * DECODE_TOKENS
    costs = [spec.attention_matrices() + spec.mlp_matrices(layer, active=True) + kv for layer in range(spec.num_layers)]
    costs[-1] += spec.vocab_size * spec.hidden_size
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[n]: the least possible cost of the dearest of the stages that hold the first n layers, and its last cut.
    best: list[tuple[int, list[int]]] = [(sums[n], [0]) for n in range(spec.num_layers + 1)]
    for stage in range(2, stages + 1):
        best = [
            min(
                ((max(best[cut][0], sums[n] - sums[cut]), [*best[cut][1], cut]) for cut in range(stage - 1, n)),
                default=(sums[-1] + 1, []),
            )
            for n in range(spec.num_layers + 1)
        ]
    cuts = [*best[spec.num_layers][1], spec.num_layers]
    return [Span(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)]


def shard_of(
    spec: ModelSpec,
    layout: Layout,
    rank: int,
    expert_dispatch: ExpertDispatchKind = "replicate",
    placements: tuple[Placement, ...] | None = None,
) -> Shard:
    """Only for layouts that `layout.refusal` lets through. `placements` None: experts in order, no copies."""
    place = layout.place(rank)
    ranks, index = layout.tensor_ranks, place.ep * layout.tp + place.tp
    moe = spec.moe
    num_experts, features, shared = (
        (moe.num_experts, moe.expert_intermediate_size, moe.shared_size) if moe is not None else (0, 0, 0)
    )
    # With all_to_all a rank has its own tokens only, which visit no other rank for the shared experts.
    all_shared = expert_dispatch == "all_to_all"
    kv_heads = spec.num_heads if spec.mla is not None else spec.num_kv_heads  # latent KV is shared by all heads
    return Shard(
        heads=split_heads(spec.num_heads, kv_heads, ranks)[index],
        mlp=_split_features(spec, spec.intermediate_size, ranks)[index],
        vocab=split_evenly(spec.vocab_size, ranks, ALIGNMENT)[index],
        layers=split_layers(spec, layout.pp)[place.pp],
        is_first=place.pp == 0,
        is_last=place.pp == layout.pp - 1,
        adds_bias=index == 0,
        expert_dispatch=expert_dispatch,
        expert_place=place.ep,
        placements=placements or (contiguous(num_experts, layout.ep),) * spec.num_layers,
        expert_features=_split_features(spec, features, layout.tp)[place.tp],
        shared_features=Span(0, shared) if all_shared else _split_features(spec, shared, ranks)[index],
    )


def whole(spec: ModelSpec) -> Shard:
    """The only rank's."""
    return shard_of(spec, Layout(), 0)
