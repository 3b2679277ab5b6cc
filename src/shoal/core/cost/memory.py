"""Bytes of one device: weights by precision and layout, cache, temporaries, and what is left. See MemoryBudget."""

from __future__ import annotations

from functools import lru_cache
from math import ceil

from shoal.core.cost.operators import BYTES, CACHE_BYTES
from shoal.core.cost.profiles import EngineProfile
from shoal.core.cost.types import CachePrecision, EngineShape, MemoryBudget, WeightPrecision
from shoal.core.model_shape import AttentionShape, LayerShape, ModelShape
from shoal.core.sharding import split_heads


def attention_precision(model: ModelShape, weights: WeightPrecision) -> WeightPrecision:
    """Published 4-bit checkpoints of mixtures (DeepSeek NVFP4, Kimi INT4, gpt-oss MXFP4) quantise experts alone."""
    return "bfloat16" if model.is_mixture and weights in ("float4", "int4") else weights


def local_cache_elements(attention: AttentionShape, ranks: int) -> float:
    """Of a token on one of `ranks` tensor-parallel ranks: heads are split as far as they go, a latent is whole."""
    if attention.kind == "linear":
        return 0.0
    if attention.latent_dim:
        return attention.latent_dim + attention.index_dim
    each = attention.head_dim + (attention.value_dim or attention.head_dim)
    return local_heads(attention, ranks)[1] * each + attention.index_dim


@lru_cache(maxsize=1024)
def local_heads(attention: AttentionShape, ranks: int) -> tuple[int, int]:
    """Query heads, and key/value heads, of the tensor-parallel rank that has most of each."""
    heads, kv = attention.num_heads, attention.num_kv_heads
    if ranks > heads or heads % kv:
        return ceil(heads / ranks), ceil(kv / ranks)
    split = split_heads(heads, kv, ranks)
    return max(len(one.query) for one in split), max(len(one.kv) for one in split)


def attention_parameters(hidden_size: int, attention: AttentionShape, ranks: int) -> float:
    """Of one layer's matrices, on the fullest of `ranks` tensor-parallel ranks: a key/value head is on each rank whose
    queries read it, and what is not by heads is on all."""
    split = attention.parameters - attention.whole
    if attention.kind == "linear" or attention.latent_dim:
        return attention.whole + split / ranks
    head = hidden_size * (attention.head_dim + (attention.value_dim or attention.head_dim))
    kv = attention.num_kv_heads * head
    return attention.whole + (split - kv) / ranks + local_heads(attention, ranks)[1] * head


def local_cache_bytes(attention: AttentionShape, ranks: int, cache: CachePrecision) -> float:
    """Of a token on one rank, with its scales, which are float32: int8 has one for each head's key and value. Of a
    latent in 8 bits the rotated part stays in 16, and there is one scale a token."""
    per, elements = CACHE_BYTES[cache], local_cache_elements(attention, ranks)
    if cache not in ("float8", "int8") or attention.kind == "linear":
        return elements * per
    if attention.latent_dim:
        return elements * per + attention.rope_dim * (2 - per) + 4
    return elements * per + (8 * local_heads(attention, ranks)[1] if cache == "int8" else 0)


def stage_share(engine: EngineShape) -> float:
    """Of the model's layers that the fullest stage has."""
    layers = engine.model.num_layers
    return ceil(layers / engine.layout.pp) / layers


def layer_weight_bytes(engine: EngineShape, layer: LayerShape) -> float:
    """Of one layer on one device. Norms, biases and routers stay in 16 bits and are on every rank."""
    model, ranks = engine.model, engine.layout.tensor_ranks
    mlp, hidden = layer.mlp, engine.model.hidden_size
    per = BYTES[engine.weights]
    plain = 4.0 if engine.weights == "float32" else 2.0
    attention = attention_parameters(hidden, layer.attention, ranks) * BYTES[attention_precision(model, engine.weights)]
    small = (layer.attention.vectors + layer.norms) * plain
    per_feature = (3 if mlp.gated else 2) * hidden
    if not mlp.num_experts:
        return attention + small + per_feature * mlp.intermediate_size / ranks * per + mlp.vectors * plain
    experts_ranks = expert_ranks(engine) * engine.layout.tp
    experts = per_feature * mlp.num_experts * mlp.expert_size / experts_ranks * per
    shared = per_feature * mlp.shared_size / ranks * per
    return attention + small + experts + shared + (mlp.num_experts * hidden + mlp.vectors) * plain


