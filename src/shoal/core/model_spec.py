"""ModelSpec: what a model is, read from `config.json` or GGUF metadata; exact parameter, byte and FLOP counts."""

from __future__ import annotations

from typing import Literal

import msgspec


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding of one kind of layer."""

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_len: int | None = None
    low_freq_factor: float = 1.0
    """llama3."""
    high_freq_factor: float = 4.0
    """llama3."""
    beta_fast: float = 32.0
    """yarn."""
    beta_slow: float = 1.0
    """yarn."""
    attention_factor: float | None = None
    """yarn: multiplies cos and sin; None derives 0.1 ln(factor) + 1."""


class MoESpec(msgspec.Struct, frozen=True, kw_only=True):
    num_experts: int
    num_experts_per_token: int
    expert_intermediate_size: int
    num_shared_experts: int = 0
    first_dense_layers: int = 0
    """Leading layers with a dense MLP."""


class MLASpec(msgspec.Struct, frozen=True, kw_only=True):
    """Multi-head latent attention (DeepSeek)."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    family: str
    """Architecture by its field name in lower case: llama, mistral, qwen2, qwen3, gemma3_text, mixtral, ..."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_len: int
    """Longest context in tokens."""
    norm_eps: float
    rope: RopeSpec
    rope_local: RopeSpec | None = None
    """For sliding-window layers where they differ (Gemma 3)."""
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    sandwich_norms: bool = False
    """Norms after attention and MLP too (Gemma 3)."""
    norm_plus_one: bool = False
    """Checkpoint stores norm weights minus one (Gemma 3 safetensors)."""
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    """None is head_dim ** -0.5."""
    window: int | None = None
    """Sliding window in tokens."""
    windowed_layers: tuple[bool, ...] = ()
    """Which layers have the window; () means every layer if `window` is set."""
    moe: MoESpec | None = None
    mla: MLASpec | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
