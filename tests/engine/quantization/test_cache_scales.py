"""Scales of an FP8 KV cache in checkpoints: by which names, of which sizes, and which of them a rank takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.checkpoint.errors import CheckpointError
from shoal.checkpoint.resolve import load_spec
from shoal.core.layout import Layout
from shoal.core.sharding import shard_of
from shoal.engine.attention.portable import PortableAttention
from shoal.engine.model import Decoder
from shoal.engine.ops import TorchOps
from shoal.engine.weights import open_weights
from tests.checkpoints import make_checkpoint

CPU = torch.device("cpu")
HEADS = torch.tensor([0.5, 0.25])
Scales = dict[str, Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return make_checkpoint("llama2", tmp_path_factory.mktemp("cache-scales"), **sizes)


def with_scales(original: Path, scales: Scales) -> None:
    """All of layer 1's, in the place of those that were there."""
    file = original / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.endswith("_scale")}
    save_file(tensors | {f"model.layers.1.self_attn.{name}": scale for name, scale in scales.items()}, file)


def loaded(path: Path, kv_dtype: torch.dtype = torch.float8_e4m3fn, tp: int = 1, rank: int = 0) -> Decoder:
    spec = load_spec(path)
    shard = shard_of(spec, Layout(tp=tp), rank)
    attention: Any = PortableAttention()
    decoder = Decoder(
        spec, cast("Any", TorchOps(CPU)), attention, "float32", device=CPU, kv_dtype=kv_dtype, shard=shard
    )
    source = open_weights(path)
    decoder.load(source)
    source.close()
    return decoder


@pytest.mark.parametrize(
    ("scales", "keys", "values"),
    [
        ({"k_scale": torch.tensor(0.5), "v_scale": torch.tensor([2.0])}, [0.5, 0.5], [2.0, 2.0]),
        ({"k_proj.k_scale": HEADS, "v_proj.v_scale": HEADS.flip(0).view(2, 1, 1)}, [0.5, 0.25], [0.25, 0.5]),
        (
            {"k_proj.output_scale": torch.tensor([0.5]).bfloat16(), "v_proj.output_scale": torch.tensor([4.0])},
            [0.5, 0.5],
            [4.0, 4.0],
        ),
        ({"kv_scale": torch.tensor(0.125)}, [0.125, 0.125], [0.125, 0.125]),
    ],
    ids=["tensor", "heads", "outputs", "both"],
)
def test_each_layer_and_rank_has_its_own(
    original: Path, scales: Scales, keys: list[float], values: list[float]
) -> None:
    with_scales(original, scales)
    first, second = loaded(original).layers
    assert first.kv_scales is None and second.kv_scales is not None
    assert [part.tolist() for part in second.kv_scales] == [keys, values]
    for rank in (0, 1):
        own = loaded(original, tp=2, rank=rank).layers[1].kv_scales
        assert own is not None and [part.tolist() for part in own] == [[keys[rank]], [values[rank]]]
    assert loaded(original, torch.bfloat16).layers[1].kv_scales is None


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"k_scale": HEADS}, r"self_attn\.v_scale is missing: a KV cache has scales of both"),
        ({"k_scale": torch.ones(3), "v_scale": HEADS}, r"k_scale has shape \(3,\).* one for each of 2 key/value heads"),
        ({"k_scale": HEADS, "v_scale": HEADS * 0}, r"v_scale must be positive, got \[0\.0, 0\.0\]"),
        ({"k_scale": HEADS * float("nan"), "v_scale": HEADS}, "k_scale must be positive"),
    ],
)
def test_what_makes_no_sense_is_refused(original: Path, scales: Scales, message: str) -> None:
    with_scales(original, scales)
    with pytest.raises(CheckpointError, match=message):
        loaded(original)
