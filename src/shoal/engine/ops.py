"""The arithmetic that a Decoder is made of, behind one interface, and its portable implementation in torch.

An `Ops` object is handed to the model as `Comm` is: two engines with different ones live in one process. `TorchOps`
runs on any torch device and is the reference; `native.NativeOps` replaces it on a CPU.

Shapes: T tokens of the batch, H hidden, N output features, K input features, V vocabulary, D head size,
A attention heads (query + 2 x key/value heads).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor

from shoal.core.config import WeightPrecision
from shoal.core.model_spec import MoESpec
from shoal.core.types import Sampling
from shoal.engine.attention.base import PagedKV
from shoal.engine.quantization.linear import Implementation, QuantizedLinear, make_linear
from shoal.engine.quantization.stored import StoredMatrix
from shoal.engine.quantization.weight import stacked
from shoal.engine.random_stream import UInt64Array, exponentials

Activation = Literal["silu", "gelu_tanh"]
Ids = Sequence[int]
Matrices = Tensor | Sequence[Tensor]
"""(N, K), or several with the same K, one below the other."""


PackedLinear = Any
"""Weights of y = x W^T + b in the form that the Ops object which made them computes with. Opaque outside of it, but for
`out_features`, `in_features` and `nbytes`."""
PackedExperts = Any
"""Weights of one layer's experts, opaque outside of the object that made them, but for `nbytes`."""


