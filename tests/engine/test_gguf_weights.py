"""GGUF weights under their Hugging Face names: dequantisation, row order, damaged files.

Tensor suffixes: N output features, K input features.
"""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from shoal.checkpoint.errors import CheckpointError
from shoal.core.sharding import Span
from shoal.engine import gguf_weights
from shoal.engine.gguf_weights import GGUFWeights
from tests.checkpoint.gguf_files import llama_metadata, write_gguf


def one_tensor(tmp_path, value, name="blk.0.ffn_down.weight", **metadata):
    return write_gguf(tmp_path / "m.gguf", llama_metadata() | metadata, {name: value})


def matrix(rows, columns, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("F32", 0), ("F16", 5e-4), ("BF16", 4e-3), ("Q8_0", 5e-3), ("Q4_0", 0.08), ("Q4_1", 0.08)],
)
def test_quantised_weights_come_back(tmp_path, kind, tolerance):
    weight_NK = matrix(6, 256)
    path = one_tensor(tmp_path, (quantize(weight_NK, Kind[kind]), Kind[kind]))
    source = GGUFWeights(path)
    assert source.names() == ["model.layers.0.mlp.down_proj.weight"]
    assert source.shape(source.names()[0]) == (6, 256)
    read_NK = source.tensor(source.names()[0])
    source.close()
    assert read_NK.dtype == torch.float32
    error = np.abs(read_NK.numpy() - weight_NK).max() / np.abs(weight_NK).max()
    assert error <= tolerance
    # Not reached by zeros, by another type's layout, or by rows out of order.
    assert np.corrcoef(read_NK.numpy().ravel(), weight_NK.ravel())[0, 1] > 0.99


def half(block, at):
    return float(np.frombuffer(block[at : at + 2].tobytes(), np.float16)[0])


def scale_and_min(scales, group):
    """The 6-bit scale and minimum of a group of 32, packed in 12 bytes (ggml, get_scale_min_k4)."""
    s = [int(byte) for byte in scales]
    if group < 4:
        return s[group] & 63, s[group + 4] & 63
    return (s[group + 4] & 15) | (s[group - 4] >> 6) << 4, (s[group + 4] >> 4) | (s[group] >> 6) << 4


