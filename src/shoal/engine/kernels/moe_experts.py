"""Rows through their experts: two grouped products with a gate between them, and the weighted sum of what comes out.

How many rows an expert has is known to the device alone: the grid has as many tiles as there can be, and those that
nobody needs end at once.

Shapes: T tokens, K experts that a token visits, R = T K rows, L experts that are here, H hidden, N features between the
products, C features of a product's input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.engine.kernels.activation import activated
from shoal.engine.kernels.moe_routing import schedule
from shoal.engine.ops import Activation

_COMBINED = 1024


@dataclass(frozen=True)
class ExpertWeights:
    """Of all experts that are here. Rows of a scale multiply rows of its weights, which are then int8 or FP8."""

    gate_up_LNH: Tensor
    """(L, 2 N, H): gates above ups."""
    down_LHN: Tensor
    gate_up_scale_LN: Tensor | None = None
    down_scale_LH: Tensor | None = None


class _Shape(NamedTuple):
    """Of a tile: rows, output features, input features at once; warps, and loads ahead."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


def _tile_shape(num_rows: int, num_experts: int, itemsize: int) -> _Shape:
    """By the rows of an average expert: few are bound by reading the weights, many by the products.

    `itemsize` is of activations, in bytes.
    """
    inputs = 128 // itemsize
    average = num_rows / num_experts
    if itemsize > 2:
        # Not on tensor cores: registers are what there is too little of.
        return _Shape(16 if average <= 16 else 64, 64, inputs, 4, 3)
    if average <= 16:
        return _Shape(16, 64, inputs * 2, 4, 4)
    if average <= 48:
        return _Shape(32, 64, inputs, 4, 4)
    if average <= 128:
        return _Shape(64, 128, inputs, 4, 3)
    return _Shape(128, 128, inputs, 8, 3)


