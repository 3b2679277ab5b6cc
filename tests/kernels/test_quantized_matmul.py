"""Triton products with weights of few bits, interpreted on the CPU, against the dequantised float product."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from shoal.core.quantization import QuantScheme, at_load
from shoal.engine.quantization import linear
from shoal.engine.quantization.linear import ReferenceLinear, ScaledLinear, WeightOnlyLinear, make_linear
from shoal.engine.quantization.weight import (
    FP8,
    KernelWeight,
    QuantizedWeight,
    packed_nibbles,
    quantize_rows,
    quantized,
    stacked,
)

pytest.importorskip("triton", reason="triton is not installed")
from shoal.engine.quantization import kernels  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def scheme(weights: str, **changes: object) -> QuantScheme:
    return QuantScheme(weights=weights, form="at_load", **changes)  # type: ignore[arg-type]


def random_weight(draw: random.Random, kind: QuantScheme, n: int, k: int, rows: int, group: int) -> QuantizedWeight:
    """Every stored number is drawn, scales differ by up to a factor of 8, none is 0."""
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    shape = (-(-n // rows), -(-k // group))
    scales = torch.exp2(torch.rand(shape, generator=generator) * 3 - 8)
    zeros = None
    if kind.weights == "int4":
        values = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        zeros = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    elif kind.weights == "int8":
        values = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    else:
        values = (torch.randn((n, k), generator=generator) * 50).to(FP8)
    fixed = torch.tensor(0.02, device=DEVICE) if kind.activations == "tensor" else None
    values, scales = values.to(DEVICE), scales.to(DEVICE)
    zeros = None if zeros is None else zeros.to(DEVICE)
    return QuantizedWeight(kind, values, scales, rows=rows, group=group, zeros_NG=zeros, input_scale=fixed)


def tokens(draw: random.Random, t: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    return torch.randn((t, k), generator=generator).to(DEVICE, dtype)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel does not write is not a number."""
    empty = torch.empty

    def poisoned(*size: object, **options: object) -> Tensor:
        found = empty(*size, **options)  # type: ignore[arg-type]
        return found.fill_(float("nan")) if found.dtype.is_floating_point else found.fill_(77)

    monkeypatch.setattr(kernels.torch, "empty", poisoned)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(
        x.double(), weight.dequantized().double(), None if bias is None else bias.double()
    )


