"""Ops on a CPU by the native kernels. Rows are computed alike whatever the batch: see native/linear.h.

Shapes: T tokens, H hidden, N output features, K input features, V vocabulary, D head size, A fused q/k/v features.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from shoal.core.config import WeightPrecision
from shoal.engine.native import Packed, load_library, unavailable_reason, variants
from shoal.engine.ops import Activation

__all__ = ["NativeLinear", "NativeOps", "unavailable_reason"]

_PRECISIONS = {"float32": 0, "bfloat16": 1, "int8": 2}
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_ROWS_AT_A_TIME = 2048
"""Rows widened to float32 at once while packing, to keep the peak memory near one copy."""


class NativeLinear:
    """Packed weights in memory of their own, freed with the object."""

    def __init__(self, library: Any, precision: WeightPrecision, n: int, k: int, *, gated: bool, bias: bool) -> None:
        width = library.shoal_panel_width() // (2 if gated else 1)
        group = library.shoal_group()
        panels = -(-n // width)
        self.out_features, self.in_features = n, k
        self._library = library
        columns = panels * library.shoal_panel_width()
        # Zeros: the columns that pad the last panel are computed with the others.
        self.scales = torch.zeros(columns if precision == "int8" else 0)
        self.bias = torch.zeros(columns if bias else 0)
        self.struct = Packed(
            precision=_PRECISIONS[precision],
            n=n,
            k=k,
            gated=gated,
            panels=panels,
            k_padded=-(-k // group) * group,
            scales=self.scales.data_ptr() if precision == "int8" else None,
            bias=self.bias.data_ptr() if bias else None,
        )
        self.address = ctypes.addressof(self.struct)
        self._num_bytes = library.shoal_weight_bytes(self.address)
        self.struct.weights = library.shoal_allocate(self._num_bytes)
        if not self.struct.weights:
            raise MemoryError(f"no memory for {self._num_bytes} bytes of weights")
        self.nbytes = self._num_bytes + self.scales.nbytes + self.bias.nbytes

    def __del__(self) -> None:
        if getattr(self, "struct", None) is not None and self.struct.weights:
            self._library.shoal_free(self.struct.weights, self._num_bytes)
            self.struct.weights = None


class NativeOps:
    """Float32 activations on the CPU. `variant` names an instruction set; None is the best that this CPU has."""

    name = "native"

    def __init__(self, threads: int = 1, variant: str | None = None) -> None:
        reason = unavailable_reason()
        if reason is not None:
            raise RuntimeError(reason)
        self.variant = variant or variants()[0]
        self.threads = max(1, threads)
        self.library = library = load_library(self.variant)
        self.pool: int | None = library.shoal_pool_create(self.threads)
        # Looked up once: these are called some 200 times a step.
        self._linear = library.shoal_linear
        self._rms_norm = library.shoal_rms_norm
        self._add_rms_norm = library.shoal_add_rms_norm
        self._rope = library.shoal_rope

    def close(self) -> None:
        pool, self.pool = self.pool, None
        if pool is not None:
            self.library.shoal_pool_destroy(pool)

    def __del__(self) -> None:
        if getattr(self, "pool", None) is not None:
            self.close()

    # --- weights ----------------------------------------------------------------------------------------------------

    def pack(self, weight_NK: Tensor, bias_N: Tensor | None, precision: WeightPrecision) -> NativeLinear:
        n, k = weight_NK.shape
        packed = NativeLinear(self.library, precision, n, k, gated=False, bias=bias_N is not None)
        self._fill(packed, weight_NK, 0)
        if bias_N is not None:
            packed.bias[:n] = bias_N.float()
        return packed

    def pack_gated(self, gate_NK: Tensor, up_NK: Tensor, precision: WeightPrecision) -> NativeLinear:
        if gate_NK.shape != up_NK.shape:
            raise ValueError(f"gate and up differ in shape: {tuple(gate_NK.shape)}, {tuple(up_NK.shape)}")
        n, k = gate_NK.shape
        packed = NativeLinear(self.library, precision, n, k, gated=True, bias=False)
        self._fill(packed, gate_NK, 0)
        self._fill(packed, up_NK, 1)
        return packed

    def _fill(self, packed: NativeLinear, weight_NK: Tensor, half: int) -> None:
        for first in range(0, weight_NK.shape[0], _ROWS_AT_A_TIME):
            rows = weight_NK[first : first + _ROWS_AT_A_TIME].float().contiguous()
            self.library.shoal_pack(
                self.pool, packed.address, rows.data_ptr(), rows.stride(0), first, rows.shape[0], half
            )

    # --- compute ----------------------------------------------------------------------------------------------------

    def linear(self, x_TK: Tensor, packed: NativeLinear) -> Tensor:
        return self._multiply(x_TK, packed, 0)

    def gated(self, x_TK: Tensor, packed: NativeLinear, activation: Activation) -> Tensor:
        return self._multiply(x_TK, packed, _ACTIVATIONS[activation])

    def _multiply(self, x_TK: Tensor, packed: NativeLinear, activation: int) -> Tensor:
        rows, k = x_TK.shape
        n = packed.out_features
        if k != packed.in_features:
            raise ValueError(f"input has {k} features, the weights take {packed.in_features}")
        _require_floats(x_TK)
        y_TN = torch.empty((rows, n))
        self._linear(self.pool, packed.address, x_TK.data_ptr(), x_TK.stride(0), rows, activation, y_TN.data_ptr(), n)
        return y_TN

    def embedding(self, ids_T: Tensor, packed: NativeLinear) -> Tensor:
        ids = ids_T.long().contiguous()
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= packed.out_features):
            raise ValueError(f"token ids must lie in [0, {packed.out_features})")
        y_TH = torch.empty((ids.numel(), packed.in_features))
        self.library.shoal_embedding(
            self.pool, packed.address, ids.data_ptr(), ids.numel(), y_TH.data_ptr(), packed.in_features
        )
        return y_TH

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        rows, n = x_TH.shape
        _require_floats(x_TH)
        y_TH = torch.empty((rows, n))
        self._rms_norm(self.pool, x_TH.data_ptr(), x_TH.stride(0), weight_H.data_ptr(), eps, y_TH.data_ptr(), rows, n)
        return y_TH

    def add_rms_norm_(self, x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        rows, n = x_TH.shape
        if not (x_TH.is_contiguous() and residual_TH.is_contiguous()) or residual_TH.shape != x_TH.shape:
            raise ValueError("add_rms_norm_ takes two contiguous tensors of one shape")
        y_TH = torch.empty((rows, n))
        self._add_rms_norm(
            self.pool,
            x_TH.data_ptr(),
            residual_TH.data_ptr(),
            weight_H.data_ptr(),
            eps,
            y_TH.data_ptr(),
            rows,
            n,
        )
        return y_TH

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
        self._rope(
            self.pool,
            qkv_TA.data_ptr(),
            qkv_TA.stride(0),
            positions_T.data_ptr(),
            cos_sin_PD.data_ptr(),
            qkv_TA.shape[0],
            num_heads,
            num_kv_heads,
            head_dim,
            None if q_norm_D is None else q_norm_D.data_ptr(),
            None if k_norm_D is None else k_norm_D.data_ptr(),
            eps,
        )

    def argmax(self, x_SV: Tensor) -> Tensor:
        _require_floats(x_SV)
        out_S = torch.empty(x_SV.shape[0], dtype=torch.int64)
        self.library.shoal_argmax(
            self.pool, x_SV.data_ptr(), x_SV.stride(0), x_SV.shape[0], x_SV.shape[1], out_S.data_ptr()
        )
        return out_S


def _require_floats(x: Tensor) -> None:
    if x.dtype != torch.float32 or x.stride(-1) != 1:
        raise ValueError(f"native kernels take float32 with contiguous rows, got {x.dtype} with strides {x.stride()}")
