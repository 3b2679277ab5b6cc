"""Triton kernels: products with weights of few bits, dequantised inside, and the rounding of activations.

Weights are the first operand of every product, tokens the second: the matrix units take 64 rows of the first at once
and as few as 8 columns of the second, so a batch of one wastes little. Sums are float32 (int32 for int8). Where a batch
is too small to fill a card, the input features are split over programs, whose partial sums one more kernel adds up, in
order: results do not depend on which program ends first.

Needs triton: import it through `linear.py`, which says what is missing.

Shapes: M tokens, N output features, K input features, G groups of them, S splits of the input features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.engine.quantization.weight import KernelWeight, block_k_of

_PROGRAMS = 264
"""Enough to fill a card: two on each of the 132 multiprocessors of an H200."""


# --- activations ----------------------------------------------------------------------------------------------------


@triton.jit
def _round_rows(
    x, values, scales, fixed_scale, stride_x, K, num_groups,
    TOP: tl.constexpr, SIZE: tl.constexpr, FIXED: tl.constexpr, POWERS: tl.constexpr, INTEGERS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program rounds SIZE features of a row with one scale; BLOCK is the power of two that holds them."""
    row, group = tl.program_id(0), tl.program_id(1)
    within = tl.arange(0, BLOCK)
    column = group * SIZE + within
    mask = (within < SIZE) & (column < K)
    numbers = tl.load(x + row.to(tl.int64) * stride_x + column, mask=mask, other=0.0).to(tl.float32)
    if FIXED:
        scale = tl.load(fixed_scale)
    else:
        scale = tl.maximum(tl.max(tl.abs(numbers), axis=0), 1e-12) / TOP
        if POWERS:
            scale = tl.exp2(tl.ceil(tl.log2(scale)))
        tl.store(scales + row * num_groups + group, scale)
    scaled = tl.minimum(tl.maximum(numbers / scale, -TOP), TOP)
    if INTEGERS:
        # To the nearest, halves to even, by what float32 cannot hold behind 1.5 * 2**23.
        scaled = (scaled + 12582912.0) - 12582912.0
    tl.store(values + row.to(tl.int64) * K + column, scaled.to(values.dtype.element_ty), mask=mask)


