"""The gate of a gated MLP: activation(gate) * up, of the two halves of one product.

Shapes: T rows, N features of either half.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.engine.ops import Activation

_BLOCK = 1024


@triton.jit
def activated(gate, IS_SILU: tl.constexpr):
    """Of float32. tanh(z) is 2 sigmoid(2 z) - 1, so GELU's 0.5 (1 + tanh(z)) is sigmoid(2 z)."""
    if IS_SILU:
        slope = gate
    else:
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 sqrt(2 / pi)
    return gate * tl.sigmoid(slope)


@triton.jit
def _gate_kernel(x_ptr, out_ptr, x_stride, num_features, IS_SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_features
    start = x_ptr + row * x_stride + columns
    gate = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + num_features, mask=inside, other=0.0).to(tl.float32)
    y = activated(gate, IS_SILU) * up
    tl.store(out_ptr + row * num_features + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


def gate(gate_up_TN: Tensor, activation: Activation) -> Tensor:
    """activation(first half) * second half of each row: (T, 2 N) to (T, N), computed in float32."""
    rows, both = gate_up_TN.shape
    if both % 2 or gate_up_TN.stride(1) != 1:
        raise ValueError(f"two halves of adjacent features are needed, got {both} with strides {gate_up_TN.stride()}")
    out_TN = torch.empty((rows, both // 2), dtype=gate_up_TN.dtype, device=gate_up_TN.device)
    if rows:
        _gate_kernel[(rows, triton.cdiv(both // 2, _BLOCK))](
            gate_up_TN,
            out_TN,
            gate_up_TN.stride(0),
            both // 2,
            IS_SILU=activation == "silu",
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out_TN
