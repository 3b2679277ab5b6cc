"""Random inputs for kernels: fresh, without zeros, results poisoned. And what they are compared with, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the last rounding, and of sums in float32 beside ones in another order.
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}


class Fuzz:
    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def number(self, low: int, high: int) -> int:
        """Both may be."""
        return int(torch.randint(low, high + 1, (1,), generator=self._generator))

    def one_of(self, *choices: int) -> int:
        return choices[self.number(0, len(choices) - 1)]

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32, padding: int = 0) -> Tensor:
        """Normal numbers, none of them 0. With `padding` rows lie that much further apart, with NaN between them."""
        x = torch.randn(shape, generator=self._generator)
        x = torch.where(x.abs() < 1e-3, 1e-3, x).to(dtype)
        if not padding:
            return x.to(DEVICE)
        wide = torch.full((*shape[:-1], shape[-1] + padding), float("nan"), dtype=dtype)
        wide[..., : shape[-1]] = x
        return wide.to(DEVICE)[..., : shape[-1]]

    def ids(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator).to(DEVICE)

    def permutation(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._generator).to(DEVICE)


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """To a few roundings to `dtype`, of each number and of the largest beside it."""
    bound = RELATIVE[dtype] * factor
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(got.double().cpu(), expected.double().cpu(), rtol=bound, atol=bound * scale / 4)
