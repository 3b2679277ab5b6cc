"""Rows through their experts: two grouped products with a gate between them, and the weighted sum of what comes out.

How many rows an expert has is known to the device alone: the grid has as many tiles as there can be, and those that
nobody needs end at once.

Shapes: T tokens, K experts that a token visits, R = T K rows, L experts that are here, H hidden, N features between the
products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.engine.kernels.activation import activated
from shoal.engine.kernels.moe_routing import schedule
from shoal.engine.ops import Activation
from shoal.engine.quantization.kernels import weight_sums
from shoal.engine.quantization.weight import KernelWeight, block_k_of

_COMBINED = 1024


class ExpertWeights(NamedTuple):
    """Of all experts that are here: floats, or few bits with scales."""

    gate_up_LNH: Tensor | KernelWeight
    """(L, 2 N, H): gates above ups."""
    down_LHN: Tensor | KernelWeight


class _Shape(NamedTuple):
    """Of a tile: rows, output features, input features at once; warps, and loads ahead."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


def _tile_shape(num_rows: int, num_experts: int, itemsize: int, few_bits: bool) -> _Shape:
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
    if few_bits:
        # Sums of gate and up, and of the group at hand, are as many numbers as there are registers for.
        return _Shape(64, 128, inputs, 8, 3)
    if average <= 128:
        return _Shape(64, 128, inputs, 4, 3)
    return _Shape(128, 128, inputs, 8, 3)


