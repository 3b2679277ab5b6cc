"""Tiny random checkpoints as a user would have them: weights, config, tokenizer, chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB = 512
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_QWEN3_MOE = {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama2": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama3": ("LlamaForCausalLM", {"rope_parameters": _LLAMA3_ROPE}),
    "linear_rope": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "yarn_rope": (
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": 24}),
    "llama_biased": ("LlamaForCausalLM", {"attention_bias": True}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2_windowed": (
        "Qwen2ForCausalLM",
        {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {
            "head_dim": 32,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 24,
            "num_hidden_layers": 4,
        },
    ),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 24}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _QWEN3_MOE | {"norm_topk_prob": True}),
    "qwen3_moe_plain_weights": ("Qwen3MoeForCausalLM", _QWEN3_MOE),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        _DEEPSEEK
        | {
            "q_lora_rank": 24,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.5,
            "rms_norm_eps": 1e-4,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "mscale": 1.0,
                "mscale_all_dim": 0.8,
            },
        },
    ),
    "deepseek_v3_plain": (
        "DeepseekV3ForCausalLM",
        _DEEPSEEK
        | {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": False,
            "rope_interleave": False,
            "attention_bias": True,
        },
    ),
}


def make_checkpoint(family: str, path: Path, **overrides: Any) -> Path:
    """Save a random model of `family` with its tokenizer under `path`, and return it."""
    import torch
    import transformers

    name, changes = FAMILIES[family]
    model_class = getattr(transformers, name)
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = model_class.config_class(**(values | changes | overrides))
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Wide enough that two best logits rarely lie close; biases and norms away from their trivial values.
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.6 if "embed" in key or "lm_head" in key else 0.12))
        for key, buffer in model.named_buffers():
            if key.endswith("score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    model.save_pretrained(path, safe_serialization=True)
    save_tokenizer(path)
    return path


def save_tokenizer(path: Path) -> None:
    """A byte-level BPE of 512 tokens: specials, the 256 bytes, merges learned from a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    text = ["many gpus one movement, a shoal of fish turns as one and nobody gives the order"] * 4
    text += [
        '{"name": "shoal", "size": 12, "tags": ["fast", "honest"], "ok": true}',
        "the quick brown fox jumps over",
    ] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        min_frequency=1,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    while tokenizer.get_vocab_size() < VOCAB:
        tokenizer.add_special_tokens([f"<|reserved_{tokenizer.get_vocab_size()}|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "add_bos_token": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 4]}))
