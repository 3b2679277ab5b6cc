"""ModelSpec from what a checkpoint says of itself: a Hugging Face `config.json`, or the metadata of a GGUF file."""

from __future__ import annotations

from difflib import get_close_matches
from math import inf, log
from typing import Any, Literal

import msgspec

from shoal.core.model_spec import MLASpec, ModelSpec, MoESpec, RopeKind, RopeSpec, UnsupportedModel

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


DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096},
    "mixtral": {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
    "qwen3_moe": {"sliding_window": 4096},
    "deepseek_v3": {
        "q_lora_rank": 1536,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "n_group": 8,
        "topk_group": 4,
    },
    "qwen2": {"max_window_layers": 28},
    "qwen3": {"max_window_layers": 28, "head_dim": 128},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
}
"""What each family means by a key that its config.json leaves out, where that differs from the rest. Gemma 3's
multimodal files list only what departs from these."""

_MUST_BE_OFF = (
    "mlp_bias",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "use_bidirectional_attention",
    "mlp_only_layers",
)
"""Keys that change the arithmetic in ways that shoal does not have: better refused than computed wrongly."""


def spec_from_config(config: dict[str, Any]) -> ModelSpec:
    """ModelSpec of a Hugging Face `config.json`. Raises UnsupportedModel: an architecture, or a key and its value."""
    family = _family(config)
    try:
        if "text_config" in config:
            # Special tokens and tying are sometimes said beside the text part instead of in it.
            outer = ("tie_word_embeddings", "bos_token_id", "eos_token_id")
            config = {key: config[key] for key in outer if config.get(key) is not None} | config["text_config"]
        config = DEFAULTS.get(family, {}) | config
        for key in _MUST_BE_OFF:
            if config.get(key):
                raise UnsupportedModel(f"config.json sets {key} to {config[key]!r}, which shoal does not support")
        return _checked(_from_hf(family, config), "config.json")
    except KeyError as missing:
        raise UnsupportedModel(f"config.json lacks {missing.args[0]!r}, which {family} needs") from None
    except UnsupportedModel:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UnsupportedModel(f"config.json holds a value of the wrong kind: {error}") from None


def _family(config: dict[str, Any]) -> str:
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UnsupportedModel(f"config.json: architectures must be a list of names, not {names!r}")
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    model_type = config.get("model_type")
    if not names and isinstance(model_type, str) and model_type in ARCHITECTURES.values():
        return model_type
    found = ", ".join(names) or str(model_type or "none named")
    near = get_close_matches(found, ARCHITECTURES, n=1)
    hint = f" (nearest: {near[0]})" if near else ""
    raise UnsupportedModel(f"architecture {found} is not supported{hint}; supported: {', '.join(ARCHITECTURES)}")


_MAX_LAYERS = 4096
_SIZES = (
    "num_layers",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "max_len",
)


def _checked(spec: ModelSpec, file: str) -> ModelSpec:
    """The same spec with its types verified: what a file says is anything until then."""
    try:
        spec = msgspec.convert(msgspec.to_builtins(spec), ModelSpec)
    except msgspec.ValidationError as error:
        raise UnsupportedModel(f"{file} holds a value of the wrong kind: {error}") from None
    sizes = {name: getattr(spec, name) for name in _SIZES}
    if min(sizes.values()) < 1 or (spec.window is not None and spec.window < 1):
        reason = f"a size is not positive among {sizes | {'window': spec.window}}"
    elif spec.num_heads % spec.num_kv_heads:
        reason = f"{spec.num_heads} attention heads cannot share {spec.num_kv_heads} key/value heads evenly"
    elif spec.rope_dim % 2:
        reason = f"{spec.rope_dim} rotated features of a head are odd: rotary embedding needs pairs"
    elif spec.windowed_layers and len(spec.windowed_layers) != spec.num_layers:
        reason = f"{len(spec.windowed_layers)} layer types are given for {spec.num_layers} layers"
    elif not (0 <= spec.norm_eps < 1 and 1 < spec.rope.theta < inf and 0 < spec.rope.factor < inf):
        reason = (
            f"norm epsilon {spec.norm_eps}, rope theta {spec.rope.theta} or factor {spec.rope.factor} is out of range"
        )
    else:
        reason = _senseless_experts(spec.moe, spec.num_layers) or _senseless_latent(spec.mla)
    if reason:
        raise UnsupportedModel(f"{file} makes no sense: {reason}")
    return spec


