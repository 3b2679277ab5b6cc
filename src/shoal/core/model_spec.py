"""ModelSpec: what a model is, read from `config.json` or GGUF metadata; exact parameter, byte and FLOP counts."""

from __future__ import annotations

from difflib import get_close_matches
from math import log
from typing import Any, Literal

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


class UnsupportedModel(ValueError):
    """The checkpoint is of an architecture that shoal does not run, or lacks what its architecture needs."""


class MoESpec(msgspec.Struct, frozen=True, kw_only=True):
    num_experts: int
    num_experts_per_token: int
    expert_intermediate_size: int
    num_shared_experts: int = 0
    first_dense_layers: int = 0
    """Leading layers with a dense MLP."""
    router_bias: bool = False
    """A correction of each expert's routing score (DeepSeek-V3)."""


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

    # --- counts -----------------------------------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        """Factor of the attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def is_windowed(self, layer: int) -> bool:
        return self.window is not None and (not self.windowed_layers or self.windowed_layers[layer])

    def attention_parameters(self) -> int:
        """Of one layer, norms of query and key included."""
        h = self.hidden_size
        if self.mla is not None:
            m = self.mla
            qk_dim = m.qk_nope_head_dim + m.qk_rope_head_dim
            query = h * self.num_heads * qk_dim
            if m.q_lora_rank is not None:
                query = h * m.q_lora_rank + m.q_lora_rank + m.q_lora_rank * self.num_heads * qk_dim
            latent = h * (m.kv_lora_rank + m.qk_rope_head_dim) + m.kv_lora_rank
            expand = m.kv_lora_rank * self.num_heads * (m.qk_nope_head_dim + m.v_head_dim)
            return query + latent + expand + self.num_heads * m.v_head_dim * h
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        biases = q + 2 * kv if self.qkv_bias else 0
        norms = 2 * self.head_dim if self.qk_norm else 0
        return h * (q + 2 * kv) + biases + norms + q * h

    def mlp_parameters(self, layer: int, *, active: bool = False) -> int:
        """Of one layer; `active` counts only the experts that one token visits, and the router."""
        h = self.hidden_size
        if self.moe is None or layer < self.moe.first_dense_layers:
            return 3 * h * self.intermediate_size
        moe = self.moe
        expert = 3 * h * moe.expert_intermediate_size
        experts = (moe.num_experts_per_token if active else moe.num_experts) + moe.num_shared_experts
        return experts * expert + moe.num_experts * h + (moe.num_experts if moe.router_bias else 0)

    def _count(self, *, active: bool) -> int:
        norms = (4 if self.sandwich_norms else 2) * self.hidden_size
        layers = sum(
            self.attention_parameters() + self.mlp_parameters(layer, active=active) + norms
            for layer in range(self.num_layers)
        )
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + layers + self.hidden_size

    def num_parameters(self) -> int:
        return self._count(active=False)

    def num_active_parameters(self) -> int:
        """Parameters that one token visits, both embeddings counted."""
        return self._count(active=True)

    def weight_bytes(self, precision: str) -> int:
        """Bytes of all weights when every one is stored in `precision`, scales of quantised ones left out."""
        return self.num_parameters() * PRECISION_BYTES[precision]

    def kv_elements_per_token(self) -> int:
        """Numbers that the KV cache keeps for one token: keys and values of every layer, or MLA's latent."""
        if self.mla is not None:
            return self.num_layers * (self.mla.kv_lora_rank + self.mla.qk_rope_head_dim)
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        return self.kv_elements_per_token() * bytes_per_element

    def flops_per_token(self, context_len: int, *, with_head: bool = True) -> int:
        """Floating-point operations to compute one token that attends to `context_len` positions, itself included.

        Two operations a weight (multiply and add) and, for attention, two products of head_dim a position and head:
        scores and the weighted sum. Windowed layers see at most their window. Norms, rope and softmax are left out.
        """
        embedding = self.vocab_size * self.hidden_size
        matrices = self._count(active=True) - embedding * (1 if self.tied_embeddings else 2)
        per_position = 4 * self.num_heads * self.head_dim
        if self.mla is not None:
            m = self.mla
            per_position = 2 * self.num_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim + m.v_head_dim)
        positions = sum(
            min(context_len, self.window) if self.is_windowed(layer) and self.window else context_len
            for layer in range(self.num_layers)
        )
        return 2 * (matrices + (embedding if with_head else 0)) + per_position * positions


