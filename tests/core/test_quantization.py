"""quantization_config of files as the hub has them; what cannot be read is refused by name."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from shoal.core.layout import Layout
from shoal.core.model_config import spec_from_config
from shoal.core.model_spec import UnsupportedModel
from shoal.core.quantization import QuantScheme, at_load, require_storable
from shoal.core.quantization_config import scheme_from_config
from shoal.core.sharding import shard_of

INPUTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
DEEPSEEK = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}} | more


def scheme(**fields: Any) -> QuantScheme:
    return QuantScheme(**fields)


def read(config: dict[str, Any]) -> QuantScheme | None:
    return scheme_from_config({"quantization_config": config})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            compressed(WEIGHTS, INPUTS, ignore=["lm_head"]),
            scheme(weights="fp8", form="compressed-tensors", activations="token"),
        ),
        (
            compressed(WEIGHTS | {"strategy": "tensor"}, INPUTS | {"strategy": "tensor", "dynamic": False}),
            scheme(weights="fp8", form="compressed-tensors", rows=0, activations="tensor"),
        ),
        (
            compressed(WEIGHTS | {"type": "int"}, INPUTS | {"type": "int"}),
            scheme(weights="int8", form="compressed-tensors", activations="token"),
        ),
        (compressed(INT4), scheme(weights="int4", form="compressed-tensors", group=128)),
        (
            compressed(INT4 | {"symmetric": False, "actorder": "weight"}),
            scheme(weights="int4", form="compressed-tensors", group=128, symmetric=False),
        ),
        (
            compressed(
                WEIGHTS | {"strategy": "block", "block_structure": "128x128"},
                INPUTS | {"strategy": "group", "group_size": 128},
            ),
            scheme(weights="fp8", form="compressed-tensors", group=128, rows=128, activations="group"),
        ),
        (DEEPSEEK, scheme(weights="fp8", form="fp8", group=128, rows=128, activations="group")),
        (
            DEEPSEEK | {"scale_fmt": "ue8m0"},
            scheme(weights="fp8", form="fp8", group=128, rows=128, activations="group", scales_are_powers_of_two=True),
        ),
        (
            {"quant_method": "fp8", "activation_scheme": "static"},
            scheme(weights="fp8", form="fp8", rows=0, activations="tensor"),
        ),
        (GPTQ, scheme(weights="int4", form="gptq", group=128, symmetric=False, zero_offset=1)),
        (
            GPTQ | {"checkpoint_format": "gptq_v2", "group_size": -1},
            scheme(weights="int4", form="gptq", symmetric=False),
        ),
        (AWQ, scheme(weights="int4", form="awq", group=128, symmetric=False)),
        ({}, None),
    ],
)
def test_forms_of_the_hub(config: dict[str, Any], expected: QuantScheme | None) -> None:
    assert read(config) == expected
    # Models of text and images say it beside their text part or in it.
    assert scheme_from_config({"text_config": {"quantization_config": config}}) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quant_method is 'bitsandbytes', .*supported: compr"),
        ({"quant_method": "gptqq"}, r"\(nearest: gptq\)"),
        ({"bits": 4}, "quant_method is None"),
        (GPTQ | {"desc_act": True}, "desc_act is True, .* take a checkpoint with desc_act false"),
        (GPTQ | {"bits": 3}, r"bits is 3, which is not supported \(only 4\); supported: .*gptq: 4 bits"),
        (GPTQ | {"group_size": "128"}, "group_size is '128'"),
        (GPTQ | {"dynamic": {"-:.*": {}}}, "dynamic is"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'"),
        ({key: AWQ[key] for key in AWQ if key != "group_size"}, "lacks 'group_size'"),
        (DEEPSEEK | {"fmt": "e5m2"}, "fmt is 'e5m2'"),
        (DEEPSEEK | {"activation_scheme": "static"}, "with weight_block_size only 'dynamic'"),
        (DEEPSEEK | {"weight_block_size": [100, 128]}, r"weight_block_size is \[100, 128\]"),
        (compressed(INT4 | {"actorder": "group"}), r"config_groups\.group_0\.weights\.actorder is 'group'"),
        (compressed(WEIGHTS | {"num_bits": 4}, INPUTS | {"num_bits": 4}), "float of 4 bits by channel"),
        (compressed(WEIGHTS, INPUTS | {"type": "int"}), r"input_activations is 'int of 8 bits'"),
        (compressed(WEIGHTS, INPUTS, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config.format"),
        (compressed(WEIGHTS | {"type": "int", "symmetric": False}), "symmetric is False"),
        (compressed(3), "wrong kind"),  # type: ignore[arg-type]
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups is {}"),
        (
            compressed(INT4, kv_cache_scheme=FP8_CACHE | {"type": "int"}),
            "kv_cache_scheme is 'int of 8 bits by tensor'.*scales of a KV cache only for symmetric FP8",
        ),
        (compressed(INT4, kv_cache_scheme=FP8_CACHE | {"strategy": "group"}), "float of 8 bits by group"),
    ],
)
def test_others_are_refused_with_those_that_can_be_read(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        read(config)


def test_groups_that_differ_are_refused() -> None:
    config = compressed(INT4)
    config["config_groups"]["group_1"] = compressed(INT4 | {"group_size": 64})["config_groups"]["group_0"]
    with pytest.raises(UnsupportedModel, match=r"config_groups is \['group_0', 'group_1'\].*one form for all layers"):
        read(config)


def test_what_is_quantised_at_load() -> None:
    for weights in ("fp8", "int8", "int4"):
        found = at_load(weights)  # type: ignore[arg-type]
        assert found.weights == weights
        assert found.covers("model.layers.3.mlp.up_proj") and found.covers("model.layers.3.self_attn.q_proj")
        for kept in ("lm_head", "model.embed_tokens", "model.layers.3.mlp.gate"):
            assert not found.covers(kept)


def test_wishes_that_exclude_each_other_are_refused() -> None:
    assert require_storable("float32", None, None) is None
    assert require_storable("bfloat16", "fp8", None) == "fp8"
    assert require_storable("int8", None, None) == require_storable("int8", "int8", None) == "int8"
    assert require_storable("bfloat16", None, read(AWQ)) == "int4"
    with pytest.raises(ValueError, match="quantize is fp8 and dtype is int8: leave out one"):
        require_storable("int8", "fp8", None)
    with pytest.raises(ValueError, match=r"quantised already \(int4, awq\): leave out quantize"):
        require_storable("bfloat16", "int8", read(AWQ))


def test_ranks_are_cut_between_groups_where_each_can_have_one() -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 512,
        "intermediate_size": 2176,
        "num_attention_heads": 8,
        "num_hidden_layers": 1,
        "vocab_size": 512,
        "max_position_embeddings": 512,
    }
    spec = spec_from_config(config)
    plain = [len(shard_of(spec, Layout(tp=2), rank).mlp) for rank in range(2)]
    assert plain == [1088, 1088]
    quantised = msgspec.structs.replace(spec, quantization=read(AWQ))
    assert [len(shard_of(quantised, Layout(tp=2), rank).mlp) for rank in range(2)] == [1024, 1152]
    # 17 groups over 8 ranks: one of them would have half as much again to do.
    many = [len(shard_of(quantised, Layout(tp=8), rank).mlp) for rank in range(8)]
    assert sum(many) == 2176 and set(many) == {256, 288}


def test_a_file_may_have_floats_and_scales_of_a_cache() -> None:
    only_cache = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": FP8_CACHE}
    assert read(only_cache) is None
    by_head = compressed(INT4, kv_cache_scheme=FP8_CACHE | {"strategy": "attn_head"})
    assert read(by_head) == read(compressed(INT4, kv_cache_scheme={"dynamic": True})) == read(compressed(INT4))