@triton.jit
def _product(
    x_place, w_place, row_inside, w_inside, dtype: tl.constexpr, NUM_INPUTS: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, IS_EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows [ROWS, C] by weights [OUTPUTS, C], transposed, in float32. Places are of the first INPUTS of them."""
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    inputs = tl.arange(0, INPUTS)
    for start in range(0, NUM_INPUTS, INPUTS):
        x_mask, w_mask = row_inside[:, None], w_inside[:, None]
        if not IS_EVEN:
            is_input = (start + inputs < NUM_INPUTS)[None, :]
            x_mask, w_mask = x_mask & is_input, w_mask & is_input
        x = tl.load(x_place + start, mask=x_mask, other=0.0)
        w = tl.load(w_place + start, mask=w_mask, other=0.0).to(dtype)
        total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
    return total


@triton.jit
def _expert_kernel(
    x_ptr, w_ptr, scale_ptr, out_ptr, order_ptr, starts_ptr, tile_experts_ptr, tile_starts_ptr,
    x_stride, w_expert_stride, w_stride, scale_stride, num_outputs, rows_per_input,
    NUM_INPUTS: tl.constexpr,
    IS_GATED: tl.constexpr, IS_SILU: tl.constexpr, HAS_SCALE: tl.constexpr, IS_EVEN: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """A tile of one expert's rows by a tile of its output features. Row r reads input r // rows_per_input.

    Gated: the weights have twice the rows, and activation(gate) * up is stored.
    """
    expert = tl.load(tile_experts_ptr + tl.program_id(1)).to(tl.int64)
    if expert >= 0:
        places = tl.load(tile_starts_ptr + tl.program_id(1)) + tl.arange(0, ROWS)
        row_inside = places < tl.load(starts_ptr + expert + 1)
        rows = tl.load(order_ptr + places, mask=row_inside, other=0).to(tl.int64)
        outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        w_inside = outputs < num_outputs
        inputs = tl.arange(0, INPUTS)
        dtype: tl.constexpr = x_ptr.dtype.element_ty

        x_place = x_ptr + (rows // rows_per_input)[:, None] * x_stride + inputs[None, :]
        w_place = w_ptr + expert * w_expert_stride + outputs.to(tl.int64)[:, None] * w_stride + inputs[None, :]
        y = _product(
            x_place, w_place, row_inside, w_inside, dtype, NUM_INPUTS, ROWS, OUTPUTS, INPUTS, IS_EVEN, PRECISION
        )
        if HAS_SCALE:
            scale_place = scale_ptr + expert * scale_stride + outputs
            y *= tl.load(scale_place, mask=w_inside, other=0.0)[None, :]
        if IS_GATED:
            up_place = w_place + tl.cast(num_outputs, tl.int64) * w_stride
            up = _product(
                x_place, up_place, row_inside, w_inside, dtype, NUM_INPUTS, ROWS, OUTPUTS, INPUTS, IS_EVEN, PRECISION
            )
            if HAS_SCALE:
                up *= tl.load(scale_place + num_outputs, mask=w_inside, other=0.0)[None, :]
            y = activated(y, IS_SILU) * up
        out_place = out_ptr + rows[:, None] * num_outputs + outputs[None, :]
        tl.store(out_place, y.to(dtype), mask=row_inside[:, None] & w_inside[None, :])


@triton.jit
def _combine_kernel(y_ptr, weights_ptr, local_ptr, out_ptr, num_features, VISITS: tl.constexpr, BLOCK: tl.constexpr):
    """A token's rows, each times its weight, added up in the order of its router. Experts elsewhere count as zeros."""
    token = tl.program_id(0).to(tl.int64)
    features = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = features < num_features
    total = tl.zeros([BLOCK], tl.float32)
    for visit in tl.static_range(VISITS):
        row = token * VISITS + visit
        is_here = tl.load(local_ptr + row) >= 0
        weight = tl.load(weights_ptr + row)
        y = tl.load(y_ptr + row * num_features + features, mask=inside & is_here, other=0.0)
        total += tl.where(is_here, y.to(tl.float32) * weight, 0.0)
    tl.store(out_ptr + token * num_features + features, total.to(out_ptr.dtype.element_ty), mask=inside)


def run_experts(
    x_XH: Tensor, local_R: Tensor, weights: ExpertWeights, activation: Activation, visits: int = 1
) -> tuple[Tensor, Tensor]:
    """Row r, which is x's row r // visits, through the expert with the local number beside it.

    Returns (R, H) in the rows' order, undefined for those below 0, and where each expert's rows began (L + 1), int32,
    whose differences say how many each had.
    """
    num_rows, (num_experts, both, hidden) = local_R.numel(), weights.gate_up_LNH.shape
    features = both // 2
    _check(x_XH, local_R, weights, visits)
    y_RH = torch.empty((num_rows, hidden), dtype=x_XH.dtype, device=x_XH.device)
    if not num_rows:
        return y_RH, torch.zeros(num_experts + 1, dtype=torch.int32, device=x_XH.device)
    shape = _tile_shape(num_rows, num_experts, x_XH.element_size())
    plan = schedule(local_R, num_experts, shape.rows)
    between_RN = torch.empty((num_rows, features), dtype=x_XH.dtype, device=x_XH.device)
    products = (
        (x_XH, weights.gate_up_LNH, weights.gate_up_scale_LN, between_RN, features, visits),
        (between_RN, weights.down_LHN, weights.down_scale_LH, y_RH, hidden, 1),
    )
    for number, (x, w, scale, out, num_outputs, rows_per_input) in enumerate(products):
        _expert_kernel[(triton.cdiv(num_outputs, shape.outputs), len(plan.tile_experts))](
            x, w, scale, out, plan.order_R, plan.starts_L1, plan.tile_experts, plan.tile_starts,
            x.stride(0), w.stride(0), w.stride(1), 0 if scale is None else scale.stride(0),
            num_outputs, rows_per_input, NUM_INPUTS=w.shape[2],
            IS_GATED=number == 0, IS_SILU=activation == "silu", HAS_SCALE=scale is not None,
            IS_EVEN=w.shape[2] % shape.inputs == 0, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            ROWS=shape.rows, OUTPUTS=shape.outputs, INPUTS=shape.inputs,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return y_RH, plan.starts_L1


def combine(y_RH: Tensor, local_R: Tensor, weights_TK: Tensor) -> Tensor:
    """Each token's weighted sum over its K rows, in float32, returned in y's precision: (T, H)."""
    num_tokens, visits = weights_TK.shape
    hidden = y_RH.shape[1]
    out_TH = torch.empty((num_tokens, hidden), dtype=y_RH.dtype, device=y_RH.device)
    if num_tokens:
        _combine_kernel[(num_tokens, triton.cdiv(hidden, _COMBINED))](
            y_RH, weights_TK, local_R, out_TH, hidden, VISITS=visits, BLOCK=_COMBINED, num_warps=4
        )
    return out_TH


def _check(x_XH: Tensor, local_R: Tensor, weights: ExpertWeights, visits: int) -> None:
    experts, both, hidden = weights.gate_up_LNH.shape
    if weights.down_LHN.shape != (experts, hidden, both // 2):
        raise ValueError(f"{experts} experts of {both // 2} features take down {tuple(weights.down_LHN.shape)}")
    if x_XH.shape[1] != hidden or len(x_XH) * visits != local_R.numel() or x_XH.stride(1) != 1:
        raise ValueError(f"{tuple(x_XH.shape)} do not make {local_R.numel()} rows of {hidden} features")
    if not local_R.is_contiguous():
        raise ValueError("experts' numbers must be contiguous")