PRECISION_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}

# --- config.json ----------------------------------------------------------------------------------------------------

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3_text",
    "Gemma3ForConditionalGeneration": "gemma3_text",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "DeepseekV3ForCausalLM": "deepseek_v3",
}


def spec_from_config(config: dict[str, Any]) -> ModelSpec:
    """ModelSpec of a Hugging Face `config.json`. Raises UnsupportedModel naming the architecture or the key at fault."""
    names = config.get("architectures") or []
    family = next((ARCHITECTURES[name] for name in names if name in ARCHITECTURES), None)
    if family is None and not names and config.get("model_type") in ARCHITECTURES.values():
        family = config["model_type"]
    if family is None:
        found = ", ".join(map(str, names)) or config.get("model_type") or "none named"
        near = get_close_matches(str(found), ARCHITECTURES, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise UnsupportedModel(f"architecture {found} is not supported{hint}; supported: {', '.join(ARCHITECTURES)}")
    if "text_config" in config:
        config = {**config["text_config"], "tie_word_embeddings": config.get("tie_word_embeddings", True)}
    try:
        return _from_hf(family, config)
    except KeyError as missing:
        raise UnsupportedModel(f"config.json lacks {missing.args[0]!r}, which {family} needs") from None


def _from_hf(family: str, c: dict[str, Any]) -> ModelSpec:
    gemma = family == "gemma3_text"
    heads = c["num_attention_heads"]
    head_dim = c.get("head_dim") or (256 if gemma else c["hidden_size"] // heads)
    window, windowed = _windows(family, c)
    rope, rope_local = _rope(family, c)
    eos = c.get("eos_token_id")
    return ModelSpec(
        family=family,
        num_layers=c["num_hidden_layers"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_heads=heads,
        num_kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocab_size=c["vocab_size"],
        max_len=c["max_position_embeddings"],
        norm_eps=c.get("rms_norm_eps", 1e-6),
        rope=rope,
        rope_local=rope_local,
        tied_embeddings=bool(c.get("tie_word_embeddings", gemma)),
        qkv_bias=family == "qwen2" or bool(c.get("attention_bias", False)),
        qk_norm=family in ("qwen3", "qwen3_moe", "gemma3_text"),
        activation=_activation(c),
        sandwich_norms=gemma,
        norm_plus_one=gemma,
        embedding_scale=c["hidden_size"] ** 0.5 if gemma else 1.0,
        attention_scale=c.get("query_pre_attn_scalar", head_dim) ** -0.5 if gemma else None,
        window=window,
        windowed_layers=windowed,
        moe=_moe(family, c),
        mla=_mla(family, c),
        bos_id=c.get("bos_token_id"),
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )


def _activation(c: dict[str, Any]) -> Literal["silu", "gelu_tanh"]:
    name = c.get("hidden_activation") or c.get("hidden_act", "silu")
    if name == "silu":
        return "silu"
    if name in ("gelu_pytorch_tanh", "gelu_tanh"):
        return "gelu_tanh"
    raise UnsupportedModel(f"activation {name!r} is not supported; supported: silu, gelu_pytorch_tanh")


def _windows(family: str, c: dict[str, Any]) -> tuple[int | None, tuple[bool, ...]]:
    window = c.get("sliding_window")
    if window is None or (family.startswith("qwen") and not c.get("use_sliding_window", False)):
        return None, ()
    kinds = c.get("layer_types")
    if kinds:
        return window, tuple(kind == "sliding_attention" for kind in kinds)
    if family == "gemma3_text":
        pattern = c.get("sliding_window_pattern", 6)
        return window, tuple((layer + 1) % pattern != 0 for layer in range(c["num_hidden_layers"]))
    if family.startswith("qwen"):
        return window, tuple(layer >= c.get("max_window_layers", 0) for layer in range(c["num_hidden_layers"]))
    return window, ()


def _rope(family: str, c: dict[str, Any]) -> tuple[RopeSpec, RopeSpec | None]:
    """Both spellings: `rope_parameters` (transformers 5, perhaps one set for each layer type) and `rope_scaling`."""
    parameters = c.get("rope_parameters") or {}
    theta = c.get("rope_theta", 1e6 if family == "gemma3_text" else 10000.0)
    max_len = c["max_position_embeddings"]
    if "full_attention" in parameters:
        local = parameters.get("sliding_attention")
        full = _rope_of(parameters["full_attention"], theta, max_len)
        return full, _rope_of(local, c.get("rope_local_base_freq", 10000.0), max_len) if local else None
    full = _rope_of({**(c.get("rope_scaling") or {}), **parameters}, theta, max_len)
    return full, RopeSpec(theta=c.get("rope_local_base_freq", 10000.0)) if family == "gemma3_text" else None


def _rope_of(parameters: dict[str, Any], theta: float, max_len: int) -> RopeSpec:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UnsupportedModel(f"rope type {kind!r} is not supported; supported: default, linear, llama3, yarn")
    attention_factor = parameters.get("attention_factor")
    if kind == "yarn" and attention_factor is None and "mscale" in parameters:
        # DeepSeek: the ratio of two magnitudes, YaRN (arXiv 2309.00071) eq. 22 with a coefficient.
        attention_factor = _mscale(parameters["factor"], parameters["mscale"]) / _mscale(
            parameters["factor"], parameters.get("mscale_all_dim", 0.0)
        )
    return RopeSpec(
        theta=float(parameters.get("rope_theta", theta)),
        kind=kind,
        factor=float(parameters.get("factor", 1.0)),
        original_max_len=parameters.get("original_max_position_embeddings") or max_len,
        low_freq_factor=float(parameters.get("low_freq_factor", 1.0)),
        high_freq_factor=float(parameters.get("high_freq_factor", 4.0)),
        beta_fast=float(parameters.get("beta_fast") or 32.0),
        beta_slow=float(parameters.get("beta_slow") or 1.0),
        attention_factor=attention_factor,
    )


def _mscale(factor: float, coefficient: float) -> float:
    return 1.0 if factor <= 1 or not coefficient else 0.1 * coefficient * log(factor) + 1.0


def _moe(family: str, c: dict[str, Any]) -> MoESpec | None:
    if family == "mixtral":
        return MoESpec(
            num_experts=c["num_local_experts"],
            num_experts_per_token=c["num_experts_per_tok"],
            expert_intermediate_size=c["intermediate_size"],
        )
    if family == "qwen3_moe":
        return MoESpec(
            num_experts=c["num_experts"],
            num_experts_per_token=c["num_experts_per_tok"],
            expert_intermediate_size=c["moe_intermediate_size"],
        )
    if family == "deepseek_v3":
        return MoESpec(
            num_experts=c["n_routed_experts"],
            num_experts_per_token=c["num_experts_per_tok"],
            expert_intermediate_size=c["moe_intermediate_size"],
            num_shared_experts=c.get("n_shared_experts") or 0,
            first_dense_layers=c.get("first_k_dense_replace", 0),
            router_bias=True,
        )
    return None


def _mla(family: str, c: dict[str, Any]) -> MLASpec | None:
    if family != "deepseek_v3":
        return None
    return MLASpec(
        q_lora_rank=c.get("q_lora_rank"),
        kv_lora_rank=c["kv_lora_rank"],
        qk_nope_head_dim=c["qk_nope_head_dim"],
        qk_rope_head_dim=c["qk_rope_head_dim"],
        v_head_dim=c["v_head_dim"],
    )


# --- GGUF metadata --------------------------------------------------------------------------------------------------

GGUF_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}


def spec_from_gguf(metadata: dict[str, Any]) -> ModelSpec:
    """ModelSpec of a GGUF file's metadata (keys as in the file, values plain Python).

    `shoal.tied_embeddings` (no output tensor), `shoal.qkv_bias`, `shoal.vocab_size` and, for Llama 3.1 and later,
    `shoal.rope_factor`, which only the tensors tell, are added by the reader. Raises UnsupportedModel.
    """
    arch = metadata.get("general.architecture")
    if arch not in GGUF_ARCHITECTURES:
        supported = ", ".join(GGUF_ARCHITECTURES)
        raise UnsupportedModel(f"GGUF architecture {arch!r} is not supported; supported: {supported}")
    try:
        return _from_gguf(arch, metadata)
    except KeyError as missing:
        raise UnsupportedModel(f"the GGUF metadata lacks {missing.args[0]!r}") from None


def _from_gguf(arch: str, m: dict[str, Any]) -> ModelSpec:
    gemma = arch == "gemma3"
    heads, hidden = m[f"{arch}.attention.head_count"], m[f"{arch}.embedding_length"]
    head_dim = m.get(f"{arch}.attention.key_length", hidden // heads)
    layers, max_len = m[f"{arch}.block_count"], m[f"{arch}.context_length"]
    scaling = m.get(f"{arch}.rope.scaling.type", "none")
    if scaling not in ("none", "linear", "yarn"):
        raise UnsupportedModel(f"rope scaling {scaling!r} is not supported in GGUF; supported: linear, yarn")
    rope = RopeSpec(
        theta=float(m.get(f"{arch}.rope.freq_base", 10000.0)),
        kind="default" if scaling == "none" else scaling,
        factor=float(m.get(f"{arch}.rope.scaling.factor", 1.0)),
        original_max_len=m.get(f"{arch}.rope.scaling.original_context_length", max_len),
    )
    if "shoal.rope_factor" in m:
        # All published Llama 3.x share these constants; GGUF keeps only the resulting divisors.
        rope = RopeSpec(theta=rope.theta, kind="llama3", factor=m["shoal.rope_factor"], original_max_len=8192)
    pattern = 6
    eos = m.get("tokenizer.ggml.eos_token_id")
    # Gemma 3 27B scales by hidden / heads, the others by head_dim; the file does not say (Gemma 3 report, 2025).
    scale = (hidden / heads if layers == 62 else head_dim) ** -0.5
    return ModelSpec(
        family=GGUF_ARCHITECTURES[arch],
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=m[f"{arch}.feed_forward_length"],
        num_heads=heads,
        num_kv_heads=m.get(f"{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=m["shoal.vocab_size"],
        max_len=max_len,
        norm_eps=float(m[f"{arch}.attention.layer_norm_rms_epsilon"]),
        rope=rope,
        rope_local=RopeSpec(theta=10000.0) if gemma else None,
        tied_embeddings=bool(m["shoal.tied_embeddings"]),
        qkv_bias=bool(m["shoal.qkv_bias"]),
        qk_norm=arch in ("qwen3", "gemma3"),
        activation="gelu_tanh" if gemma else "silu",
        sandwich_norms=gemma,
        norm_plus_one=False,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        attention_scale=scale if gemma else None,
        window=m.get(f"{arch}.attention.sliding_window") if gemma else None,
        windowed_layers=tuple((layer + 1) % pattern != 0 for layer in range(layers)) if gemma else (),
        bos_id=m.get("tokenizer.ggml.bos_token_id"),
        eos_ids=() if eos is None else (eos,),
    )