_MAX_EXPERTS = 4096


def _senseless_experts(moe: MoESpec | None, num_layers: int) -> str:
    """What is wrong with the experts; "" for nothing."""
    if moe is None:
        return ""
    group_size, rest = divmod(moe.num_experts, max(1, moe.num_groups))
    chosen = f"{moe.num_experts_per_token} of {moe.num_experts} experts for a token"
    if not 1 <= moe.num_experts_per_token <= moe.num_experts <= _MAX_EXPERTS:
        return f"{chosen}: at most {_MAX_EXPERTS}, and no more for a token than there are"
    if moe.expert_intermediate_size < 1 or moe.num_shared_experts < 0:
        return f"{moe.num_shared_experts} shared experts, {moe.expert_intermediate_size} features of an expert"
    if not 0 <= moe.first_dense_layers <= num_layers:
        return f"{moe.first_dense_layers} dense layers of {num_layers}"
    if not 0 < moe.scaling < inf:
        return f"a factor of {moe.scaling} on the experts' weights"
    if moe.num_groups != 1 and (moe.num_groups < 1 or rest or group_size < 2):
        return f"{moe.num_experts} experts in {moe.num_groups} groups: they must be equal, of at least 2 each"
    if not 1 <= moe.num_groups_per_token <= moe.num_groups:
        return f"{moe.num_groups_per_token} of {moe.num_groups} groups of experts for a token"
    if moe.num_groups_per_token * group_size < moe.num_experts_per_token:
        return f"{chosen}, of {moe.num_groups_per_token} groups of {group_size}"
    return ""


def _senseless_latent(mla: MLASpec | None) -> str:
    """What is wrong with latent attention; "" for nothing."""
    if mla is None:
        return ""
    sizes = (mla.kv_lora_rank, mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim)
    if min(sizes) < 1 or (mla.q_lora_rank is not None and mla.q_lora_rank < 1):
        return f"a size is not positive in {mla}"
    return ""


def _num_layers(value: Any) -> int:
    """Checked before anything is listed for each layer."""
    if type(value) is not int or not 0 < value <= _MAX_LAYERS:
        raise UnsupportedModel(f"the number of layers must be an integer from 1 to {_MAX_LAYERS}, not {value!r:.40}")
    return value