@pytest.mark.parametrize("seed", range(16))
def test_weight_only_products(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    kind = scheme(("int4", "fp8", "int4", "int8")[seed % 4])
    group = draw.choice([32, 64, 96, 128, 256])
    k = group * draw.randint(1, 3)
    if draw.random() < 0.4:
        group = k = draw.choice([96, 160, 200, 333])
    n, t = draw.choice([1, 16, 63, 64, 70, 130]), draw.choice([1, 2, 15, 16, 17, 33, 65, 130])
    weight = random_weight(draw, kind, n, k, 1, group)
    bias = tokens(draw, 1, n)[0] if draw.random() < 0.5 else None
    x = tokens(draw, t, 2 * k)[:, :k]  # rows need not lie side by side
    poison(monkeypatch)
    assert error(WeightOnlyLinear(weight, bias, DEVICE).multiply(x), product(x, weight, bias)) < 1e-5


@pytest.mark.parametrize("seed", range(16))
def test_products_of_8_bit_tokens(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact but for the order of sums: both sides have the same rounded tokens."""
    draw = random.Random(100 + seed)
    activations = ("token", "group", "tensor", "token")[seed % 4]
    kind = scheme("int8" if seed % 4 == 3 else "fp8", activations=activations)
    rows = group = draw.choice([32, 64, 128])
    k = draw.choice([32, 100, 128, 333, 384])
    if activations != "group":
        rows, group = 1, k
    n, t = draw.choice([1, 16, 64, 70, 130, 200]), draw.choice([1, 2, 16, 17, 33, 65, 130])
    weight = random_weight(draw, kind, n, k, rows, group)
    bias = tokens(draw, 1, n)[0] if draw.random() < 0.5 else None
    x, dtype = tokens(draw, t, k), weight.values_NK.dtype
    values, scales = quantize_rows(x, kind, group, weight.input_scale)
    size = group if activations == "group" else k
    poison(monkeypatch)
    found = kernels.scaled_product(values, scales, KernelWeight.of(weight, DEVICE), bias, torch.float32)
    assert values.dtype == dtype
    rounded = values.float() * scales.repeat_interleave(size, dim=1)[:, :k]
    assert error(found, product(rounded, weight, bias)) < 1e-5


@pytest.mark.parametrize("kind", ["int4", "fp8", "int8"])
def test_a_long_product_of_few_rows_is_split_and_added_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(7)
    k, n = 128 * 37, 24
    bias, x = tokens(draw, 1, n)[0], tokens(draw, 3, k)
    poison(monkeypatch)
    assert kernels._Tiles(3, n, k, 128).split == 8
    weight = random_weight(draw, scheme(kind), n, k, 1, 128 if kind == "int4" else k)
    assert error(WeightOnlyLinear(weight, bias, DEVICE).multiply(x), product(x, weight, bias)) < 1e-5
    if kind != "int4":
        weight = random_weight(draw, scheme(kind, activations="token"), n, k, 1, k)
        values, scales = quantize_rows(x, weight.scheme, k, None)
        found = kernels.scaled_product(values, scales, KernelWeight.of(weight, DEVICE), bias, torch.float32)
        assert error(found, product(values.float() * scales, weight, bias)) < 1e-5


@pytest.mark.parametrize("seed", range(8))
def test_rounded_tokens(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(200 + seed)
    activations = ("token", "group", "tensor", "group")[seed % 4]
    kind = scheme("int8" if seed < 4 else "fp8", activations=activations, scales_are_powers_of_two=seed % 4 == 3)
    t, k, group = draw.randint(1, 9), draw.choice([16, 100, 1030, 1500]), draw.choice([32, 128])
    x = tokens(draw, t, k) * torch.logspace(-3, 3, t, device=DEVICE)[:, None]
    fixed = torch.tensor(0.02, device=DEVICE) if activations == "tensor" else None
    expected, expected_scales = quantize_rows(x, kind, group, fixed)
    poison(monkeypatch)
    size = group if activations == "group" else k
    top = 127.0 if kind.weights == "int8" else 448.0
    found, scales = kernels.round_rows(
        x, expected.dtype, top, size, fixed=fixed, powers_of_two=kind.scales_are_powers_of_two
    )
    torch.testing.assert_close(scales, expected_scales)
    if kind.weights == "int8":
        assert int((found.int() - expected.int()).abs().max()) == 0
    else:
        assert error(found.float(), expected.float()) < 1e-3  # a scale's last bit may move a number to its neighbour


@pytest.mark.parametrize("t", [3, 40])
@pytest.mark.parametrize("weights", ["fp8", "int8", "int4"])
def test_layers_of_both_kinds_agree(weights: str, t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a decoder has them: bfloat16, quantised at load, several of one input."""
    draw = random.Random(9)
    parts = [quantized(tokens(draw, n, 256) * 0.1, at_load(weights)) for n in (64, 24, 24)]
    weight, bias = stacked(parts), tokens(draw, 1, 112)[0]
    x = tokens(draw, t, 256, torch.bfloat16)
    poison(monkeypatch)
    found = make_linear(weight, bias, DEVICE, "triton")
    assert isinstance(found, WeightOnlyLinear if weights == "int4" else ScaledLinear)
    truth = make_linear(weight, bias, DEVICE)
    assert isinstance(truth, ReferenceLinear)
    assert (found.out_features, found.in_features) == (truth.out_features, truth.in_features) == (112, 256)
    y = found.multiply(x)
    assert y.dtype == torch.bfloat16 and y.shape == (t, 112)
    # Few FP8 tokens are not rounded.
    assert error(y, truth.multiply(x)) < (0.04 if weights == "fp8" and t <= 16 else 5e-3)
    assert found.multiply(x[:0]).shape == (0, 112)


def test_a_byte_holds_numbers_half_a_block_apart() -> None:
    values = torch.arange(48, dtype=torch.uint8)[None] % 16
    packed = packed_nibbles(values, 32)
    assert packed.shape == (1, 32)
    assert packed[0, 3] == values[0, 3] + 16 * values[0, 19] and packed[0, 18] == values[0, 34]


def test_groups_too_small_for_kernels_are_left_to_torch() -> None:
    weight = random_weight(random.Random(1), scheme("int4"), 8, 48, 1, 16)
    assert isinstance(make_linear(weight, None, DEVICE, "triton"), ReferenceLinear)


def test_torchs_own_product_of_rows_and_channels() -> None:
    """The arguments' order and layout: torch has it on a CPU too."""
    draw = random.Random(3)
    weight = random_weight(draw, scheme("fp8", activations="token"), 48, 64, 1, 64)
    x, bias = tokens(draw, 20, 64), tokens(draw, 1, 48)[0].bfloat16()
    values, scales = quantize_rows(x, weight.scheme, 64, None)
    found = linear.scaled_by_torch(values, scales, KernelWeight.of(weight, DEVICE), bias)
    assert error(found, product(values.float() * scales, weight, bias)) < 5e-3
