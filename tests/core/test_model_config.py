"""What is read from config.json and GGUF metadata, in the spellings that are found in the wild, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from shoal.core.model_config import spec_from_config, spec_from_gguf
from shoal.core.model_spec import MoESpec, RopeSpec, UnsupportedModel

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def test_both_spellings_of_rope_say_the_same() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    old = spec_from_config(LLAMA | {"rope_theta": 500000.0, "rope_scaling": scaling})
    new = spec_from_config(LLAMA | {"rope_parameters": scaling | {"rope_theta": 500000.0}})
    assert old == new
    assert old.rope == RopeSpec(theta=500000.0, kind="llama3", factor=8.0, original_max_len=8192)
    oldest = spec_from_config(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (oldest.rope.kind, oldest.rope.factor, oldest.rope.theta) == ("linear", 2.0, 10000.0)
    assert spec_from_config(LLAMA | {"rope_scaling": None}).rope.kind == "default"


def test_yarn_magnitudes() -> None:
    def rope(**values: Any) -> RopeSpec:
        yarn = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 128}
        return spec_from_config(LLAMA | {"rope_scaling": yarn | values}).rope

    assert rope().attention_factor is None
    assert rope(attention_factor=1.5).attention_factor == 1.5
    # DeepSeek-V3's ratio; with one of the two alone the plain formula holds.
    assert rope(mscale=1.0, mscale_all_dim=1.0).attention_factor == 1.0
    expected = (0.1 * 2.0 * math.log(40.0) + 1) / (0.1 * 0.5 * math.log(40.0) + 1)
    assert rope(mscale=2.0, mscale_all_dim=0.5).attention_factor == pytest.approx(expected)
    assert rope(mscale=2.0).attention_factor is None
    assert rope(factor=None).factor == 512 / 128


def test_windows() -> None:
    def windows(name: str, **values: Any) -> tuple[int | None, list[bool]]:
        spec = spec_from_config(LLAMA | {"architectures": [name]} | values)
        return spec.window, [spec.is_windowed(layer) for layer in range(4)]

    assert windows("MistralForCausalLM", sliding_window=24) == (24, [True] * 4)
    assert windows("MistralForCausalLM", sliding_window=None) == (None, [False] * 4)
    assert windows("MistralForCausalLM") == (4096, [True] * 4)
    # Published Qwen2 files state a window that is not used, and a Llama one that the architecture does not know.
    assert windows("Qwen2ForCausalLM", sliding_window=32, use_sliding_window=False) == (None, [False] * 4)
    assert windows("LlamaForCausalLM", sliding_window=32) == (None, [False] * 4)
    used = {"sliding_window": 32, "use_sliding_window": True}
    assert windows("Qwen2ForCausalLM", **used, max_window_layers=3) == (32, [False, False, False, True])
    assert windows("Qwen3ForCausalLM", **used, layer_types=["sliding_attention", "full_attention"] * 2) == (
        32,
        [True, False, True, False],
    )
    assert windows("Gemma3ForCausalLM", sliding_window=16, sliding_window_pattern=2) == (16, [True, False] * 2)


def test_gemma3_multimodal_file_lists_only_what_departs_from_the_defaults() -> None:
    spec = spec_from_config(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "eos_token_id": [1, 106],
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152},
        }
    )
    # google/gemma-3-4b-pt: 3.88B in its language model.
    assert spec.num_parameters() == 3_880_263_168
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (8, 4, 256, 262208)
    assert spec.rope == RopeSpec(theta=1e6, kind="linear", factor=8.0, original_max_len=131072)
    assert spec.rope_local == RopeSpec(theta=10000.0, original_max_len=131072)
    assert spec.eos_ids == (1, 106)
    assert spec.tied_embeddings and spec.sandwich_norms and spec.norm_plus_one
    assert spec.scale == 256**-0.5


DEEPSEEK: dict[str, Any] = LLAMA | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
MIXTRAL: dict[str, Any] = LLAMA | {
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
QWEN3_MOE: dict[str, Any] = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def test_deepseek_scale_counts_both_parts_of_a_head_and_the_extended_context() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    expected = 32**-0.5 * (0.1 * math.log(4.0) + 1) ** 2
    assert spec_from_config(DEEPSEEK | {"rope_scaling": yarn}).scale == pytest.approx(expected)
    assert spec_from_config(DEEPSEEK | {"rope_parameters": yarn}).scale == pytest.approx(expected)
    assert spec_from_config(DEEPSEEK | {"rope_parameters": yarn | {"type": "default"}}).scale == 32**-0.5
    assert spec_from_config(DEEPSEEK | {"head_dim": 8}).head_dim == 32


def test_routing_of_each_family() -> None:
    assert spec_from_config(MIXTRAL).moe == MoESpec(
        num_experts=4, num_experts_per_token=2, expert_intermediate_size=96, scoring="softmax", normalised=True
    )
    qwen = MoESpec(num_experts=4, num_experts_per_token=2, expert_intermediate_size=32, normalised=False)
    assert spec_from_config(QWEN3_MOE).moe == qwen
    renamed = {("num_local_experts" if key == "num_experts" else key): value for key, value in QWEN3_MOE.items()}
    assert spec_from_config(renamed).moe == qwen
    normalised = spec_from_config(QWEN3_MOE | {"norm_topk_prob": True}).moe
    assert normalised is not None and normalised.normalised
    assert spec_from_config(DEEPSEEK | {"norm_topk_prob": False, "first_k_dense_replace": 1}).moe == MoESpec(
        num_experts=8,
        num_experts_per_token=2,
        expert_intermediate_size=32,
        num_shared_experts=1,
        first_dense_layers=1,
        scoring="sigmoid",
        router_bias=True,
        num_groups=4,
        num_groups_per_token=2,
        normalised=False,
        scaling=2.5,
    )


def test_what_deepseek_files_leave_out_means_what_it_means_to_transformers() -> None:
    left_out = ("q_lora_rank", "n_group", "topk_group")
    spec = spec_from_config({k: v for k, v in DEEPSEEK.items() if k not in left_out} | {"n_routed_experts": 64})
    assert spec.moe is not None and spec.mla is not None
    assert (spec.moe.num_groups, spec.moe.num_groups_per_token, spec.moe.first_dense_layers) == (8, 4, 3)
    assert (spec.moe.num_shared_experts, spec.moe.scaling, spec.moe.normalised) == (1, 2.5, True)
    assert (spec.mla.q_lora_rank, spec.mla.interleaved_rope, spec.num_draft_layers) == (1536, True, 0)
    drafting = spec_from_config(DEEPSEEK | {"num_nextn_predict_layers": 1, "rope_interleave": False})
    assert drafting.num_draft_layers == 1 and drafting.mla is not None and not drafting.mla.interleaved_rope


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (MIXTRAL, {"num_experts_per_tok": 5}, "5 of 4 experts"),
        (MIXTRAL, {"num_experts_per_tok": 0}, "0 of 4 experts"),
        (MIXTRAL, {"num_local_experts": 10**6}, "at most 4096"),
        (QWEN3_MOE, {"moe_intermediate_size": 0}, "0 features of an expert"),
        (QWEN3_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported, only 1"),
        (QWEN3_MOE, {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ({k: v for k, v in QWEN3_MOE.items() if k != "num_experts"}, {}, "lacks 'num_experts', which qwen3_moe needs"),
        (DEEPSEEK, {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported, only 'sigmoid'"),
        (DEEPSEEK, {"topk_method": "greedy"}, "topk_method 'greedy' is not supported, only 'noaux_tc'"),
        (DEEPSEEK, {"moe_layer_freq": 2}, "moe_layer_freq 2"),
        (DEEPSEEK, {"n_group": 3}, "8 experts in 3 groups"),
        (DEEPSEEK, {"n_group": 8}, "of at least 2 each"),
        (DEEPSEEK, {"topk_group": 5}, "5 of 4 groups"),
        (DEEPSEEK, {"topk_group": 1, "num_experts_per_tok": 3}, "3 of 8 experts for a token, of 1 groups of 2"),
        (DEEPSEEK, {"n_shared_experts": -1}, "-1 shared experts"),
        (DEEPSEEK, {"routed_scaling_factor": 0}, "a factor of 0.0"),
        (DEEPSEEK, {"qk_rope_head_dim": 7}, "7 rotated features of a head are odd"),
        (DEEPSEEK, {"q_lora_rank": 0}, "not positive"),
        (DEEPSEEK, {"v_head_dim": 0}, "not positive"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}}, "truncate False of yarn"),
    ],
)
def test_routing_and_latents_that_cannot_be_run_are_refused(
    config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        spec_from_config(config | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausualLM"]}, r"LlamaForCausualLM .*nearest: LlamaForCausalLM.*Qwen3ForCausalLM"),
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported.*supported: LlamaForCausalLM"),
        ({"architectures": []}, "none named"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2"),
        ({"hidden_size": "wide"}, "wrong kind"),
        ({"num_hidden_layers": [3]}, "number of layers"),
        ({"num_attention_heads": 0}, "wrong kind"),
        ({"vocab_size": -5}, "not positive"),
        ({"num_key_value_heads": 3}, "evenly"),
        ({"head_dim": 15}, "odd"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'.*yarn"),
        ({"rope_parameters": {"rope_theta": 0.5}}, "theta 0.5"),
        ({"rope_scaling": "twice"}, "wrong kind"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"architectures": ["Gemma3ForCausalLM"], "layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ({"architectures": ["Gemma3ForCausalLM"], "layer_types": ["full_attention"] * 3}, "3 layer types .* 4 layers"),
    ],
)
def test_what_shoal_does_not_run_is_refused_with_the_key_and_its_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        spec_from_config(LLAMA | changes)


def test_every_key_that_has_no_default_is_asked_for_by_name() -> None:
    needed = set(LLAMA) - {"architectures", "num_key_value_heads"}
    for key in sorted(needed):
        with pytest.raises(UnsupportedModel, match=f"lacks '{key}', which llama needs"):
            spec_from_config({k: v for k, v in LLAMA.items() if k != key})


@pytest.mark.parametrize("junk", [None, True, -1, 0, 10**400, 1.5, float("nan"), "x", [], [None], {}, {"type": []}])
@pytest.mark.parametrize(
    "model",
    [
        LLAMA,
        LLAMA | {"architectures": ["Qwen2ForCausalLM"]},
        LLAMA | {"architectures": ["Gemma3ForCausalLM"]},
        MIXTRAL,
        QWEN3_MOE,
        DEEPSEEK,
    ],
    ids=lambda model: model["architectures"][0],
)
def test_no_value_of_any_key_ends_in_a_traceback(model: dict[str, Any], junk: Any) -> None:
    more = ["head_dim", "rope_scaling", "rope_parameters", "rope_theta", "sliding_window", "layer_types", "hidden_act"]
    more += ["architectures", "text_config", "eos_token_id", "bos_token_id", "rms_norm_eps", "query_pre_attn_scalar"]
    more += ["tie_word_embeddings", "use_sliding_window", "max_window_layers", "model_type", "mlp_only_layers"]
    more += ["n_shared_experts", "first_k_dense_replace", "routed_scaling_factor", "norm_topk_prob", "scoring_func"]
    more += ["rope_interleave", "num_nextn_predict_layers", "decoder_sparse_step", "attention_bias"]
    for key in [*model, *more]:
        config = model | {"use_sliding_window": True, "sliding_window": 8}
        spec_from_config(config)
        try:
            spec = spec_from_config(config | {key: junk})
        except UnsupportedModel:
            continue
        assert spec.num_parameters() > 0


def gguf(arch: str, **values: Any) -> dict[str, Any]:
    keys = {
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "embedding_length": 64,
        "block_count": 4,
        "context_length": 512,
        "feed_forward_length": 96,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    metadata = {f"{arch}.{key}": value for key, value in (keys | values).items()}
    facts = {"shoal.vocab_size": 512, "shoal.tied_embeddings": False, "shoal.qkv_bias": arch == "qwen2"}
    return {"general.architecture": arch, "tokenizer.ggml.eos_token_id": 2} | metadata | facts


def test_gguf_and_config_json_of_one_model_agree() -> None:
    config = LLAMA | {"rms_norm_eps": 1e-6, "eos_token_id": 2}
    assert spec_from_gguf(gguf("llama")) == spec_from_config(config)
    assert spec_from_gguf(gguf("qwen2")) == spec_from_config(config | {"architectures": ["Qwen2ForCausalLM"]})
    qwen3 = spec_from_config(config | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32})
    assert spec_from_gguf(gguf("qwen3", **{"attention.key_length": 32})) == qwen3
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    scaled = {f"rope.scaling.{k}": v for k, v in (("type", "yarn"), ("factor", 4.0), ("original_context_length", 128))}
    assert spec_from_gguf(gguf("llama", **scaled)) == spec_from_config(config | {"rope_scaling": yarn})


def test_gguf_gemma3_has_its_norms_folded_and_its_windows_implied() -> None:
    spec = spec_from_gguf(gguf("gemma3", **{"attention.sliding_window": 16, "rope.freq_base": 1e6}))
    assert not spec.norm_plus_one and spec.sandwich_norms and spec.qk_norm
    assert spec.embedding_scale == 8.0 and spec.activation == "gelu_tanh"
    assert spec.window == 16 and spec.windowed_layers == (True, True, True, True)
    assert spec.rope.theta == 1e6 and spec.rope_local is not None and spec.rope_local.theta == 10000.0


def test_gguf_that_cannot_be_run_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"'phi3' is not supported; supported: llama"):
        spec_from_gguf({"general.architecture": "phi3"})
    with pytest.raises(UnsupportedModel, match="8 experts"):
        spec_from_gguf(gguf("llama", expert_count=8))
    with pytest.raises(UnsupportedModel, match="longrope"):
        spec_from_gguf(gguf("llama", **{"rope.scaling.type": "longrope"}))
    with pytest.raises(UnsupportedModel, match=r"llama\.block_count"):
        spec_from_gguf({k: v for k, v in gguf("llama").items() if k != "llama.block_count"})
    with pytest.raises(UnsupportedModel, match="wrong kind"):
        spec_from_gguf(gguf("llama", **{"attention.head_count_kv": [2, 2, 2, 2]}))
