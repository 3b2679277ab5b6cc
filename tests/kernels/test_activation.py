"""Gates against their definitions, over random shapes, and through the ops.

Shapes: T rows, N features of a half, K input features.
"""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)

from shoal.engine.kernels import unavailable_reason
from shoal.engine.ops import TorchOps
from tests.kernels.fuzz import DEVICE, DTYPES, Fuzz, assert_near

if (reason := unavailable_reason(DEVICE)) is not None:
    pytest.skip(reason, allow_module_level=True)

from shoal.engine.kernels.activation import gate  # noqa: E402
from shoal.engine.triton_ops import TritonOps  # noqa: E402


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_gates_of_random_rows(seed: int, dtype: torch.dtype, activation: Literal["silu", "gelu_tanh"]) -> None:
    fuzz = Fuzz(seed)
    rows, features = fuzz.number(1, 6), fuzz.one_of(1, 31, 128, 1024, 1500)
    x = 4 * fuzz.floats(rows, 2 * features, dtype=dtype, padding=fuzz.one_of(0, 5))
    first, second = x.double().chunk(2, dim=1)
    activated = F.silu(first) if activation == "silu" else F.gelu(first, approximate="tanh")
    got = gate(x, activation)
    assert got.dtype == dtype
    assert_near(got, activated * second, dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_large_numbers_stay_finite(activation: Literal["silu", "gelu_tanh"]) -> None:
    x = torch.tensor([[-200.0, -30.0, 0.0, 30.0, 200.0, 1.0, 1.0, 1.0, 1.0, 1.0]], device=DEVICE)
    expected = torch.tensor([[0.0, 0.0, 0.0, 30.0, 200.0]])
    torch.testing.assert_close(gate(x, activation).cpu(), expected, atol=1e-9, rtol=0)


def test_gated_products_of_the_ops() -> None:
    fuzz = Fuzz(9)
    gate_NK, up_NK, x_TK = fuzz.floats(40, 24), fuzz.floats(40, 24), fuzz.floats(5, 24)
    ops, plain = TritonOps(DEVICE, torch.float32), TorchOps(DEVICE)
    for activation in ("silu", "gelu_tanh"):
        expected = plain.gated(x_TK, plain.pack_gated(gate_NK, up_NK, "float32"), activation)  # type: ignore[arg-type]
        got = ops.gated(x_TK, ops.pack_gated(gate_NK, up_NK, "float32"), activation)  # type: ignore[arg-type]
        assert_near(got, expected, torch.float32, factor=4)


def test_an_odd_number_of_features_is_refused() -> None:
    with pytest.raises(ValueError, match="two halves"):
        gate(torch.ones(2, 7, device=DEVICE), "silu")