def q4_k(block):
    values = []
    for group in range(8):
        scale, least = scale_and_min(block[4:16], group)
        for i in range(32):
            quant = int(block[16 + group // 2 * 32 + i]) >> (4 * (group % 2)) & 15
            values.append(half(block, 0) * scale * quant - half(block, 2) * least)
    return values


def q5_k(block):
    values = []
    for group in range(8):
        scale, least = scale_and_min(block[4:16], group)
        for i in range(32):
            low = int(block[48 + group // 2 * 32 + i]) >> (4 * (group % 2)) & 15
            high = int(block[16 + i]) >> group & 1
            values.append(half(block, 0) * scale * (low | high << 4) - half(block, 2) * least)
    return values


def q6_k(block):
    values = []
    for at in range(256):
        part, rest = divmod(at, 128)
        quarter, i = divmod(rest, 32)
        low = int(block[part * 64 + (quarter % 2) * 32 + i]) >> (4 * (quarter // 2)) & 15
        high = int(block[128 + part * 32 + i]) >> (2 * quarter) & 3
        scale = int(block[192 + at // 16].view(np.int8))
        values.append(half(block, 208) * scale * ((low | high << 4) - 32))
    return values


@pytest.mark.parametrize(
    ("kind", "num_bytes", "scalar"), [("Q4_K", 144, q4_k), ("Q5_K", 176, q5_k), ("Q6_K", 210, q6_k)]
)
def test_k_quants_follow_their_definition(tmp_path, kind, num_bytes, scalar):
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (3, 2, num_bytes), dtype=np.uint8)
    for at in (208,) if kind == "Q6_K" else (0, 2):
        halves = rng.uniform(0.001, 0.1, (3, 2, 1)).astype(np.float16)
        blocks[:, :, at : at + 2] = halves.view(np.uint8)
    path = one_tensor(tmp_path, (blocks.reshape(3, -1), Kind[kind]))
    source = GGUFWeights(path)
    read_NK = source.tensor(source.names()[0]).numpy()
    source.close()
    expected_NK = np.array([scalar(row[0]) + scalar(row[1]) for row in blocks])
    np.testing.assert_allclose(read_NK, expected_NK, rtol=1e-5, atol=1e-5)


def interleave(weight, heads):
    """What the converter of llama.cpp does to query and key rows of the llama family: row by row, no reshape tricks."""
    size = weight.shape[0] // heads
    order = [
        head * size + half_ * size // 2 + pair for head in range(heads) for pair in range(size // 2) for half_ in (0, 1)
    ]
    return weight[order]


@pytest.mark.parametrize("suffix", ["weight", "bias"])
def test_llama_rows_return_to_their_order(tmp_path, suffix):
    shape = (64, 32) if suffix == "weight" else (64,)
    query = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    key = query[:32].copy()
    tensors = {
        f"blk.1.attn_q.{suffix}": interleave(query, 4),
        f"blk.1.attn_k.{suffix}": interleave(key, 2),
        f"blk.1.attn_v.{suffix}": key,
    }
    source = GGUFWeights(write_gguf(tmp_path / "m.gguf", llama_metadata(), tensors))
    for name, expected in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        np.testing.assert_array_equal(source.tensor(f"model.layers.1.self_attn.{name}.{suffix}").numpy(), expected)
    source.close()


def test_other_families_keep_their_order_and_gemma_its_names(tmp_path):
    query = matrix(8, 4)
    source = GGUFWeights(write_gguf(tmp_path / "q.gguf", {}, {"blk.0.attn_q.weight": query}, arch="qwen3"))
    np.testing.assert_array_equal(source.tensor("model.layers.0.self_attn.q_proj.weight").numpy(), query)
    source.close()
    norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm")
    tensors = {f"blk.0.{name}.weight": np.full(4, number, np.float32) for number, name in enumerate(norms)}
    source = GGUFWeights(write_gguf(tmp_path / "g.gguf", {}, tensors, arch="gemma3"))
    hugging_face = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
        "self_attn.q_norm",
        "self_attn.k_norm",
    )
    read = {name: source.tensor(f"model.layers.0.{name}.weight")[0].item() for name in hugging_face}
    source.close()
    assert read == {name: float(number) for number, name in enumerate(hugging_face)}


def test_unsupported_type_is_named(tmp_path):
    raw = np.zeros((2, 110), np.uint8)
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.ffn_down\.weight is Q3_K, which is not supported.*Q4_K"):
        GGUFWeights(one_tensor(tmp_path, (raw, Kind.Q3_K)))


def test_truncated_data_is_found_before_anything_is_read(tmp_path):
    path = one_tensor(tmp_path, matrix(8, 64))
    whole = path.read_bytes()
    GGUFWeights(path).close()
    path.write_bytes(whole[: len(whole) - 8 * 64 * 4 + 100])
    with pytest.raises(CheckpointError, match=r"m\.gguf: is truncated: tensor blk\.0\.ffn_down\.weight"):
        GGUFWeights(path)


def test_rows_that_do_not_fit_the_heads(tmp_path):
    with pytest.raises(CheckpointError, match=r"attn_q\.weight has 30 rows, for 4 heads"):
        GGUFWeights(one_tensor(tmp_path, matrix(30, 64), name="blk.0.attn_q.weight"))


def test_real_model(tmp_path):
    from shoal.checkpoint.builtin import pull

    source = GGUFWeights(pull("smollm2-135m"))
    assert len(source.names()) == 272
    assert source.shape("model.embed_tokens.weight") == (49152, 576)
    assert source.shape("model.layers.29.self_attn.k_proj.weight") == (192, 576)
    norm = source.tensor("model.norm.weight")
    source.close()
    assert norm.shape == (576,)
    assert torch.isfinite(norm).all()


@pytest.mark.parametrize("at_once", [32, 96, 1 << 20])
def test_dequantising_in_steps_changes_nothing(tmp_path, monkeypatch, at_once):
    weight_NK = matrix(7, 160)
    path = one_tensor(tmp_path, (quantize(weight_NK, Kind.Q8_0), Kind.Q8_0))
    expected_NK = torch.from_numpy(dequantize(quantize(weight_NK, Kind.Q8_0), Kind.Q8_0))
    monkeypatch.setattr(gguf_weights, "_ELEMENTS_AT_ONCE", at_once)
    source = GGUFWeights(path)
    (name,) = source.names()
    assert torch.equal(source.tensor(name), expected_NK)
    assert torch.equal(source.tensor(name, Span(2, 5), Span(40, 100)), expected_NK[2:5, 40:100])
    source.close()