def round_rows(
    x_MK: Tensor, dtype: torch.dtype, top: float, group: int, *, fixed: Tensor | None, powers_of_two: bool
) -> tuple[Tensor, Tensor]:
    """Values (M, K) of `dtype` and scales (M, G), float32; (1, 1) where `fixed`, one number, is the scale."""
    m, k = x_MK.shape
    num_groups = -(-k // group)
    values_MK = torch.empty((m, k), dtype=dtype, device=x_MK.device)
    scales = torch.empty((m, num_groups), device=x_MK.device) if fixed is None else fixed.view(1, 1)
    block = triton.next_power_of_2(group)
    if fixed is not None:
        # Not one program a row: nothing is shared by its features.
        group, block = 1024, 1024
    grid = (m, -(-k // group))
    warps = min(16, max(1, block // 512))
    _round_rows[grid](
        x_MK, values_MK, scales, scales, x_MK.stride(0), k, num_groups,
        TOP=top, SIZE=group, FIXED=fixed is not None, POWERS=powers_of_two, INTEGERS=dtype == torch.int8, BLOCK=block,
        num_warps=warps,
    )  # fmt: skip
    return values_MK, scales


# --- products -------------------------------------------------------------------------------------------------------


@triton.jit
def _place(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TOGETHER: tl.constexpr):
    """Which block of tokens and of features a program computes: several blocks of features meet the same tokens in the
    cache, and several of tokens the same features."""
    program = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = TOGETHER * blocks_m
    first = (program // band) * TOGETHER
    height = tl.minimum(blocks_n - first, TOGETHER)
    return (program % band) // height, first + (program % band) % height


@triton.jit
def _store(
    sums_NM, y, bias, offs_m, offs_n, M, N, stride_split,
    HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Partial sums go to their split's (M, N); whole ones get the bias."""
    mask = (offs_n < N)[:, None] & (offs_m < M)[None, :]
    if SPLIT > 1:
        y += tl.program_id(1).to(tl.int64) * stride_split
    elif HAS_BIAS:
        sums_NM += tl.load(bias + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[:, None]
    places = y + offs_m[None, :].to(tl.int64) * N + offs_n[:, None]
    tl.store(places, sums_NM.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _scaled_product(
    a, a_scales, w, w_scales, bias, y, M, N, K, stride_as, stride_ws, stride_split,
    ROWS: tl.constexpr, GROUP: tl.constexpr, GROUPED: tl.constexpr, A_GROUPED: tl.constexpr, A_FIXED: tl.constexpr,
    INTEGERS: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = (a * a_scales) (w * w_scales)^T + bias of 8-bit a (M, K) and w (N, K), both with features side by side.

    GROUPED: w has a scale for every GROUP features, a multiple of BLOCK_K, and a too where A_GROUPED.
    """
    block_m, block_n = _place(M, N, BLOCK_M, BLOCK_N, 8)
    offs_m, offs_n = block_m * BLOCK_M + tl.arange(0, BLOCK_M), block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT)
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))
    w_NK = w + offs_n[:, None] * K + offs_k[None, :]
    a_KM = a + offs_m[None, :] * K + offs_k[:, None]
    at_a = a_scales if A_FIXED else a_scales + offs_m * stride_as
    at_w = w_scales + (offs_n // ROWS) * stride_ws
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if INTEGERS else tl.float32)
    for step in range(first, last):
        start = step * BLOCK_K
        if EVEN_K:
            weights = tl.load(w_NK + start, mask=mask_n[:, None], other=0.0)
            tokens = tl.load(a_KM + start, mask=mask_m[None, :], other=0.0)
        else:
            mask_k = offs_k < K - start
            weights = tl.load(w_NK + start, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
            tokens = tl.load(a_KM + start, mask=mask_m[None, :] & mask_k[:, None], other=0.0)
        if GROUPED:
            group = start // GROUP
            scale_N = tl.load(at_w + group, mask=mask_n, other=0.0)
            part = tl.dot(weights, tokens, out_dtype=tl.float32) * scale_N[:, None]
            if A_GROUPED:
                part *= tl.load(at_a + group, mask=mask_m, other=0.0)[None, :]
            sums += part
        else:
            sums = tl.dot(weights, tokens, sums, out_dtype=tl.int32 if INTEGERS else tl.float32)
    result = sums.to(tl.float32)
    if not GROUPED:
        result *= tl.load(at_w, mask=mask_n, other=0.0)[:, None]
    if A_FIXED:
        result *= tl.load(at_a)
    elif not A_GROUPED:
        result *= tl.load(at_a, mask=mask_m, other=0.0)[None, :]
    _store(result, y, bias, offs_m, offs_n, M, N, stride_split, HAS_BIAS, SPLIT)


@triton.jit
def _numbers(nibbles, zeros_N, DTYPE: tl.constexpr):
    """4-bit numbers less their zero points, exact. Put into the mantissa of 2**23, which is one operation where a
    conversion from integers is many cycles."""
    wide = (nibbles.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
    return (wide - (8388608.0 + zeros_N)[:, None]).to(DTYPE)


@triton.jit
def weight_sums(
    x_KM, w_NK, at_scale, at_zero, mask_m, mask_n, K, first, last,
    SCALE: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr, EVEN_K: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights by tokens over steps [first, last) of BLOCK_K input features, [BLOCK_N, BLOCK_M] in float32.

    Places are of step 0. SCALE: 0 weights are numbers as they are, 1 to be multiplied by one scale of their output
    feature, 2 by one for every GROUP input features, a multiple of BLOCK_K. PACKED: a byte has the k-th feature of a
    step's first half low and of its second half high; steps that end behind K are filled up.
    """
    STEP: tl.constexpr = BLOCK_K // 2 if PACKED else BLOCK_K
    offs_k = tl.arange(0, STEP)
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(first, last):
        start = step * BLOCK_K
        group = start // GROUP
        left = K - start
        mask_w = mask_n[:, None] if PACKED or EVEN_K else mask_n[:, None] & (offs_k < left)[None, :]
        mask_x = mask_m[None, :] if EVEN_K else mask_m[None, :] & (offs_k < left)[:, None]
        weights = tl.load(w_NK + step * STEP, mask=mask_w, other=0.0)
        tokens = tl.load(x_KM + start, mask=mask_x, other=0.0).to(DTYPE)
        part = sums
        if SCALE == 2:
            part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        if PACKED:
            mask_x = mask_m[None, :] if EVEN_K else mask_m[None, :] & (offs_k < left - STEP)[:, None]
            behind = tl.load(x_KM + start + STEP, mask=mask_x, other=0.0).to(DTYPE)
            zeros_N = tl.load(at_zero + group, mask=mask_n, other=0.0).to(tl.float32)
            part = tl.dot(_numbers(weights & 15, zeros_N, DTYPE), tokens, part, input_precision="ieee")
            part = tl.dot(_numbers(weights >> 4, zeros_N, DTYPE), behind, part, input_precision="ieee")
        else:
            part = tl.dot(weights.to(DTYPE), tokens, part, input_precision="ieee")
        if SCALE == 2:
            sums += part * tl.load(at_scale + group, mask=mask_n, other=0.0)[:, None]
        else:
            sums = part
    if SCALE == 1:
        sums *= tl.load(at_scale, mask=mask_n, other=0.0)[:, None]
    return sums


@triton.jit
def _weight_product(
    x, w, w_scales, w_zeros, bias, y, M, N, K, stride_x, stride_w, stride_ws, stride_split,
    ROWS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = x (w * w_scales)^T + bias of float x (M, K)."""
    block_m, block_n = _place(M, N, BLOCK_M, BLOCK_N, 8)
    offs_m, offs_n = block_m * BLOCK_M + tl.arange(0, BLOCK_M), block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K // 2 if PACKED else BLOCK_K)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT)
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))
    sums = weight_sums(
        x + offs_m[None, :] * stride_x + offs_k[:, None],
        w + offs_n[:, None] * stride_w + offs_k[None, :],
        w_scales + (offs_n // ROWS) * stride_ws, w_zeros + offs_n * stride_ws, offs_m < M, offs_n < N, K, first, last,
        SCALE, GROUP, PACKED, EVEN_K, x.dtype.element_ty, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    _store(sums, y, bias, offs_m, offs_n, M, N, stride_split, HAS_BIAS, SPLIT)


@triton.jit
def _add_splits(parts, bias, y, MN, N, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < MN
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLIT):
        sums += tl.load(parts + split * MN + at, mask=mask, other=0.0)
    if HAS_BIAS:
        sums += tl.load(bias + at % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=mask)


class _Tiles:
    """Block sizes for M tokens, and what splits the input features go in."""

    def __init__(self, m: int, n: int, k: int, block_k: int) -> None:
        self.few = m <= 64
        self.block_m = min(128, max(16, triton.next_power_of_2(m)))
        self.block_n = 64 if self.few else 128
        self.warps = 4 if self.few else 8
        self.stages = 4 if self.few else 3
        self.programs = -(-m // self.block_m) * -(-n // self.block_n)
        self.split = 1
        steps = -(-k // block_k)
        while self.few and self.programs * self.split * 2 <= _PROGRAMS and steps >= 8 * self.split and self.split < 16:
            self.split *= 2

    def output(self, y_MN: Tensor) -> Tensor:
        """What the product writes to."""
        if self.split == 1:
            return y_MN
        return torch.empty((self.split, *y_MN.shape), device=y_MN.device)

    def finish(self, parts: Tensor, bias_N: Tensor | None, y_MN: Tensor) -> Tensor:
        if self.split > 1:
            block = 1024
            _add_splits[(-(-y_MN.numel() // block),)](
                parts, bias_N if bias_N is not None else parts, y_MN, y_MN.numel(), y_MN.shape[1],
                SPLIT=self.split, HAS_BIAS=bias_N is not None, BLOCK=block,
            )  # fmt: skip
        return y_MN


def scaled_product(
    a_MK: Tensor, a_scales: Tensor, weight: KernelWeight, bias_N: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """(M, N) of 8-bit tokens and weights. `a_scales` are (M, 1), (M, G) or for all (1, 1): then M may be 1 as well."""
    w_NK, w_scales_RG = weight.values, weight.scales_RG
    (m, k), n = a_MK.shape, len(w_NK)
    block_k, grouped = block_k_of(weight.group, k), w_scales_RG.shape[1] > 1
    tiles = _Tiles(m, n, k, block_k)
    y_MN = torch.empty((m, n), dtype=out_dtype, device=a_MK.device)
    out = tiles.output(y_MN)
    _scaled_product[(tiles.programs, tiles.split)](
        a_MK, a_scales, w_NK, w_scales_RG, y_MN if bias_N is None else bias_N, out,
        m, n, k, a_scales.stride(0), w_scales_RG.stride(0), m * n,
        ROWS=weight.rows, GROUP=weight.group, GROUPED=grouped, A_GROUPED=grouped and a_scales.shape[1] > 1,
        A_FIXED=a_scales.numel() == 1, INTEGERS=a_MK.dtype == torch.int8, HAS_BIAS=bias_N is not None,
        EVEN_K=k % block_k == 0, SPLIT=tiles.split,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=block_k, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return tiles.finish(out, bias_N, y_MN)


def weight_product(x_MK: Tensor, weight: KernelWeight, bias_N: Tensor | None) -> Tensor:
    """(M, N) of float tokens."""
    (m, k), n = x_MK.shape, len(weight.values)
    block_k = block_k_of(weight.group, k)
    tiles = _Tiles(m, n, k, block_k)
    y_MN = torch.empty((m, n), dtype=x_MK.dtype, device=x_MK.device)
    out = tiles.output(y_MN)
    values, scales_RG, zeros_NG, rows, group, _ = weight
    _weight_product[(tiles.programs, tiles.split)](
        x_MK, values, scales_RG, values if zeros_NG is None else zeros_NG, y_MN if bias_N is None else bias_N, out,
        m, n, k, x_MK.stride(0), values.stride(0), scales_RG.stride(0), m * n,
        ROWS=rows, GROUP=group, SCALE=1 if scales_RG.shape[1] == 1 else 2, PACKED=zeros_NG is not None,
        HAS_BIAS=bias_N is not None, EVEN_K=k % block_k == 0, SPLIT=tiles.split,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=block_k, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return tiles.finish(out, bias_N, y_MN)


def architecture() -> int:
    """Of the card, such as 90."""
    return int(triton.runtime.driver.active.get_current_target().arch)
