"""Bytes of a device, against counts made by hand (planner.md, sections 2.2, 3 and 5)."""

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.cost import memory
from shoal.core.cost.memory import local_cache_bytes
from shoal.core.cost.model import CostModel
from shoal.core.cost.types import CachePrecision
from shoal.core.model_shape import AttentionShape
from shoal.engine.attention.base import kv_bytes_per_token
from shoal.engine.attention.latent_cache import latent_bytes_per_token
from shoal.plan import models
from tests.core.cost.engines import DEEPSEEK, LLAMA_8B, LLAMA_70B, LLAMA_405B, MIXTRAL, engine


def test_weights_of_llama_70b_over_eight_ranks_to_the_byte():
    # 68.45 G in float8, embedding and head in 16 bits, both over eight ranks; norms are on every rank.
    shape = engine(tp=8)
    linear = 80 * (8192 * 128 * (2 * 64 + 2 * 8) + 3 * 8192 * 28672)
    expected = linear // 8 + 2 * 2 * 128256 * 8192 // 8 + 2 * (80 * 2 * 8192 + 8192)
    assert memory.weight_bytes(shape) == expected


@pytest.mark.parametrize(("model", "gigabytes"), [(LLAMA_70B, 141.11), (LLAMA_405B, 811.71), (MIXTRAL, 93.41)])
def test_weights_in_16_bits_are_two_bytes_a_parameter(model, gigabytes):
    assert memory.weight_bytes(engine(model, weights="bfloat16")) == 2 * model.num_parameters()
    assert memory.weight_bytes(engine(model, weights="bfloat16")) / 1e9 == pytest.approx(gigabytes, abs=0.01)


@pytest.mark.parametrize(
    ("model", "weights", "gigabytes"), [(LLAMA_70B, "float8", 72.65), (LLAMA_405B, "float8", 410.05)]
)
def test_weights_of_a_byte_with_embedding_and_head_in_two(model, weights, gigabytes):
    assert memory.weight_bytes(engine(model, weights=weights)) / 1e9 == pytest.approx(gigabytes, abs=0.02)


def test_attention_of_a_mixture_stays_in_16_bits_where_experts_have_four():
    whole = memory.weight_bytes(engine(DEEPSEEK, weights="float4"))
    four_bits_alone = DEEPSEEK.num_parameters() * (0.5 + 1 / 16)
    attention = 61 * DEEPSEEK.layers[0].attention.parameters
    assert whole > four_bits_alone + 1.3 * attention


@pytest.mark.parametrize(
    ("model", "bytes_per_token"), [(LLAMA_70B, 327_680), (LLAMA_405B, 516_096), (DEEPSEEK, 70_272), (MIXTRAL, 131_072)]
)
def test_cache_of_a_token(model, bytes_per_token):
    assert memory.cache_bytes_per_token(engine(model, cache="bfloat16")) == bytes_per_token


def test_ranks_share_heads_but_not_a_latent():
    assert memory.cache_bytes_per_token(engine(tp=8)) == 40_960
    assert memory.cache_bytes_per_token(engine(tp=16, nodes=2)) == 40_960
    assert memory.cache_bytes_per_token(engine(DEEPSEEK, tp=8)) == 70_272


def test_one_sequence_of_128k_tokens_takes_40_gib_of_llama_70b():
    assert memory.sequence_bytes(engine(), 131072) / 2**30 == pytest.approx(40.0, rel=1e-3)


def test_a_window_that_is_not_full_costs_what_is_in_it():
    attention = msgspec.structs.replace(LLAMA_8B.layers[0].attention, kind="windowed", window=4096)
    layer = msgspec.structs.replace(LLAMA_8B.layers[0], attention=attention)
    windowed = engine(msgspec.structs.replace(LLAMA_8B, layers=(layer,)))
    full = engine(LLAMA_8B)
    assert memory.sequence_bytes(windowed, 1000) == memory.sequence_bytes(full, 1000)
    assert memory.sequence_bytes(windowed, 100_000) == memory.sequence_bytes(windowed, 4096)


def test_the_budget_adds_up_and_says_by_how_much_it_does_not_fit():
    budget = CostModel(engine(tp=8)).memory()
    parts = budget.weights + budget.activations + budget.workspace + budget.cache
    assert parts == budget.total
    # vLLM 0.24 is computed to hold 2,986,716 tokens on H200; an H100 has what remains of 79.6 GiB.
    assert 1.3e6 < budget.cache_tokens < 1.7e6
    short = CostModel(engine(LLAMA_405B, tp=4)).memory()
    assert short.cache < 0
    assert short.cache_tokens == 0


@given(
    st.sampled_from([LLAMA_8B, LLAMA_70B, LLAMA_405B, MIXTRAL, DEEPSEEK]),
    st.sampled_from(["bfloat16", "float8", "float4"]),
)
def test_more_ranks_never_hold_more(model, weights):
    held = [memory.weight_bytes(engine(model, tp=tp, nodes=2, weights=weights)) for tp in (1, 2, 4, 8, 16)]
    assert held == sorted(held, reverse=True)
    cache = [memory.cache_bytes_per_token(engine(model, tp=tp, nodes=2)) for tp in (1, 2, 4, 8, 16)]
    assert cache == sorted(cache, reverse=True)


@pytest.mark.parametrize("cache", ["bfloat16", "float8", "int8"])
def test_a_tokens_bytes_are_those_that_the_engine_keeps(cache: CachePrecision) -> None:
    dtype = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn, "int8": torch.int8}[cache]
    heads = AttentionShape(kind="full", num_heads=32, num_kv_heads=8, head_dim=128, parameters=1)
    assert local_cache_bytes(heads, 2, cache) == kv_bytes_per_token(4, 128, dtype)
    latent = AttentionShape(
        kind="latent", num_heads=128, num_kv_heads=1, head_dim=192, parameters=1, latent_dim=576, rope_dim=64
    )
    assert local_cache_bytes(latent, 2, cache) == latent_bytes_per_token(512, 64, dtype)


def test_what_leads_down_to_a_latent_is_whole_on_every_rank():
    """DeepSeek-V3: 7168 x (1536 + 576) of a layer, which 8 ranks hold 8 times."""
    attention = models.model_shape("deepseek-v3").layers[0].attention
    down = 7168 * (1536 + 576)
    assert attention.whole == down
    own = memory.attention_parameters(7168, attention, 8)
    assert own == down + (attention.parameters - down) / 8


def test_a_key_value_head_is_on_every_rank_that_reads_it():
    """Llama-3.1-70B over 16 ranks: each of 8 heads twice. 32 and 8 heads over 5: one in the middle has 3."""
    attention = LLAMA_70B.layers[0].attention
    of_a_head = 8192 * 128
    assert memory.attention_parameters(8192, attention, 16) == of_a_head * (2 * 64 / 16 + 2)
    assert memory.attention_parameters(8192, attention, 8) == attention.parameters / 8
    assert memory.local_heads(LLAMA_8B.layers[0].attention, 5)[1] == 3
    assert memory.local_cache_elements(LLAMA_8B.layers[0].attention, 5) == 3 * 2 * 128
