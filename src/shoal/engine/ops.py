"""The arithmetic that a Decoder is made of, behind one interface, and its portable implementation in torch.

An `Ops` object is handed to the model as `Comm` is: two engines with different ones live in one process. `TorchOps`
runs on any torch device and is the reference; `native.NativeOps` replaces it on a CPU.

Shapes: T tokens of the batch, H hidden, N output features, K input features, V vocabulary, D head size,
A attention heads (query + 2 x key/value heads).
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

WeightPrecision = Literal["float32", "bfloat16", "int8"]
Activation = Literal["silu", "gelu_tanh"]


class PackedLinear(Protocol):
    """Weights of y = x W^T + b in the form that an Ops object computes with. Opaque outside of it."""

    out_features: int
    in_features: int
    nbytes: int


class Ops(Protocol):
    """Each method is a pure function of its arguments unless it ends in an underscore, which writes in place."""

    name: str

    def pack(self, weight_NK: Tensor, bias_N: Tensor | None, precision: WeightPrecision) -> PackedLinear:
        """Take over float weights of a linear layer. The caller drops its own copy."""

    def pack_gated(self, gate_NK: Tensor, up_NK: Tensor, precision: WeightPrecision) -> PackedLinear:
        """Pack both halves of a gated MLP for `gated`. out_features is N."""

    def linear(self, x_TK: Tensor, packed: PackedLinear) -> Tensor:
        """x W^T + b, shape (T, N)."""

    def gated(self, x_TK: Tensor, packed: PackedLinear, activation: Activation) -> Tensor:
        """activation(x G^T) * (x U^T), shape (T, N)."""

    def embedding(self, ids_T: Tensor, packed: PackedLinear) -> Tensor:
        """Rows of a packed weight (V, H) as float, shape (T, H): a tied embedding needs no second copy."""

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm_(self, x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """residual += x, in place; the norm of the new residual is returned."""

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
