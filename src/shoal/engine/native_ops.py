"""Ops on a CPU by the native kernels. Rows are computed alike whatever the batch: see native/linear.h.

Shapes: T tokens, H hidden, N output features, K input features, V vocabulary, D head size, A fused q/k/v features.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from shoal.core.config import WeightPrecision
from shoal.engine.native import Packed, load_library, unavailable_reason, variants
from shoal.engine.ops import Activation, Matrices
from shoal.engine.quantization.stored import StoredMatrix
from shoal.engine.random_stream import UInt64Array

__all__ = ["NativeLinear", "NativeOps", "unavailable_reason"]

_PRECISIONS = {"float32": 0, "bfloat16": 1, "int8": 2}
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_ROWS_AT_A_TIME = 512
"""Rows widened to float32 at once while packing, to keep the peak memory near one copy."""


class NativeLinear:
    """Packed weights in memory of their own, freed with the object."""

    def __init__(self, library: Any, precision: WeightPrecision, n: int, k: int, *, gated: bool, bias: bool) -> None:
        width = library.shoal_panel_width() // (2 if gated else 1)
        group = library.shoal_group()
        panels = -(-n // width)
        self.out_features, self.in_features = n, k
        self.is_gated = gated
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
    """Float32 activations on the CPU. `variant` names an instruction set; None is the best that this CPU has.

    `threads` counts the caller's. Calls from several Python threads wait for each other. Every method raises ValueError
    for tensors that do not fit, and RuntimeError once closed.
    """

    name = "native"
    fused = None

    def __init__(self, threads: int = 1, variant: str | None = None) -> None:
        reason = unavailable_reason()
        if reason is not None:
            raise RuntimeError(reason)
        if variant is not None and variant not in variants():
            raise ValueError(f"variant {variant!r} cannot run here; this machine has: {', '.join(variants())}")
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.variant = variant or variants()[0]
        self.threads = threads
        self.library = library = load_library(self.variant)
        self.pool: int | None = library.shoal_pool_create(threads)
        if self.pool is None:
            raise RuntimeError(f"the system refuses {threads} threads: ask for fewer")
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

    def fail(self, out_of_range: str) -> NoReturn:
        """Raise for a call that returned other than 0, which is so far only one of two reasons."""
        if self.pool is None:
            raise RuntimeError("these native kernels were closed")
        raise ValueError(out_of_range)

    def pack(self, weights: Matrices, bias_N: Tensor | None, precision: WeightPrecision) -> NativeLinear:
        matrices = [weights] if isinstance(weights, Tensor) else list(weights)
        n, k = sum(len(matrix) for matrix in matrices), matrices[0].shape[1]
        if any(matrix.shape[1] != k for matrix in matrices):
            raise ValueError(f"layers of one input take as many features, got {[m.shape[1] for m in matrices]}")
        if bias_N is not None and bias_N.shape != (n,):
            raise ValueError(f"the bias has shape {tuple(bias_N.shape)}, the weights have {n} output features")
        packed = NativeLinear(self.library, precision, n, k, gated=False, bias=bias_N is not None)
        row = 0
        for matrix in matrices:
            self._fill(packed, matrix, 0, row)
            row += len(matrix)
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

    def pack_quantized(
        self, matrices: Sequence[StoredMatrix], bias_N: Tensor | None, precision: WeightPrecision, *, gated: bool
    ) -> NativeLinear:
        """Kernels have a form of their own for each precision: the weights are made floats, and then that."""
        floats = [matrix.weight(torch.device("cpu")).dequantized() for matrix in matrices]
        return self.pack_gated(floats[0], floats[1], precision) if gated else self.pack(floats, bias_N, precision)

    def _fill(self, packed: NativeLinear, weight_NK: Tensor, half: int, row: int = 0) -> None:
        """From the packed matrix's `row` on."""
        for first in range(0, weight_NK.shape[0], _ROWS_AT_A_TIME):
            rows = weight_NK[first : first + _ROWS_AT_A_TIME].float().contiguous()
            data, count = rows.data_ptr(), rows.shape[0]
            if self.library.shoal_pack(self.pool, packed.address, data, rows.stride(0), row + first, count, half):
                self.fail("the weights do not fit")

    # --- compute ----------------------------------------------------------------------------------------------------

    def linear(self, x_TK: Tensor, packed: NativeLinear) -> Tensor:
        if packed.is_gated:
            raise ValueError("these weights were packed for gated()")
        return self._multiply(x_TK, packed, 0)

    def gated(self, x_TK: Tensor, packed: NativeLinear, activation: Activation) -> Tensor:
        if not packed.is_gated:
            raise ValueError("gated() takes weights of pack_gated()")
        return self._multiply(x_TK, packed, _ACTIVATIONS[activation])

    def _multiply(self, x_TK: Tensor, packed: NativeLinear, activation: int) -> Tensor:
        rows, k = x_TK.shape
        n = packed.out_features
        if k != packed.in_features:
            raise ValueError(f"input has {k} features, the weights take {packed.in_features}")
        _require_floats(x_TK)
        y_TN = torch.empty((rows, n))
        x, y, stride = x_TK.data_ptr(), y_TN.data_ptr(), x_TK.stride(0)
        if self._linear(self.pool, packed.address, x, stride, rows, activation, y, n):
            self.fail("the input does not fit the weights")
        return y_TN

    def embedding(self, ids_T: Tensor, packed: NativeLinear) -> Tensor:
        ids = ids_T.long().contiguous()
        if packed.is_gated:
            raise ValueError("an embedding cannot be read out of gated weights")
        y_TH = torch.empty((ids.numel(), packed.in_features))
        if self.library.shoal_embedding(
            self.pool, packed.address, ids.data_ptr(), ids.numel(), y_TH.data_ptr(), packed.in_features
        ):
            self.fail(f"token ids must lie in [0, {packed.out_features})")
        return y_TH

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        rows, n = x_TH.shape
        _require_floats(x_TH)
        _require_norm(weight_H, n)
        y_TH = torch.empty((rows, n))
        x, y, weight = x_TH.data_ptr(), y_TH.data_ptr(), weight_H.data_ptr()
        if self._rms_norm(self.pool, x, x_TH.stride(0), weight, eps, y, rows, n):
            self.fail("the input does not fit the norm")
        return y_TH

    def add_rms_norm_(
        self, x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float, first_H: Tensor | None = None
    ) -> Tensor:
        if first_H is not None:
            x_TH = self.rms_norm(x_TH, first_H, eps)
        rows, n = x_TH.shape
        if not (x_TH.is_contiguous() and residual_TH.is_contiguous()) or residual_TH.shape != x_TH.shape:
            raise ValueError("add_rms_norm_ takes two contiguous tensors of one shape")
        _require_floats(x_TH)
        _require_floats(residual_TH)
        _require_norm(weight_H, n)
        y_TH = torch.empty((rows, n))
        x, residual, weight, y = x_TH.data_ptr(), residual_TH.data_ptr(), weight_H.data_ptr(), y_TH.data_ptr()
        if self._add_rms_norm(self.pool, x, residual, weight, eps, y, rows, n):
            self.fail("the input does not fit the norm")
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
        rows, features = qkv_TA.shape
        known, angles = cos_sin_PD.shape
        _require_floats(qkv_TA)
        expected = (num_heads + 2 * num_kv_heads) * head_dim
        if features != expected or head_dim % 2 or angles != head_dim:
            raise ValueError(
                f"{num_heads} + 2 x {num_kv_heads} heads of {head_dim}, an even size, are {expected} features "
                f"and {head_dim} cosines and sines; got {features} and {angles}"
            )
        if positions_T.dtype != torch.int64 or positions_T.shape != (rows,) or not positions_T.is_contiguous():
            raise ValueError(f"positions must be {rows} int64, got {tuple(positions_T.shape)} of {positions_T.dtype}")
        if cos_sin_PD.dtype != torch.float32 or not cos_sin_PD.is_contiguous():
            raise ValueError("the table of angles must be contiguous float32")
        for norm_D in (q_norm_D, k_norm_D):
            if norm_D is not None:
                _require_norm(norm_D, head_dim)
        if self._rope(
            self.pool,
            qkv_TA.data_ptr(),
            qkv_TA.stride(0),
            positions_T.data_ptr(),
            cos_sin_PD.data_ptr(),
            known,
            rows,
            num_heads,
            num_kv_heads,
            head_dim,
            None if q_norm_D is None else q_norm_D.data_ptr(),
            None if k_norm_D is None else k_norm_D.data_ptr(),
            eps,
        ):
            self.fail(f"positions must lie in [0, {known})")

    def argmax(self, x_SV: Tensor) -> Tensor:
        rows, width = x_SV.shape
        if width == 0:
            raise ValueError("the largest of no elements was asked for")
        _require_floats(x_SV)
        out_S = torch.empty(rows, dtype=torch.int64)
        if self.library.shoal_argmax(self.pool, x_SV.data_ptr(), x_SV.stride(0), rows, width, out_S.data_ptr()):
            self.fail("the input does not fit")
        return out_S

    def draw(
        self, weights_SV: Tensor, seeds_S: UInt64Array, indices_S: UInt64Array, positions_S: UInt64Array
    ) -> Tensor:
        rows, width = weights_SV.shape
        _require_floats(weights_SV)
        numbers = [np.ascontiguousarray(words) for words in (seeds_S, indices_S, positions_S)]
        if any(words.dtype != np.uint64 or words.shape != (rows,) for words in numbers):
            raise ValueError(f"a draw takes a seed, an index and a position, uint64, for each of {rows} rows")
        out_S = torch.empty(rows, dtype=torch.int64)
        addresses = [words.ctypes.data for words in numbers]
        if self.library.shoal_draw(
            self.pool, weights_SV.data_ptr(), weights_SV.stride(0), rows, width, *addresses, out_S.data_ptr()
        ):
            self.fail("the input does not fit")
        return out_S


def _require_floats(x: Tensor) -> None:
    if x.dtype != torch.float32 or x.stride(-1) != 1:
        raise ValueError(f"native kernels take float32 with contiguous rows, got {x.dtype} with strides {x.stride()}")


def _require_norm(weight: Tensor, size: int) -> None:
    if weight.shape != (size,) or weight.dtype != torch.float32 or weight.stride(0) != 1:
        raise ValueError(f"norm weights must be {size} float32, got {tuple(weight.shape)} of {weight.dtype}")
