"""Ops on a GPU: dense products by torch, everything between them by Triton kernels that do several parts in one pass.

Shapes: T tokens, H hidden, N output features, K input features, V vocabulary, D head size, A fused q/k/v features,
E experts of the model, L experts that are here, R rows on their way to an expert, S rows of logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.core.model_spec import MoESpec
from shoal.engine.attention.base import PagedKV
from shoal.engine.kernels import activation as gates
from shoal.engine.kernels import moe_experts, moe_routing, norm, rope, sampling, unavailable_reason
from shoal.engine.ops import Activation, FusedOps, RowSampler, TorchLinear, TorchOps
from shoal.engine.quantization.linear import Implementation, QuantizedLinear, WeightOnlyLinear
from shoal.engine.quantization.weight import KernelWeight
from shoal.engine.random_stream import UInt64Array
from shoal.engine.triton_sampler import TritonSampler


class _Experts(NamedTuple):
    weights: moe_experts.ExpertWeights
    nbytes: int


class TritonOps(TorchOps):
    """As TorchOps, of which it keeps weights and dense products. Activations are `dtype`, sums float32."""

    name = "triton"
    fused: FusedOps | None
    quantized: Implementation | None = "triton"

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        reason = unavailable_reason(device)
        if reason is not None:
            raise RuntimeError(f"the Triton kernels are not available: {reason}")
        super().__init__(device, dtype)
        self.fused = self

    def gated(self, x_TK: Tensor, packed: TorchLinear | QuantizedLinear, activation: Activation) -> Tensor:
        return gates.gate(self.linear(x_TK, packed), activation)

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        return norm.rms_norm(x_TH, weight_H, eps)

    def add_rms_norm_(
        self, x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float, first_H: Tensor | None = None
    ) -> Tensor:
        return norm.rms_norm(x_TH, weight_H, eps, residual_TH=residual_TH, first_weight_H=first_H)

    def rope_(
        self,
        qkv_TA: Tensor,
        positions_T: Tensor,
        cos_sin_PD: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_norm_D: Tensor | None,
        k_norm_D: Tensor | None,
        eps: float,
    ) -> None:
        rope.rope_(qkv_TA, positions_T, cos_sin_PD, num_heads, num_kv_heads, head_dim, q_norm_D, k_norm_D, eps)

    def rope_write_(
        self,
        qkv_TA: Tensor,
        positions_T: Tensor,
        cos_sin_PD: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_norm_D: Tensor | None,
        k_norm_D: Tensor | None,
        eps: float,
        pages: PagedKV,
        slots_T: Tensor,
    ) -> None:
        norms = q_norm_D, k_norm_D, eps
        rope.rope_(qkv_TA, positions_T, cos_sin_PD, num_heads, num_kv_heads, head_dim, *norms, pages, slots_T)

    # --- experts ----------------------------------------------------------------------------------------------------

    def route(self, logits_TE: Tensor, spec: MoESpec, correction_E: Tensor | None) -> tuple[Tensor, Tensor]:
        return moe_routing.route(logits_TE, spec, correction_E)

    def pack_experts(
        self, mlps: Sequence[tuple[TorchLinear | QuantizedLinear, TorchLinear | QuantizedLinear]]
    ) -> _Experts | None:
        gate_up, down = _grouped([gate_up for gate_up, _ in mlps]), _grouped([down for _, down in mlps])
        if gate_up is None or down is None:
            return None  # of several forms, or of one with no kernel: each by itself
        return _Experts(moe_experts.ExpertWeights(gate_up, down), gate_up.nbytes + down.nbytes)

    def experts(
        self, x_TH: Tensor, local_R: Tensor, packed: _Experts, activation: Activation, visits: int
    ) -> tuple[Tensor, Tensor]:
        y_RH, starts_L1 = moe_experts.run_experts(x_TH, local_R, packed.weights, activation, visits)
        return y_RH, starts_L1.diff()

    def combine(self, y_RH: Tensor, local_R: Tensor, weights_TK: Tensor) -> Tensor:
        return moe_experts.combine(y_RH, local_R, weights_TK)

    # --- tokens -----------------------------------------------------------------------------------------------------

    def argmax(self, x_SV: Tensor) -> Tensor:
        """The lowest index among equals, which torch does not promise on a GPU."""
        return sampling.argmax(x_SV)

    def draw(
        self, weights_SV: Tensor, seeds_S: UInt64Array, indices_S: UInt64Array, positions_S: UInt64Array
    ) -> Tensor:
        words = [torch.from_numpy(w.view("int64").copy()).to(self.device) for w in (seeds_S, indices_S, positions_S)]
        return sampling.draw(weights_SV, *words)

    def row_sampler(self, num_slots: int, vocab_size: int) -> RowSampler:
        return TritonSampler(num_slots, vocab_size, self.device)


def _grouped(matrices: Sequence[TorchLinear | QuantizedLinear]) -> Tensor | KernelWeight | None:
    """One of each expert, with a dimension for experts in front; None for what the grouped kernel does not take."""
    weights = [_kernel_form(matrix) for matrix in matrices]
    if not all(isinstance(weight, Tensor) for weight in weights):
        return KernelWeight.stacked([weight for weight in weights if isinstance(weight, KernelWeight)], len(weights))
    floats = [weight for weight in weights if isinstance(weight, Tensor)]
    return torch.stack(floats) if len({weight.dtype for weight in floats}) == 1 else None


def _kernel_form(matrix: TorchLinear | QuantizedLinear) -> Tensor | KernelWeight | None:
    if isinstance(matrix, WeightOnlyLinear):
        return matrix.weight if matrix.bias_N is None else None
    if not isinstance(matrix, TorchLinear) or matrix.bias_N is not None:
        return None
    if matrix.scale_N is None:
        return matrix.weight_NK
    k = matrix.in_features
    return KernelWeight(matrix.weight_NK, matrix.scale_N.float()[:, None], None, 1, k, k)