def expert_ranks(engine: EngineShape) -> int:
    """Parts that the experts of a layer are dealt to."""
    return engine.layout.ep * engine.attention_dp


def weight_bytes(engine: EngineShape) -> int:
    """Of the fullest device: a stage's layers, and of embedding and head what falls to it."""
    model = engine.model
    plain = 4.0 if engine.weights == "float32" else 2.0
    layers = sum(layer.count * layer_weight_bytes(engine, layer) for layer in model.layers) * stage_share(engine)
    table = model.vocab_size * model.hidden_size * plain / engine.layout.tensor_ranks
    tables = 2 if engine.layout.pp == 1 and not model.tied_embeddings else 1
    return round(layers + tables * table + model.other_parameters * plain)


def activation_bytes(engine: EngineShape) -> int:
    """Peak of a step's temporaries: some eight hidden states and an MLP's inner features of every token, and logits in
    float32 twice. Gives 1.5 GiB for Llama at 8,192 tokens, where vLLM 0.19 was measured to take 1.9 (llm-d-planner)."""
    model, ranks = engine.model, engine.layout.tensor_ranks
    plain = 4 if engine.weights == "float32" else 2
    widest = max(
        3 * layer.mlp.intermediate_size / ranks
        if not layer.mlp.num_experts
        else 3 * (layer.mlp.num_experts_per_token * layer.mlp.expert_size + layer.mlp.shared_size) / ranks
        for layer in model.layers
    )
    states = engine.max_batch_tokens * plain * (8 * model.hidden_size + widest)
    return round(states + engine.max_sequences * model.vocab_size / ranks * 8)


def cache_bytes_per_token(engine: EngineShape) -> float:
    """On the fullest device. A windowed layer's tokens leave the cache: see sequence_bytes."""
    kept = sum(
        layer.count * local_cache_bytes(layer.attention, engine.layout.tensor_ranks, engine.cache)
        for layer in engine.model.layers
        if layer.attention.kind != "windowed"
    )
    return kept * stage_share(engine) / engine.layout.cp


def sequence_bytes(engine: EngineShape, tokens: float) -> float:
    """Cache of one sequence of so many tokens: what every token keeps, windows as far as they are filled, states of
    linear attention (float32), and half a block of every layer that keeps all tokens."""
    ranks = engine.layout.tensor_ranks
    total = 0.0
    for layer in engine.model.layers:
        attention = layer.attention
        if attention.kind == "linear":
            total += layer.count * attention.state_elements / ranks * 4
        elif attention.kind == "windowed":
            kept = min(tokens, attention.window or 0) + engine.block_size / 2
            total += layer.count * kept * local_cache_bytes(attention, ranks, engine.cache) / engine.layout.cp
    return total * stage_share(engine) + cache_bytes_per_token(engine) * (tokens + engine.block_size / 2)


def budget(engine: EngineShape, profile: EngineProfile) -> MemoryBudget:
    total = int(engine.cluster.device.memory_bytes * engine.memory_share)
    weights = weight_bytes(engine)
    activations = activation_bytes(engine)
    workspace = int(profile.workspace_bytes if engine.num_devices == 1 else profile.workspace_bytes_ranks)
    if engine.cluster.device.vendor == "cpu":
        workspace = 64 << 20
    return MemoryBudget(
        total=total,
        weights=weights,
        activations=activations,
        workspace=workspace,
        cache=total - weights - activations - workspace,
        bytes_per_token=cache_bytes_per_token(engine),
        bytes_per_sequence=sequence_bytes(engine, engine.model.max_len)
        - cache_bytes_per_token(engine) * engine.model.max_len,
    )
