"""TorchOps against the definitions: it is what the other implementations are tested against.

Shapes: T tokens, N output features, K input features, V vocabulary, H hidden, D head size.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from shoal.core.model_spec import RopeSpec
from shoal.engine.ops import TorchOps
from shoal.engine.rope import cos_sin_table

OPS = TorchOps(torch.device("cpu"))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Weights are rounded to 8 bits of mantissa or to steps of max/127: the error of a sum of K products of unit normals.
@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-6), ("bfloat16", 4e-3), ("int8", 1.5e-2)])
def test_linear_embedding_and_bias(precision: Any, bound: float) -> None:
    weight_NK, bias_N, x_TK = random(48, 40), random(48, seed=1), random(7, 40, seed=2)
    packed = OPS.pack(weight_NK, bias_N, precision)
    assert (packed.out_features, packed.in_features) == (48, 40)
    expected = (x_TK.double() @ weight_NK.double().T + bias_N).float()
    assert (OPS.linear(x_TK, packed) - expected).norm() / expected.norm() <= bound
    ids_T = torch.tensor([5, 0, 47, 5])
    rows_TK = OPS.embedding(ids_T, OPS.pack(weight_NK, None, precision))
    assert rows_TK.dtype == torch.float32
    assert (rows_TK - weight_NK[ids_T]).norm() / weight_NK[ids_T].norm() <= bound
    sizes = {"float32": 4, "bfloat16": 2, "int8": 1}
    assert packed.nbytes == 48 * 40 * sizes[precision] + 48 * 4 + (48 * 4 if precision == "int8" else 0)


def test_packed_weights_are_a_copy() -> None:
    weight_NK = random(4, 4)
    packed = OPS.pack(weight_NK, None, "float32")
    expected = OPS.linear(torch.eye(4), packed).clone()
    weight_NK.zero_()
    assert torch.equal(OPS.linear(torch.eye(4), packed), expected)


def test_int8_of_a_row_of_zeros_is_zero() -> None:
    packed = OPS.pack(torch.zeros(2, 3), None, "int8")
    assert OPS.linear(torch.ones(1, 3), packed).tolist() == [[0.0, 0.0]]


def test_gated_activations() -> None:
    gate_NK, up_NK, x_TK = random(6, 5), random(6, 5, seed=1), random(4, 5, seed=2)
    packed = OPS.pack_gated(gate_NK, up_NK, "float32")
    assert packed.out_features == 6
    gate, up = x_TK @ gate_NK.T, x_TK @ up_NK.T
    torch.testing.assert_close(OPS.gated(x_TK, packed, "silu"), gate / (1 + torch.exp(-gate)) * up)
    # Hendrycks and Gimpel, arXiv 1606.08415: the tanh form of GELU.
    gelu = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    torch.testing.assert_close(OPS.gated(x_TK, packed, "gelu_tanh"), gelu * up)


def test_norms() -> None:
    x_TH, residual_TH, weight_H = random(3, 8), random(3, 8, seed=1), random(8, seed=2)

    def normed(x: torch.Tensor) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean(dim=1, keepdim=True) + 1e-5) * weight_H

    torch.testing.assert_close(OPS.rms_norm(x_TH, weight_H, 1e-5), normed(x_TH))
    total = x_TH + residual_TH
    result = OPS.add_rms_norm_(x_TH, residual_TH, weight_H, 1e-5)
    torch.testing.assert_close(residual_TH, total)
    torch.testing.assert_close(result, normed(total))


def test_rope_turns_queries_and_keys_leaves_values_and_keeps_lengths() -> None:
    heads, kv_heads, size = 4, 2, 8
    qkv = random(3, (heads + 2 * kv_heads) * size)
    before = qkv.clone()
    table = cos_sin_table(RopeSpec(theta=100.0), size, 16)
    OPS.rope_(qkv, torch.tensor([0, 5, 9]), table, heads, kv_heads, size, None, None, 1e-6)
    turned, original = qkv.view(3, -1, size), before.view(3, -1, size)
    assert torch.equal(turned[:, heads + kv_heads :], original[:, heads + kv_heads :])
    assert torch.equal(turned[0], original[0])
    torch.testing.assert_close(turned.norm(dim=2), original.norm(dim=2))
    # A pair (i, i + D/2) is a complex number, multiplied by exp(i * position * frequency).
    pairs = torch.complex(original[1, 0, :4], original[1, 0, 4:])
    angles = 5 * 100.0 ** (-torch.arange(4) / 4)
    expected = pairs * torch.polar(torch.ones(4), angles)
    torch.testing.assert_close(turned[1, 0], torch.cat([expected.real, expected.imag]))


def test_rope_norms_each_head_first() -> None:
    heads, kv_heads, size = 2, 1, 8
    qkv = random(1, 4 * size)
    before = qkv.clone().view(1, 4, size)
    q_norm, k_norm = random(size, seed=1), random(size, seed=2)
    table = cos_sin_table(RopeSpec(theta=100.0), size, 4)
    OPS.rope_(qkv, torch.tensor([0]), table, heads, kv_heads, size, q_norm, k_norm, 1e-6)
    for head, weight in ((0, q_norm), (1, q_norm), (2, k_norm)):
        torch.testing.assert_close(qkv.view(1, 4, size)[:, head], OPS.rms_norm(before[:, head], weight, 1e-6))


def test_argmax_takes_the_first_of_equals() -> None:
    x_SV = torch.tensor([[0.0, 2.0, 2.0], [-1.0, -1.0, -3.0], [0.0, 1.0, 5.0]])
    assert OPS.argmax(x_SV).tolist() == [1, 0, 2]


def test_bfloat16_activations_stay_close_to_float32() -> None:
    ops = TorchOps(torch.device("cpu"), torch.bfloat16)
    weight_NK, x_TK = random(16, 32), random(4, 32, seed=1)
    y_TN = ops.linear(x_TK.bfloat16(), ops.pack(weight_NK, None, "bfloat16"))
    assert y_TN.dtype == torch.bfloat16
    expected = x_TK @ weight_NK.T
    assert (y_TN.float() - expected).norm() / expected.norm() < 1e-2
    normed = ops.rms_norm(x_TK.bfloat16(), torch.ones(32), 1e-6)
    assert normed.dtype == torch.bfloat16
