"""RMS norm of rows, with what surrounds it: the sum with the residual stream, and a norm before that sum.

One program computes one row, held in registers from the first load to the last store. Sums are over a row alone, in an
order that depends on its width alone: a row's result is the same in any batch.

Shapes: T rows, H features of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_FEATURES = 1 << 16
"""Of a row in registers: 64 float32 for each of 1024 threads."""


@triton.jit
def _normed(x, weight, eps, num_features):
    """x, zeros behind the row's end, over its root mean square: float32."""
    return x * tl.rsqrt(tl.sum(x * x, axis=0) / num_features + eps) * weight


@triton.jit
def _norm_kernel(
    x_ptr,
    residual_ptr,
    first_weight_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    num_features,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = norm(residual += norm_first(x)). Values are rounded where separate kernels would have stored them."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_features
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if HAS_FIRST:
        first = tl.load(first_weight_ptr + columns, mask=inside, other=0.0)
        x = _normed(x.to(tl.float32), first, eps, num_features).to(dtype)
    if HAS_RESIDUAL:
        place = residual_ptr + row * residual_stride + columns
        x = (x.to(tl.float32) + tl.load(place, mask=inside, other=0.0).to(tl.float32)).to(dtype)
        tl.store(place, x, mask=inside)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    y = _normed(x.to(tl.float32), weight, eps, num_features)
    tl.store(out_ptr + row * num_features + columns, y.to(dtype), mask=inside)


def rms_norm(
    x_TH: Tensor,
    weight_H: Tensor,
    eps: float,
    *,
    residual_TH: Tensor | None = None,
    first_weight_H: Tensor | None = None,
) -> Tensor:
    """The norm of x (T, H), whose rows may lie apart, as a new contiguous tensor of its dtype.

    With a residual, of the same dtype, that is `residual += x` first, in place; with `first_weight_H` x is normed by
    it before. Weights are float32, with any `+ 1` folded in.
    """
    rows, features = x_TH.shape
    _check(x_TH, residual_TH, [weight for weight in (first_weight_H, weight_H) if weight is not None])
    out_TH = torch.empty((rows, features), dtype=x_TH.dtype, device=x_TH.device)
    if not rows:
        return out_TH
    block = triton.next_power_of_2(features)
    _norm_kernel[(rows,)](
        x_TH,
        residual_TH,
        first_weight_H,
        weight_H,
        out_TH,
        x_TH.stride(0),
        0 if residual_TH is None else residual_TH.stride(0),
        features,
        eps,
        HAS_RESIDUAL=residual_TH is not None,
        HAS_FIRST=first_weight_H is not None,
        BLOCK=block,
        # 8 to 16 values a thread, so that each has whole 16-byte loads and a row of a large model a whole SM.
        num_warps=min(16, max(1, block // 512)),
    )
    return out_TH


def _check(x_TH: Tensor, residual_TH: Tensor | None, weights: list[Tensor]) -> None:
    features = x_TH.shape[1]
    if features > _MAX_FEATURES:
        raise ValueError(f"a row of {features} features is too long for a norm: at most {_MAX_FEATURES}")
    if x_TH.stride(1) != 1:
        raise ValueError(f"features of a row must be adjacent, got strides {x_TH.stride()}")
    if residual_TH is not None and (
        residual_TH.shape != x_TH.shape or residual_TH.dtype != x_TH.dtype or residual_TH.stride(1) != 1
    ):
        raise ValueError(
            f"the residual must be {tuple(x_TH.shape)} of {x_TH.dtype}, "
            f"got {tuple(residual_TH.shape)} of {residual_TH.dtype}"
        )
    for weight in weights:
        if weight.shape != (features,) or weight.dtype != torch.float32 or weight.stride(0) != 1:
            raise ValueError(f"norm weights must be {features} float32, got {tuple(weight.shape)} of {weight.dtype}")