@triton.jit
def _expert_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, out_ptr, order_ptr, starts_ptr, tile_experts_ptr, tile_starts_ptr,
    x_stride, w_expert_stride, w_stride, scale_expert_stride, scale_stride, num_outputs, rows_per_input,
    NUM_INPUTS: tl.constexpr, IS_GATED: tl.constexpr, IS_SILU: tl.constexpr,
    SCALE: tl.constexpr, SCALE_ROWS: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr, IS_EVEN: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """A tile of one expert's rows by a tile of its output features. Row r reads input r // rows_per_input.

    Gated: the weights have twice the rows, and activation(gate) * up is stored. How weights are stored is said by what
    `weight_sums` takes.
    """
    expert = tl.load(tile_experts_ptr + tl.program_id(1)).to(tl.int64)
    if expert >= 0:
        places = tl.load(tile_starts_ptr + tl.program_id(1)) + tl.arange(0, ROWS)
        row_inside = places < tl.load(starts_ptr + expert + 1)
        rows = tl.load(order_ptr + places, mask=row_inside, other=0).to(tl.int64)
        outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        w_inside = outputs < num_outputs
        inputs = tl.arange(0, INPUTS // 2 if PACKED else INPUTS)
        dtype: tl.constexpr = x_ptr.dtype.element_ty

        x_place = x_ptr + (rows // rows_per_input)[None, :] * x_stride + inputs[:, None]
        w_ptr += expert * w_expert_stride
        scale_ptr += expert * scale_expert_stride
        zero_ptr += expert * scale_expert_stride
        steps: tl.constexpr = (NUM_INPUTS + INPUTS - 1) // INPUTS
        y = weight_sums(
            x_place, w_ptr + outputs.to(tl.int64)[:, None] * w_stride + inputs[None, :],
            scale_ptr + outputs // SCALE_ROWS * scale_stride, zero_ptr + outputs * scale_stride,
            row_inside, w_inside, NUM_INPUTS, 0, steps,
            SCALE, GROUP, PACKED, IS_EVEN, dtype, ROWS, OUTPUTS, INPUTS,
        )  # fmt: skip
        if IS_GATED:
            ups = outputs + num_outputs
            up = weight_sums(
                x_place, w_ptr + ups.to(tl.int64)[:, None] * w_stride + inputs[None, :],
                scale_ptr + ups // SCALE_ROWS * scale_stride, zero_ptr + ups * scale_stride,
                row_inside, w_inside, NUM_INPUTS, 0, steps,
                SCALE, GROUP, PACKED, IS_EVEN, dtype, ROWS, OUTPUTS, INPUTS,
            )  # fmt: skip
            y = activated(y, IS_SILU) * up
        out_place = out_ptr + rows[None, :] * num_outputs + outputs[:, None]
        tl.store(out_place, y.to(dtype), mask=w_inside[:, None] & row_inside[None, :])


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
    gate_up, down = _Matrices(weights.gate_up_LNH), _Matrices(weights.down_LHN)
    _check(x_XH, local_R, gate_up, down, visits)
    num_rows, num_experts, hidden, features = local_R.numel(), gate_up.experts, gate_up.inputs, down.inputs
    y_RH = torch.empty((num_rows, hidden), dtype=x_XH.dtype, device=x_XH.device)
    if not num_rows:
        return y_RH, torch.zeros(num_experts + 1, dtype=torch.int32, device=x_XH.device)
    shape = _tile_shape(num_rows, num_experts, x_XH.element_size(), gate_up.scale > 0)
    plan = schedule(local_R, num_experts, shape.rows)
    between_RN = torch.empty((num_rows, features), dtype=x_XH.dtype, device=x_XH.device)
    for x, matrices, out, rows_per_input in ((x_XH, gate_up, between_RN, visits), (between_RN, down, y_RH, 1)):
        num_outputs, inputs = out.shape[1], matrices.inputs_of_a_step(shape.inputs)
        _expert_kernel[(triton.cdiv(num_outputs, shape.outputs), len(plan.tile_experts))](
            x, matrices.values, matrices.scales, matrices.zeros, out,
            plan.order_R, plan.starts_L1, plan.tile_experts, plan.tile_starts,
            x.stride(0), *matrices.values.stride()[:2], *matrices.scales.stride()[:2], num_outputs, rows_per_input,
            NUM_INPUTS=matrices.inputs, IS_GATED=out is between_RN, IS_SILU=activation == "silu",
            SCALE=matrices.scale, SCALE_ROWS=matrices.scale_rows, GROUP=matrices.group, PACKED=matrices.is_packed,
            IS_EVEN=matrices.inputs % inputs == 0, ROWS=shape.rows, OUTPUTS=shape.outputs, INPUTS=inputs,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return y_RH, plan.starts_L1


class _Matrices:
    """One matrix of each expert, (L, outputs, inputs), as the kernel takes it."""

    def __init__(self, weights: Tensor | KernelWeight) -> None:
        self.scale, self.scale_rows, self.is_packed = 0, 1, False
        if isinstance(weights, Tensor):
            self.values = self.scales = self.zeros = weights  # the latter two are not read
            self.inputs = self.group = weights.shape[2]
        else:
            self.values, self.scales, zeros, self.scale_rows, self.group, self.inputs = weights
            self.zeros, self.is_packed = self.values if zeros is None else zeros, zeros is not None
            self.scale = 1 if self.scales.shape[2] == 1 else 2
        self.experts, self.outputs = self.values.shape[:2]

    def inputs_of_a_step(self, wanted: int) -> int:
        """Of one group all of them; of packed weights as many as were packed together."""
        block = block_k_of(self.group, self.inputs)
        return block if self.is_packed else min(wanted, block) if self.scale == 2 else wanted


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


def _check(x_XH: Tensor, local_R: Tensor, gate_up: _Matrices, down: _Matrices, visits: int) -> None:
    experts, both, hidden = gate_up.experts, gate_up.outputs, gate_up.inputs
    if (down.experts, down.outputs, down.inputs) != (experts, hidden, both // 2):
        found = down.experts, down.outputs, down.inputs
        raise ValueError(f"{experts} experts of {both // 2} features take down {found}")
    if x_XH.shape[1] != hidden or len(x_XH) * visits != local_R.numel() or x_XH.stride(1) != 1:
        raise ValueError(f"{tuple(x_XH.shape)} do not make {local_R.numel()} rows of {hidden} features")
    if not local_R.is_contiguous():
        raise ValueError("experts' numbers must be contiguous")