def _from_hf(family: str, c: dict[str, Any]) -> ModelSpec:
    gemma = family == "gemma3_text"
    heads = c["num_attention_heads"]
    num_layers = _num_layers(c["num_hidden_layers"])
    window, windowed = _windows(family, c, num_layers)
    rope, rope_local = _rope(family, c)
    mla = _mla(family, c)
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    if mla is not None:
        # A head_dim of the file is the rotated part alone.
        head_dim = mla.qk_head_dim
    attention_bias = bool(c.get("attention_bias", False))
    eos = c.get("eos_token_id")
    return ModelSpec(
        family=family,
        num_layers=num_layers,
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
        tied_embeddings=bool(c.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=family not in ("qwen2", "mistral", "mixtral") and attention_bias,
        qk_norm=family in ("qwen3", "qwen3_moe", "gemma3_text"),
        activation=_activation(c),
        sandwich_norms=gemma,
        norm_plus_one=gemma,
        embedding_scale=c["hidden_size"] ** 0.5 if gemma else 1.0,
        attention_scale=_attention_scale(c, mla, rope) if mla is not None or gemma else None,
        window=window,
        windowed_layers=windowed,
        moe=_moe(family, c, num_layers),
        mla=mla,
        num_draft_layers=_num_draft_layers(family, c),
        bos_id=c.get("bos_token_id"),
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )


def _attention_scale(c: dict[str, Any], mla: MLASpec | None, rope: RopeSpec) -> float:
    if mla is None:
        return float(c["query_pre_attn_scalar"] ** -0.5)
    scale = mla.qk_head_dim**-0.5
    if rope.kind != "default":
        # DeepSeek-V3 (arXiv 2412.19437) sharpens the scores of its extended context by the square of a magnitude.
        parameters = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
        scale *= _mscale(rope.factor, parameters.get("mscale_all_dim") or 0.0) ** 2
    return float(scale)


def _activation(c: dict[str, Any]) -> Literal["silu", "gelu_tanh"]:
    name = c.get("hidden_activation") or c.get("hidden_act", "silu")
    if name == "silu":
        return "silu"
    if name in ("gelu_pytorch_tanh", "gelu_tanh"):
        return "gelu_tanh"
    raise UnsupportedModel(f"activation {name!r} is not supported; supported: silu, gelu_pytorch_tanh")


def _windows(family: str, c: dict[str, Any], num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window, and which layers have it: () is all of them."""
    window = c.get("sliding_window")
    qwen = family.startswith("qwen")
    windowed_family = qwen or family in ("mistral", "mixtral", "gemma3_text")
    if not window or not windowed_family or (qwen and not c.get("use_sliding_window", False)):
        return None, ()
    kinds = c.get("layer_types")
    if kinds:
        unknown = [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]
        if unknown:
            raise UnsupportedModel(f"layer type {unknown[0]!r} is not supported: sliding_attention, full_attention")
        return window, tuple(kind == "sliding_attention" for kind in kinds)
    if family == "gemma3_text":
        pattern = c.get("sliding_window_pattern") or c.get("_sliding_window_pattern") or 6
        return window, tuple((layer + 1) % pattern != 0 for layer in range(num_layers))
    # Qwen3-MoE's files say max_window_layers too, and the architecture does not know it.
    if "max_window_layers" in c and family != "qwen3_moe":
        return window, tuple(layer >= c["max_window_layers"] for layer in range(num_layers))
    return window, ()


def _rope(family: str, c: dict[str, Any]) -> tuple[RopeSpec, RopeSpec | None]:
    """Both spellings: `rope_parameters` (transformers 5, perhaps one set for each layer type) and `rope_scaling`."""
    if (c.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModel(f"partial_rotary_factor {c['partial_rotary_factor']} is not supported, only 1")
    parameters = c.get("rope_parameters") or {}
    theta = c.get("rope_theta", 10000.0)
    max_len = c["max_position_embeddings"]
    if "full_attention" in parameters:
        full, local = parameters["full_attention"], parameters.get("sliding_attention") or {}
    else:
        # Scaling is of the global layers; those with a window never look far.
        full, local = {**(c.get("rope_scaling") or {}), **parameters}, {}
    local_theta = c.get("rope_local_base_freq", 10000.0)
    rope_local = _rope_of(local, local_theta, max_len) if family == "gemma3_text" else None
    return _rope_of(full, theta, max_len), rope_local


ROPE_KINDS: dict[str, RopeKind] = {"default": "default", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


def _rope_of(p: dict[str, Any], theta: float, max_len: int) -> RopeSpec:
    name = p.get("rope_type") or p.get("type") or "default"
    if name not in ROPE_KINDS:
        raise UnsupportedModel(f"rope type {name!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    kind = ROPE_KINDS[name]
    if (p.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModel(f"partial_rotary_factor {p['partial_rotary_factor']} is not supported, only 1")
    if kind == "yarn" and not p.get("truncate", True):
        raise UnsupportedModel(f"truncate {p['truncate']!r} of yarn is not supported, only true")
    original = p.get("original_max_position_embeddings") or max_len
    factor = p.get("factor")
    if factor is None:
        factor = max_len / original if kind == "yarn" else 1.0
    attention_factor = p.get("attention_factor")
    if kind == "yarn" and attention_factor is None and p.get("mscale") and p.get("mscale_all_dim"):
        # DeepSeek: the ratio of two magnitudes, YaRN (arXiv 2309.00071) eq. 22 with a coefficient.
        attention_factor = _mscale(factor, p["mscale"]) / _mscale(factor, p["mscale_all_dim"])
    return RopeSpec(
        theta=float(p.get("rope_theta", theta)),
        kind=kind,
        factor=float(factor),
        original_max_len=original,
        low_freq_factor=float(p.get("low_freq_factor", 1.0)),
        high_freq_factor=float(p.get("high_freq_factor", 4.0)),
        beta_fast=float(p.get("beta_fast") or 32.0),
        beta_slow=float(p.get("beta_slow") or 1.0),
        attention_factor=attention_factor,
    )


def _mscale(factor: float, coefficient: float) -> float:
    return 1.0 if factor <= 1 or not coefficient else 0.1 * coefficient * log(factor) + 1.0


_MUST_BE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"decoder_sparse_step": 1},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
}
"""The only value of a key that its family's arithmetic here stands for. A file that leaves it out means this."""


_EXPERTS, _EXPERTS_5 = "num_experts", "num_local_experts"
"""Qwen3-MoE's number of experts as its published files and as transformers 5 call it."""


def _moe(family: str, c: dict[str, Any], num_layers: int) -> MoESpec | None:
    for key, only in _MUST_BE.get(family, {}).items():
        if c.get(key, only) != only:
            raise UnsupportedModel(f"{key} {c[key]!r} is not supported, only {only!r}")
    if family == "mixtral":
        return MoESpec(
            num_experts=c["num_local_experts"],
            num_experts_per_token=c["num_experts_per_tok"],
            expert_intermediate_size=c["intermediate_size"],
        )
    if family == "qwen3_moe":
        return MoESpec(
            num_experts=c[_EXPERTS if _EXPERTS in c or _EXPERTS_5 not in c else _EXPERTS_5],
            num_experts_per_token=c["num_experts_per_tok"],
            expert_intermediate_size=c["moe_intermediate_size"],
            normalised=bool(c.get("norm_topk_prob", False)),
        )
    if family == "deepseek_v3":
        return MoESpec(
            num_experts=c["n_routed_experts"],
            num_experts_per_token=c["num_experts_per_tok"],
            expert_intermediate_size=c["moe_intermediate_size"],
            num_shared_experts=c["n_shared_experts"] or 0,
            first_dense_layers=min(c["first_k_dense_replace"] or 0, num_layers),
            scoring="sigmoid",
            router_bias=True,
            num_groups=c["n_group"] or 1,
            num_groups_per_token=c["topk_group"] or 1,
            normalised=bool(c["norm_topk_prob"]),
            scaling=float(c["routed_scaling_factor"]),
        )
    return None


def _mla(family: str, c: dict[str, Any]) -> MLASpec | None:
    if family != "deepseek_v3":
        return None
    return MLASpec(
        q_lora_rank=c["q_lora_rank"],
        kv_lora_rank=c["kv_lora_rank"],
        qk_nope_head_dim=c["qk_nope_head_dim"],
        qk_rope_head_dim=c["qk_rope_head_dim"],
        v_head_dim=c["v_head_dim"],
        interleaved_rope=bool(c.get("rope_interleave", True)),
    )


def _num_draft_layers(family: str, c: dict[str, Any]) -> int:
    if family != "deepseek_v3":
        return 0
    return int(c.get("num_nextn_predict_layers") or c.get("num_mtp_layers") or 0)


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
    if metadata.get(f"{arch}.expert_count"):
        raise UnsupportedModel(f"GGUF architecture {arch!r} with {metadata[f'{arch}.expert_count']} experts")
    try:
        return _checked(_from_gguf(arch, metadata), "the GGUF metadata")
    except KeyError as missing:
        raise UnsupportedModel(f"the GGUF metadata lacks {missing.args[0]!r}") from None
    except UnsupportedModel:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UnsupportedModel(f"the GGUF metadata holds a value of the wrong kind: {error}") from None


def _from_gguf(arch: str, m: dict[str, Any]) -> ModelSpec:
    gemma = arch == "gemma3"
    heads, hidden = m[f"{arch}.attention.head_count"], m[f"{arch}.embedding_length"]
    head_dim = m.get(f"{arch}.attention.key_length", hidden // heads)
    layers, max_len = _num_layers(m[f"{arch}.block_count"]), m[f"{arch}.context_length"]
    scaling = m.get(f"{arch}.rope.scaling.type", "none")
    if scaling not in ("none", "linear", "yarn"):
        raise UnsupportedModel(f"rope scaling {scaling!r} is not supported in GGUF; supported: linear, yarn")
    rope = RopeSpec(
        theta=float(m.get(f"{arch}.rope.freq_base", 10000.0)),
        kind="default" if scaling == "none" else scaling,
        factor=float(m.get(f"{arch}.rope.scaling.factor", 1.0)),
        original_max_len=m.get(f"{arch}.rope.scaling.original_context_length") or max_len,
    )
    if "shoal.rope_factor" in m:
        # All published Llama 3.x share these constants; GGUF keeps only the resulting divisors.
        rope = RopeSpec(theta=rope.theta, kind="llama3", factor=m["shoal.rope_factor"], original_max_len=8192)
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
        windowed_layers=tuple((layer + 1) % 6 != 0 for layer in range(layers)) if gemma else (),
        bos_id=m.get("tokenizer.ggml.bos_token_id"),
        eos_ids=() if eos is None else (eos,),
    )
