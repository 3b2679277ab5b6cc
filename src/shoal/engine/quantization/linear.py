"""Linear layers over a QuantizedWeight, behind one interface: the reference in torch, and the kernels by scheme.

Shapes: T tokens, N output features, K input features, G groups of them.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, Protocol

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor

from shoal.engine.quantization.weight import (
    FP8,
    FP8_MAX,
    INT8_MAX,
    KernelWeight,
    QuantizedWeight,
    block_k_of,
    quantize_rows,
)

Implementation = Literal["reference", "triton"]
_FEW_ROWS = 16
"""Up to so many tokens FP8 weights meet activations as they are: reading the weights takes as long, and to round the
activations would be one more kernel."""
_FP8_ARCHITECTURE = 89


class QuantizedLinear(Protocol):
    """y = x W^T + b with W in few bits."""

    out_features: int
    in_features: int
    nbytes: int

    def multiply(self, x_TK: Tensor) -> Tensor:
        """(T, N) in the input's precision."""


class ReferenceLinear:
    """Weights dequantised at every call, and activations rounded as kernels round them: any device, slow, the truth."""

    def __init__(self, weight: QuantizedWeight, bias_N: Tensor | None, device: torch.device) -> None:
        self._weight = weight = moved(weight, device)
        self._bias_N = None if bias_N is None else bias_N.to(device, torch.float32)
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self.nbytes = num_bytes(weight, self._bias_N)

    def multiply(self, x_TK: Tensor) -> Tensor:
        weight, x = self._weight, x_TK.float()
        if weight.scheme.activations != "none":
            values, scales = quantize_rows(x_TK, weight.scheme, weight.group, weight.input_scale)
            size = -(-weight.in_features // scales.shape[1])
            if scales.shape[1] > 1:
                size = weight.group
            x = values.float() * scales.repeat_interleave(size, dim=1)[:, : weight.in_features]
        return F.linear(x, weight.dequantized(), self._bias_N).to(x_TK.dtype)


class WeightOnlyLinear:
    """Float activations; weights of 4 or 8 bits are dequantised between memory and the product."""

    def __init__(self, weight: QuantizedWeight, bias_N: Tensor | None, device: torch.device) -> None:
        self.weight = KernelWeight.of(weight, device)
        self.bias_N = None if bias_N is None else bias_N.to(device)
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self.nbytes = self.weight.nbytes + (0 if self.bias_N is None else self.bias_N.nbytes)

    def multiply(self, x_TK: Tensor) -> Tensor:
        if not len(x_TK):
            return x_TK.new_empty((0, len(self.weight.values)))
        return _kernels().weight_product(x_TK, self.weight, self.bias_N)  # type: ignore[no-any-return]


class ScaledLinear(WeightOnlyLinear):
    """8-bit weights and activations in Triton; on a card with enough tokens to pay, FP8 by torch's own product."""

    def __init__(self, weight: QuantizedWeight, bias_N: Tensor | None, device: torch.device) -> None:
        super().__init__(weight, bias_N, device)
        self._scheme = weight.scheme
        self._input_scale = None if weight.input_scale is None else weight.input_scale.to(device)
        self._fp8 = weight.values_NK.dtype == FP8
        by_channel = weight.rows == 1 and weight.scales_RG.shape[1] == 1
        self._by_torch = (
            self._fp8 and by_channel and device.type == "cuda" and self.out_features % 16 == self.in_features % 16 == 0
        )

    def multiply(self, x_TK: Tensor) -> Tensor:
        weight, scheme = self.weight, self._scheme
        if not len(x_TK) or (self._fp8 and len(x_TK) <= _FEW_ROWS):
            return super().multiply(x_TK)
        values_TK, scales = _kernels().round_rows(
            x_TK,
            weight.values.dtype,
            FP8_MAX if self._fp8 else INT8_MAX,
            weight.group if scheme.activations == "group" else self.in_features,
            fixed=self._input_scale,
            powers_of_two=scheme.scales_are_powers_of_two,
        )
        if self._by_torch and x_TK.dtype == torch.bfloat16:
            return scaled_by_torch(values_TK, scales, weight, self.bias_N)
        return _kernels().scaled_product(  # type: ignore[no-any-return]
            values_TK, scales, weight, self.bias_N, x_TK.dtype
        )


def scaled_by_torch(values_TK: Tensor, scales: Tensor, weight: KernelWeight, bias_N: Tensor | None) -> Tensor:
    """(T, N) in bfloat16 of FP8 by FP8 with a scale for each row of either."""
    scales_T1 = scales.expand(len(values_TK), 1).contiguous()
    scales_1N = weight.scales_RG.view(1, -1)
    y_TN = torch._scaled_mm(  # the public torch.nn.functional.scaled_mm is younger than torch 2.11
        values_TK,
        weight.values.t(),
        scale_a=scales_T1,
        scale_b=scales_1N,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y_TN if bias_N is None else y_TN.add_(bias_N)


def make_linear(
    weight: QuantizedWeight, bias_N: Tensor | None, device: torch.device, implementation: Implementation | None = None
) -> QuantizedLinear:
    """`implementation` None: kernels on a card that has what they need, else the reference.

    Raises ValueError for weights that the card cannot multiply.
    """
    if implementation is None:
        implementation = "triton" if device.type == "cuda" and triton_missing() is None else "reference"
    if implementation == "reference":
        return ReferenceLinear(weight, bias_N, device)
    kernels = _kernels()
    if device.type == "cuda" and weight.values_NK.dtype == FP8 and kernels.architecture() < _FP8_ARCHITECTURE:
        found = kernels.architecture()
        raise ValueError(
            f"FP8 weights need a card of compute capability 8.9 or later, this one has {found // 10}.{found % 10}: "
            "use --quantize int8 or int4 on a float checkpoint"
        )
    if not block_k_of(weight.group, weight.in_features):
        # Groups cut to fewer than 32 features by an odd split over ranks: right all the same.
        return ReferenceLinear(weight, bias_N, device)
    if weight.scheme.activations == "none":
        return WeightOnlyLinear(weight, bias_N, device)
    return ScaledLinear(weight, bias_N, device)


def moved(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    """On `device`, contiguous."""
    zeros, input_scale = weight.zeros_NG, weight.input_scale
    return QuantizedWeight(
        weight.scheme,
        weight.values_NK.to(device).contiguous(),
        weight.scales_RG.to(device).contiguous(),
        rows=weight.rows,
        group=weight.group,
        zeros_NG=None if zeros is None else zeros.to(device).contiguous(),
        input_scale=None if input_scale is None else input_scale.to(device),
    )


def num_bytes(weight: QuantizedWeight, bias_N: Tensor | None) -> int:
    kept = (weight.values_NK, weight.scales_RG, weight.zeros_NG, bias_N)
    return sum(tensor.nbytes for tensor in kept if tensor is not None)


def triton_missing() -> str | None:
    """Why the kernels cannot be had; None if they can."""
    if find_spec("triton") is None:
        return "triton is not installed (`pip install triton`): quantised layers run on torch's own operations"
    return None


@cache
def _kernels() -> ModuleType:
    """The module, imported when first needed: triton takes a second and is not everywhere."""
    missing = triton_missing()
    if missing is not None:
        raise RuntimeError(missing)
    from shoal.engine.quantization import kernels

    return kernels
