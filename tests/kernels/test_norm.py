"""Norms against the portable ones and their definition, over random shapes.

Shapes: T rows, H features.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoal.engine.kernels import unavailable_reason
from shoal.engine.ops import TorchOps
from tests.kernels.fuzz import DEVICE, DTYPES, Fuzz, assert_near

if (reason := unavailable_reason(DEVICE)) is not None:
    pytest.skip(reason, allow_module_level=True)

from shoal.engine.kernels.norm import rms_norm  # noqa: E402


def normed(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    x = x_TH.double()
    return x / torch.sqrt((x * x).mean(dim=1, keepdim=True) + eps) * weight_H.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(8))
def test_norms_of_random_rows(seed: int, dtype: torch.dtype) -> None:
    """With and without a residual, with and without a norm before it, as between a model's layers."""
    fuzz = Fuzz(seed)
    rows, features, eps = fuzz.number(1, 5), fuzz.one_of(1, 2, 33, 64, 100, 576, 1000, 2048), 1e-5
    x_TH = fuzz.floats(rows, features, dtype=dtype, padding=fuzz.one_of(0, 3))
    # One more than a number around 0 is what files with norm weights minus one come to.
    weight_H, first_H = fuzz.floats(features) + 1.0, fuzz.floats(features)
    before = x_TH.clone()
    assert_near(rms_norm(x_TH, weight_H, eps), normed(x_TH, weight_H, eps), dtype)

    ops = TorchOps(DEVICE, dtype)
    for first in (None, first_H):
        residual_TH = fuzz.floats(rows, features, dtype=dtype)
        expected_residual = residual_TH.clone()
        expected = ops.add_rms_norm_(x_TH.contiguous(), expected_residual, weight_H, eps, first)
        got = rms_norm(x_TH, weight_H, eps, residual_TH=residual_TH, first_weight_H=first)
        assert got.dtype == dtype and got.is_contiguous()
        assert_near(residual_TH, expected_residual, dtype)
        # The norm is of the residual as it is stored.
        assert_near(got, normed(residual_TH, weight_H, eps), dtype)
        assert_near(got, expected, dtype, factor=4)
    assert torch.equal(x_TH, before), "x itself stays as it was"


def test_a_rows_bits_do_not_depend_on_the_batch() -> None:
    fuzz = Fuzz(3)
    x_TH, weight_H = fuzz.floats(7, 300, dtype=torch.bfloat16), fuzz.floats(300)
    together = rms_norm(x_TH, weight_H, 1e-6)
    assert all(torch.equal(rms_norm(x_TH[i : i + 1], weight_H, 1e-6)[0], together[i]) for i in range(7))
    assert rms_norm(x_TH[:0], weight_H, 1e-6).shape == (0, 300)


def test_what_does_not_fit_is_refused() -> None:
    fuzz = Fuzz(4)
    x_TH, weight_H = fuzz.floats(2, 8), fuzz.floats(8)
    with pytest.raises(ValueError, match="must be 8 float32"):
        rms_norm(x_TH, weight_H[:7], 1e-6)
    with pytest.raises(ValueError, match="the residual must be"):
        rms_norm(x_TH, weight_H, 1e-6, residual_TH=x_TH.bfloat16())
    with pytest.raises(ValueError, match="must be adjacent"):
        rms_norm(fuzz.floats(8, 8).T, weight_H, 1e-6)
