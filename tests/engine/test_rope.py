"""Rotary tables against transformers' own, and against their definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from shoal.core.model_config import spec_from_config
from shoal.core.model_spec import RopeSpec
from shoal.engine.rope import cos_sin_table, inverse_frequencies

CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn_given_factor": {
        "rope_type": "yarn",
        "factor": 8.0,
        "attention_factor": 1.3,
        "original_max_position_embeddings": 4096,
    },
    "yarn_ramp": {
        "rope_type": "yarn",
        "factor": 40.0,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 4096,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_tables_are_those_of_transformers(name: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = CASES[name] | {"rope_theta": 500000.0}
    config = LlamaConfig(
        hidden_size=1024, num_attention_heads=8, max_position_embeddings=131072, rope_parameters=dict(parameters)
    )
    positions = torch.tensor([[0, 1, 2, 511, 4095, 8191]])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=torch.float32), positions)
    spec = spec_from_config(config.to_dict() | {"architectures": ["LlamaForCausalLM"], "rope_parameters": parameters})
    table = cos_sin_table(spec.rope, 128, 8192)[positions[0]]
    # Both halves of a head turn by the same angles: transformers stores them twice.
    torch.testing.assert_close(table[:, :64], cos[0, :, :64], atol=2e-5, rtol=0)
    torch.testing.assert_close(table[:, 64:], sin[0, :, :64], atol=2e-5, rtol=0)


def test_frequencies_by_definition() -> None:
    inverse, factor = inverse_frequencies(RopeSpec(theta=10000.0), 8)
    torch.testing.assert_close(inverse, torch.tensor([1.0, 0.1, 0.01, 0.001]))
    assert factor == 1.0
    assert inverse_frequencies(RopeSpec(theta=1e4, kind="yarn", factor=4.0, original_max_len=64), 8)[1] == (
        pytest.approx(0.1 * math.log(4.0) + 1.0)
    )


def test_position_zero_does_not_turn() -> None:
    table = cos_sin_table(RopeSpec(theta=10000.0), 16, 3)
    assert table.shape == (3, 16) and table.dtype == torch.float32
    assert table[0].tolist() == [1.0] * 8 + [0.0] * 8
