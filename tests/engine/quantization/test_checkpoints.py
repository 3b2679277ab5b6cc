"""Quantised checkpoints in every form that is read, against the float checkpoints that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.checkpoint.errors import CheckpointError
from shoal.checkpoint.resolve import load_spec
from shoal.core.layout import Layout
from shoal.core.quantization import QuantScheme, at_load
from shoal.core.sharding import Span, shard_of
from shoal.engine.attention.portable import PortableAttention
from shoal.engine.comm.base import Comm
from shoal.engine.model import Decoder
from shoal.engine.native import unavailable_reason
from shoal.engine.ops import TorchOps
from shoal.engine.quantization.stored import FileMatrix, Slice
from shoal.engine.weights import open_weights, read_part
from tests.checkpoints import VOCAB, make_checkpoint
from tests.engine.comm.threads import together
from tests.engine.paged import PagedRun
from tests.engine.test_model import arithmetic
from tests.quantized_checkpoints import FLOAT_ACTIVATIONS, FORMS, make_twins

CPU = torch.device("cpu")
FAMILIES = {"llama2": list(FORMS), "qwen2": ["gptq", "ct_fp8_static"], "mixtral": ["awq"], "deepseek_v3": ["fp8_block"]}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
CASES = [(family, form) for family, forms in FAMILIES.items() for form in forms]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("originals")
    changes = {family: dict(SIZES) for family in FAMILIES}
    del changes["deepseek_v3"]["num_key_value_heads"]
    # Sizes in whole words of 8 numbers; blocks of 32 that do not divide heads, nor experts' features.
    return {family: make_checkpoint(family, directory / family, **changes[family]) for family in FAMILIES}


def logits(
    path: Path,
    name: str = "torch",
    *,
    layout: Layout | None = None,
    comm: Comm | None = None,
    quantize: QuantScheme | None = None,
) -> Tensor:
    spec = load_spec(path)
    ops: Any
    attention: Any
    ops, attention = arithmetic(name)
    if spec.mla is not None:
        attention = PortableAttention()
    shard = None if layout is None else shard_of(spec, layout, 0 if comm is None else comm.rank)
    if comm is not None:
        ops = TorchOps(CPU)
        attention = PortableAttention()
    decoder = Decoder(spec, ops, attention, "float32", device=CPU, shard=shard, tensor=comm, quantize=quantize)
    source = open_weights(path)
    decoder.load(source)
    source.close()
    generator = torch.Generator().manual_seed(4)
    run = PagedRun(decoder, 1)
    parts: list[Tensor] = []
    for n in (20, 1, 9):
        parts += run.extend({0: torch.randint(5, VOCAB, (n,), generator=generator).tolist()}).values()
    return torch.cat(parts) if parts else torch.empty(0)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("family", "form"), CASES)
def test_logits_are_those_of_the_floats_that_the_file_stands_for(
    family: str, form: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    quantised, floats = make_twins(originals[family], tmp_path, form)
    expected = logits(floats)
    found = error(logits(quantised), expected)
    if form in FLOAT_ACTIVATIONS:
        assert found < 1e-5
    else:
        # Activations are rounded too: to 3 bits behind the first, or to 127 steps.
        assert 1e-4 < found < (0.03 if form == "ct_int8" else 0.15)
    if unavailable_reason() is None:
        assert error(logits(quantised, "native"), expected) < 1e-4


@pytest.mark.parametrize("form", ["ct_int4_zeros", "gptq", "awq", "ct_int4_channel", "ct_fp8_block", "ct_fp8_static"])
def test_two_ranks_with_their_slices_give_the_logits_of_one(
    form: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    quantised, floats = make_twins(originals["llama2"], tmp_path, form)
    found = together(tmp_path, 2, lambda comm: logits(quantised, layout=Layout(tp=2), comm=comm))[0]
    if form in FLOAT_ACTIVATIONS or form == "ct_fp8_static":
        assert error(found, logits(quantised)) < 1e-5
    else:
        assert error(found, logits(floats)) < 0.15


@pytest.mark.parametrize("form", list(FORMS))
def test_any_slice_of_a_matrix_has_its_scales(form: str, originals: dict[str, Path], tmp_path: Path) -> None:
    """Also one that begins inside of a group, a block or a word of eight numbers."""
    quantised, floats = make_twins(originals["llama2"], tmp_path, form)
    module = "model.layers.1.mlp.down_proj"
    source, truth = open_weights(quantised), open_weights(floats)
    scheme = load_spec(quantised).quantization
    assert scheme is not None
    expected = truth.tensor(f"{module}.weight")
    assert expected.shape == (64, 160)
    for rows, columns in [((0, 64), (0, 160)), ((16, 48), (80, 160)), ((5, 23), (12, 71)), ((33, 34), (95, 97))]:
        part = Slice(Span(*rows), Span(*columns))
        matrix = FileMatrix(scheme, module, (64, 160), part)
        matrix.tensors = [read_part(source, wanted) for wanted in matrix.parts()]
        weight = matrix.weight(CPU)
        torch.testing.assert_close(weight.dequantized(), expected[slice(*rows), slice(*columns)], atol=1e-7, rtol=1e-6)
        assert weight.values_NK.shape == (len(part.rows), len(part.columns))
    source.close()
    truth.close()


@pytest.mark.parametrize(("weights", "bound"), [("fp8", 0.1), ("int8", 0.05), ("int4", 0.4)])
def test_a_float_checkpoint_is_quantised_at_load(weights: Any, bound: float, originals: dict[str, Path]) -> None:
    expected = logits(originals["llama2"])
    found = error(logits(originals["llama2"], quantize=at_load(weights)), expected)
    assert 1e-4 < found < bound


def test_memory_is_that_of_the_few_bits(originals: dict[str, Path]) -> None:
    def num_bytes(quantize: QuantScheme | None) -> int:
        spec = load_spec(originals["llama2"])
        attention: Any = PortableAttention()
        decoder = Decoder(spec, TorchOps(CPU), attention, "float32", device=CPU, quantize=quantize)
        source = open_weights(originals["llama2"])
        decoder.load(source)
        source.close()
        return decoder.num_weight_bytes

    spec = load_spec(originals["llama2"])
    matrices = sum(spec.attention_matrices() + spec.mlp_matrices(layer) for layer in range(spec.num_layers))
    saved = num_bytes(None) - num_bytes(at_load("fp8"))
    assert 2.8 * matrices < saved < 3 * matrices


@pytest.mark.parametrize(
    ("form", "damage", "message"),
    [
        ("awq", {"qzeros": (5, 4)}, r"qzeros has shape \(5, 4\), the model's configuration says \(5, 8\)"),
        ("gptq", {"scales": (4, 64)}, r"scales has shape \(4, 64\), the model's configuration says \(5, 64\)"),
        ("ct_fp8_channel", {"weight_scale": (64, 5)}, r"weight_scale has shape .* says \(64, 1\) or \(64,\)"),
        ("fp8_block", {"weight": (64, 160)}, r"down_proj\.weight is F32, and its quantization_config says F8_E4M3"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_read(
    form: str, damage: dict[str, Any], message: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    quantised, _ = make_twins(originals["llama2"], tmp_path, form)
    tensors = load_file(quantised / "model.safetensors")
    for key, shape in damage.items():
        name = f"model.layers.1.mlp.down_proj.{key}"
        dtype = torch.float32 if key == "weight" else tensors[name].dtype
        tensors[name] = torch.ones(shape).to(dtype)
    save_file(tensors, quantised / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        logits(quantised)
