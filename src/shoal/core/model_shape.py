"""ModelShape: what a cost model must know of a model, by kind of layer. `plan/models/*.yaml` holds published ones.

A ModelSpec says how to run a model; a ModelShape only what its layers hold, read and compute, so it also describes
models that the engine does not run. `shape_of` makes one of a ModelSpec.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal.core.model_spec import ModelSpec


class AttentionShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one layer. `kind` says what its cache is:

    full      keys and values of every token
    windowed  of the last `window` tokens
    latent    MLA: one latent of `latent_dim` numbers a token, shared by all heads (`head_dim` is of queries and keys)
    sparse    latent or full, of which a query reads at most `window` tokens; all are kept, and `index_dim` numbers more
    linear    a recurrent state of `state_elements` numbers a sequence, whatever its length
    """

    kind: Literal["full", "windowed", "latent", "sparse", "linear"]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    parameters: int
    """Of the projections' matrices."""
    whole: int = 0
    """Of them, those that every tensor-parallel rank has whole: down to a latent, and an indexer's."""
    vectors: int = 0
    """Parameters of norms and biases within attention."""
    value_dim: int = 0
    """Of a head's value; 0 is head_dim."""
    window: int | None = None
    latent_dim: int = 0
    rope_dim: int = 0
    """Of latent_dim, the part that is rotated and not expanded."""
    index_dim: int = 0
    index_heads: int = 0
    state_elements: int = 0

    def cache_elements(self) -> int:
        """Numbers that the cache keeps for a token while it can be seen."""
        if self.kind == "linear":
            return 0
        if self.latent_dim:
            return self.latent_dim + self.index_dim
        return self.num_kv_heads * (self.head_dim + (self.value_dim or self.head_dim)) + self.index_dim


class MLPShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A dense MLP, or experts with a router. Sizes are of the inner features."""

    intermediate_size: int
    """Dense; with experts 0."""
    gated: bool = True
    """Three matrices, else two."""
    num_experts: int = 0
    num_experts_per_token: int = 0
    expert_size: int = 0
    shared_size: int = 0
    """Of all shared experts together."""
    vectors: int = 0
    """Parameters of biases and score corrections, of all experts."""

    def parameters(self, hidden_size: int, experts: float | None = None) -> float:
        """Of the matrices, with so many of the routed experts (None: all), the router included."""
        per_feature = (3 if self.gated else 2) * hidden_size
        if not self.num_experts:
            return per_feature * self.intermediate_size
        count = self.num_experts if experts is None else experts
        return per_feature * (count * self.expert_size + self.shared_size) + self.num_experts * hidden_size


class LayerShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    count: int
    """Layers of the model that are like this."""
    attention: AttentionShape
    mlp: MLPShape
    norms: int
    """Parameters of the norms around attention and MLP."""


class ModelShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    hidden_size: int
    vocab_size: int
    max_len: int
    layers: tuple[LayerShape, ...]
    tied_embeddings: bool = False
    other_parameters: int = 0
    """The last norm, learned positions, and whatever else belongs to no layer."""

    @property
    def num_layers(self) -> int:
        return sum(layer.count for layer in self.layers)

    @property
    def is_mixture(self) -> bool:
        return any(layer.mlp.num_experts for layer in self.layers)

    def num_parameters(self, *, active: bool = False) -> int:
        """`active`: those that one token visits, both embeddings counted."""
        total = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2) + self.other_parameters
        for layer in self.layers:
            experts = layer.mlp.num_experts_per_token if active else None
            mlp = int(layer.mlp.parameters(self.hidden_size, experts)) + layer.mlp.vectors
            total += layer.count * (layer.attention.parameters + layer.attention.vectors + mlp + layer.norms)
        return total

    def kv_bytes_per_token(self, bytes_per_element: float) -> float:
        """Of a token that every layer can still see."""
        return sum(layer.count * layer.attention.cache_elements() for layer in self.layers) * bytes_per_element


def shape_of(spec: ModelSpec, name: str) -> ModelShape:
    """Counts exactly what `ModelSpec.num_parameters` counts."""
    kinds: dict[tuple[AttentionShape, MLPShape], int] = {}
    for number in range(spec.num_layers):
        kind = _attention(spec, number), _mlp(spec, number)
        kinds[kind] = kinds.get(kind, 0) + 1
    norms = (4 if spec.sandwich_norms else 2) * spec.hidden_size
    return ModelShape(
        name=name,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        max_len=spec.max_len,
        layers=tuple(
            LayerShape(count=count, attention=attention, mlp=mlp, norms=norms)
            for (attention, mlp), count in kinds.items()
        ),
        tied_embeddings=spec.tied_embeddings,
        other_parameters=spec.hidden_size,
    )


def _attention(spec: ModelSpec, layer: int) -> AttentionShape:
    windowed = spec.is_windowed(layer)
    common = AttentionShape(
        kind="windowed" if windowed else "full",
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        parameters=spec.attention_matrices(),
        vectors=spec.attention_vectors(),
        window=spec.window if windowed else None,
    )
    if spec.mla is None:
        return common
    return msgspec.structs.replace(
        common,
        kind="latent",
        whole=spec.hidden_size * ((spec.mla.q_lora_rank or 0) + spec.mla.latent_dim),
        head_dim=spec.mla.qk_head_dim,
        value_dim=spec.mla.v_head_dim,
        latent_dim=spec.mla.latent_dim,
        rope_dim=spec.mla.qk_rope_head_dim,
    )


def _mlp(spec: ModelSpec, layer: int) -> MLPShape:
    moe = spec.moe
    if moe is None or not spec.has_experts(layer):
        return MLPShape(intermediate_size=spec.intermediate_size)
    return MLPShape(
        intermediate_size=0,
        num_experts=moe.num_experts,
        num_experts_per_token=moe.num_experts_per_token,
        expert_size=moe.expert_intermediate_size,
        shared_size=moe.shared_size,
        vectors=moe.num_experts if moe.router_bias else 0,
    )
