"""Counts against published figures and against transformers' own parameters."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from shoal.core.model_config import spec_from_config
from shoal.core.model_spec import PRECISION_BYTES

LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
}
QWEN = {"vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1e6}
CONFIGS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
    },
    "Llama-2-7B": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
    },
    "Llama-3.1-8B": LLAMA3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "Llama-3.1-70B": LLAMA3
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "Llama-3.2-1B": LLAMA3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "Mistral-7B": {
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    "Qwen2.5-7B": QWEN
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "Qwen2.5-0.5B": QWEN
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "Qwen3-8B": QWEN
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "Gemma-3-1B": {
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
    },
    "Mixtral-8x7B": {
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
    },
    "Qwen3-30B-A3B": QWEN
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "DeepSeek-V3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 163840,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    },
}

# Sums of the tensor sizes in the published safetensors files (model cards, or the files' own headers).
PUBLISHED = {
    "SmolLM2-135M": 134_515_008,
    "Llama-2-7B": 6_738_415_616,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.2-1B": 1_235_814_400,
    "Mistral-7B": 7_241_732_096,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen3-8B": 8_190_735_360,
    "Gemma-3-1B": 999_885_952,
    "Mixtral-8x7B": 46_702_792_704,
    "Qwen3-30B-A3B": 30_532_122_624,
    # Without the multi-token prediction layer, with the 256 score corrections of each of 58 routers.
    "DeepSeek-V3": 671_026_419_200,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_published(name: str) -> None:
    assert spec_from_config(CONFIGS[name]).num_parameters() == PUBLISHED[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_that_transformers_makes(name: str) -> None:
    import torch
    import transformers

    config = dict(CONFIGS[name])
    model_class = getattr(transformers, config.pop("architectures")[0])
    # A few layers show every kind; building 61 layers of 256 experts even without memory takes minutes.
    config["num_hidden_layers"] = min(config["num_hidden_layers"], 4)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**config))
    expected = sum(parameter.numel() for parameter in model.parameters())
    # transformers keeps the routers' score corrections as buffers.
    expected += sum(buffer.numel() for key, buffer in model.named_buffers() if key.endswith("score_correction_bias"))
    spec = spec_from_config(config | {"architectures": CONFIGS[name]["architectures"]})
    assert spec.num_parameters() == expected


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_visit() -> None:
    # Mixtral paper (arXiv 2401.04088): 13B active; Qwen3 report: 3.3B; DeepSeek-V3 report (arXiv 2412.19437): 37B.
    active = {name: spec_from_config(config).num_active_parameters() for name, config in CONFIGS.items()}
    assert active["Mixtral-8x7B"] == 12_879_925_248
    assert round(active["Qwen3-30B-A3B"] / 1e9, 1) == 3.4
    assert 37e9 < active["DeepSeek-V3"] < 38e9
    assert active["Llama-3.1-8B"] == PUBLISHED["Llama-3.1-8B"]


def test_weight_and_kv_bytes() -> None:
    smol, llama = (spec_from_config(CONFIGS[name]) for name in ("SmolLM2-135M", "Llama-3.1-8B"))
    assert {p: smol.weight_bytes(p) for p in PRECISION_BYTES} == {
        "float32": 538_060_032,
        "bfloat16": 269_030_016,
        "float16": 269_030_016,
        "int8": 134_515_008,
    }
    assert smol.kv_bytes_per_token(4) == 30 * 2 * 3 * 64 * 4
    assert llama.kv_bytes_per_token(2) == 131_072
    # DeepSeek-V2 (arXiv 2405.04434): the latent and the shared rotary key, for each layer.
    assert spec_from_config(CONFIGS["DeepSeek-V3"]).kv_bytes_per_token(2) == 61 * (512 + 64) * 2
    assert llama.kv_bytes(1000, 2) == 1000 * 131_072


def test_windowed_layers_keep_and_compute_one_window() -> None:
    gemma = spec_from_config(CONFIGS["Gemma-3-1B"])
    per_layer = 2 * 1 * 256 * 2
    assert gemma.kv_bytes(100, 2) == 26 * 100 * per_layer
    assert gemma.kv_bytes(10_000, 2) == (22 * 512 + 4 * 10_000) * per_layer
    growth = gemma.flops_per_token(10_001) - gemma.flops_per_token(10_000)
    assert growth == 4 * (4 * 4 * 256)
    assert gemma.flops_per_token(512) - gemma.flops_per_token(511) == 26 * (4 * 4 * 256)


def test_flops_are_two_a_weight_and_four_a_position_and_feature() -> None:
    smol = spec_from_config(CONFIGS["SmolLM2-135M"])
    head = 2 * 576 * 49152
    block = 576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536
    without_norms = 2 * 30 * block + 4 * 30 * 576
    assert smol.flops_per_token(1) - smol.flops_per_token(1, with_head=False) == head
    assert smol.flops_per_token(1, with_head=False) == without_norms
    assert smol.flops_per_token(101) - smol.flops_per_token(1) == 100 * 4 * 30 * 576
    deepseek = spec_from_config(CONFIGS["DeepSeek-V3"])
    assert deepseek.flops_per_token(2) - deepseek.flops_per_token(1) == 61 * 2 * 128 * (128 + 64 + 128)


def test_core_imports_quickly_and_without_torch() -> None:
    code = (
        "import sys, shoal.core.engine_core, shoal.core.model_config, shoal.core.replay;"
        "print([m for m in ('torch', 'numpy', 'asyncio', 'socket') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