class RowSampler(Protocol):
    """Draws tokens where the logits are, of settings that it keeps by slot: nothing waits for the host."""

    def assign(self, slot: int, sampling: Sampling, top_k: int, index: int, prompt: Ids, output: Ids) -> None:
        """A sequence enters a slot. `top_k` 0 is off; prompt and output are its tokens so far."""

    def release(self, slot: int) -> None:
        """Forget the sequence in a slot."""

    def sample(self, logits_SV: Tensor, slots_S: Tensor, positions_S: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (S), int64, and the largest logit of each row once penalised (S): not finite where none can be drawn.

        Logits, float32, are overwritten. Slots and positions are int64, on the device or the host; a slot that is
        penalised may not occur twice.
        """


class FusedOps(Protocol):
    """What an Ops object may be able to do beyond the rest: parts of a step in one pass each, all of it where the
    tensors are. It reads nothing back, so a CUDA graph can hold it.
    """

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
        """`Ops.rope_` of the queries; keys, rotated, and values go to their slots, none below 0, and not back."""

    def route(self, logits_TE: Tensor, spec: MoESpec, correction_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """Experts (T, K), int64, best first, the lowest number among equals, and their weights (T, K), float32."""

    def pack_experts(self, mlps: Sequence[tuple[PackedLinear, PackedLinear]]) -> PackedExperts | None:
        """Gated pairs and down matrices of one layer's experts; None for weights of a form that has no kernel.

        The caller drops its own references.
        """

    def experts(
        self, x_TH: Tensor, local_R: Tensor, packed: PackedExperts, activation: Activation, visits: int
    ) -> tuple[Tensor, Tensor]:
        """Row r, which is x's row r // visits, through the expert with the number beside it.

        (R, H), undefined where the number is below 0; and how many rows each expert had, on the device.
        """

    def combine(self, y_RH: Tensor, local_R: Tensor, weights_TK: Tensor) -> Tensor:
        """Each token's sum over its K rows times their weights, of those whose expert is not below 0: (T, H)."""

    def row_sampler(self, num_slots: int, vocab_size: int) -> RowSampler: ...


class Ops(Protocol):
    """Each method is a pure function of its arguments unless it ends in an underscore, which writes in place."""

    name: str
    fused: FusedOps | None
    """None where each part is done by itself."""

    def pack(self, weights: Matrices, bias_N: Tensor | None, precision: WeightPrecision) -> PackedLinear:
        """Take over float weights (N, K) of a linear layer, or of several with the same input, which become one.

        The caller drops its own copy.
        """

    def pack_gated(self, gate_NK: Tensor, up_NK: Tensor, precision: WeightPrecision) -> PackedLinear:
        """Pack both halves of a gated MLP for `gated`. out_features is N."""

    def pack_quantized(
        self, matrices: Sequence[StoredMatrix], bias_N: Tensor | None, precision: WeightPrecision, *, gated: bool
    ) -> PackedLinear:
        """Take over matrices of few bits, one below the other; `gated`: a gate and its up half, as `pack_gated` does.

        Who cannot compute with them stores them in `precision`.
        """

    def linear(self, x_TK: Tensor, packed: PackedLinear) -> Tensor:
        """x W^T + b, shape (T, N)."""

    def gated(self, x_TK: Tensor, packed: PackedLinear, activation: Activation) -> Tensor:
        """activation(x G^T) * (x U^T), shape (T, N)."""

    def embedding(self, ids_T: Tensor, packed: PackedLinear) -> Tensor:
        """Rows of a packed weight (V, H) as float, shape (T, H): a tied embedding needs no second copy."""

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm_(
        self, x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float, first_H: Tensor | None = None
    ) -> Tensor:
        """residual += x, in place; the norm of the new residual is returned. With `first_H` x is normed by it first."""

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
        """Norm (where weights are given) and rotate the query and key heads of a fused (T, (heads + 2 kv_heads) * D).

        cos_sin_PD holds [cos | sin] of each position's D/2 angles, halves rotated (GPT-NeoX order).
        """

    def argmax(self, x_SV: Tensor) -> Tensor:
        """Index of the largest element of each row, the lowest such index, int64 (S)."""

    def draw(
        self, weights_SV: Tensor, seeds_S: UInt64Array, indices_S: UInt64Array, positions_S: UInt64Array
    ) -> Tensor:
        """A token of each row, int64 (S), with probabilities in proportion to its weights, which are not negative.

        By an exponential race (see `random_stream` for the numbers): weights that differ by rounding draw the same.
        """

    def close(self) -> None:
        """Give back threads. The object is not used afterwards."""


class TorchLinear:
    """Weights as torch keeps them: (N, K) in float, or int8 with one scale for each output feature."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, scale_N: Tensor | None) -> None:
        self.weight_NK = weight_NK
        self.bias_N = bias_N
        self.scale_N = scale_N
        self.out_features, self.in_features = weight_NK.shape
        parts = (weight_NK, bias_N, scale_N)
        self.nbytes = sum(part.nbytes for part in parts if part is not None)


class TorchOps:
    """Plain torch on any device: the reference. Activations are `dtype`; norms and rotation are done in float32."""

    name = "torch"
    fused: FusedOps | None = None
    quantized: Implementation | None = None
    """Of linear layers of few bits; None is by the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device = device
        self.dtype = dtype

    def pack(self, weights: Matrices, bias_N: Tensor | None, precision: WeightPrecision) -> TorchLinear:
        weight_NK = weights if isinstance(weights, Tensor) else torch.cat(list(weights))
        bias = None if bias_N is None else bias_N.to(self.device, self.dtype)
        if precision == "int8":
            weight = weight_NK.float()
            scale_N = weight.abs().amax(dim=1).clamp_min(1e-12) / 127.0
            quantised = (weight / scale_N[:, None]).round().to(torch.int8)
            return TorchLinear(quantised.to(self.device), bias, scale_N.to(self.device, self.dtype))
        stored = torch.float32 if precision == "float32" else torch.bfloat16
        return TorchLinear(weight_NK.to(self.device, stored, copy=True).contiguous(), bias, None)

    def pack_gated(self, gate_NK: Tensor, up_NK: Tensor, precision: WeightPrecision) -> TorchLinear:
        packed = self.pack(torch.cat([gate_NK, up_NK]), None, precision)
        packed.out_features //= 2
        return packed

    def pack_quantized(
        self, matrices: Sequence[StoredMatrix], bias_N: Tensor | None, precision: WeightPrecision, *, gated: bool
    ) -> QuantizedLinear:
        bias = None if bias_N is None else bias_N.to(self.device, self.dtype)
        weight = stacked([matrix.weight(self.device) for matrix in matrices])
        packed = make_linear(weight, bias, self.device, self.quantized)
        if gated:
            packed.out_features //= 2
        return packed

    def linear(self, x_TK: Tensor, packed: TorchLinear | QuantizedLinear) -> Tensor:
        if not isinstance(packed, TorchLinear):
            return packed.multiply(x_TK)
        weight_NK = packed.weight_NK
        if weight_NK.dtype != x_TK.dtype:
            weight_NK = weight_NK.to(x_TK.dtype)
        y_TN = F.linear(x_TK, weight_NK)
        if packed.scale_N is not None:
            y_TN *= packed.scale_N
        if packed.bias_N is not None:
            y_TN += packed.bias_N
        return y_TN

    def gated(self, x_TK: Tensor, packed: TorchLinear | QuantizedLinear, activation: Activation) -> Tensor:
        gate_TN, up_TN = self.linear(x_TK, packed).chunk(2, dim=1)
        activated = F.silu(gate_TN) if activation == "silu" else F.gelu(gate_TN, approximate="tanh")
        return activated * up_TN

    def embedding(self, ids_T: Tensor, packed: TorchLinear) -> Tensor:
        x_TH = packed.weight_NK[ids_T].to(self.dtype)
        return x_TH if packed.scale_N is None else x_TH * packed.scale_N[ids_T, None]

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        wide = x_TH.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        return (wide * scale * weight_H).to(x_TH.dtype)

    def add_rms_norm_(
        self, x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float, first_H: Tensor | None = None
    ) -> Tensor:
        residual_TH += x_TH if first_H is None else self.rms_norm(x_TH, first_H, eps)
        return self.rms_norm(residual_TH, weight_H, eps)

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
        cos_T1D, sin_T1D = cos_sin_PD[positions_T].unsqueeze(1).chunk(2, dim=-1)
        split = num_heads * head_dim
        for part, norm_D in (
            (qkv_TA[:, :split], q_norm_D),
            (qkv_TA[:, split : split + num_kv_heads * head_dim], k_norm_D),
        ):
            x_THD = part.view(len(part), -1, head_dim)
            x = x_THD if norm_D is None else self.rms_norm(x_THD, norm_D, eps)
            low, high = x.float().chunk(2, dim=-1)
            rotated = torch.cat([low * cos_T1D - high * sin_T1D, high * cos_T1D + low * sin_T1D], dim=-1)
            x_THD.copy_(rotated)

    def argmax(self, x_SV: Tensor) -> Tensor:
        return x_SV.argmax(dim=1)

    def draw(
        self, weights_SV: Tensor, seeds_S: UInt64Array, indices_S: UInt64Array, positions_S: UInt64Array
    ) -> Tensor:
        race_SV = exponentials(seeds_S, indices_S, positions_S, weights_SV.shape[1], weights_SV.device)
        return (weights_SV / race_SV).argmax(dim=1)

    def close(self) -> None:
        """Nothing to give back."""
