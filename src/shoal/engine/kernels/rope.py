"""Norms of heads, rotation, and the write of keys and values into a paged cache, in one pass over a fused projection.

One program takes some heads of one token, all of the same kind. Values of a cache are stored as they are, or as FP8
(e4m3) or INT8 times a scale: one for each head, given, or one for each head of each token, found here.

Shapes: T tokens, A fused query/key/value features, N query heads, M key/value heads, D head size, K blocks of the
cache, P tokens of a block, L positions of the table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.engine.attention.base import PagedKV

_HEADS = 4
"""Of one program: with heads of 128 that is a warp's 16-byte load of each half."""
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, *_LARGEST)


@triton.jit
def _rotated(low, high, cos_sin_ptr, features, inside, HALF: tl.constexpr):
    """Of halves [heads, features], by the angles of one position."""
    cos = tl.load(cos_sin_ptr + features, mask=inside, other=0.0)[None, :]
    sin = tl.load(cos_sin_ptr + HALF + features, mask=inside, other=0.0)[None, :]
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _head_normed(low, high, weight_ptr, features, inside, eps, HALF: tl.constexpr):
    squares = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
    scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
    low_weight = tl.load(weight_ptr + features, mask=inside, other=0.0)[None, :]
    high_weight = tl.load(weight_ptr + HALF + features, mask=inside, other=0.0)[None, :]
    return low * scale * low_weight, high * scale * high_weight


@triton.jit
def _stored(x, dtype: tl.constexpr, LARGEST: tl.constexpr):
    """A scaled value as it is stored: within range, integers to the nearest."""
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    if dtype == tl.int8:
        x = tl.floor(x + 0.5)
    return x.to(dtype)


@triton.jit
def _write(
    low,
    high,
    cache_ptr,
    scale_ptr,
    block,
    offset,
    heads,
    features,
    inside,
    block_stride,
    token_stride,
    head_stride,
    scale_block_stride,
    scale_token_stride,
    scale_head_stride,
    num_kv_heads,
    HALF: tl.constexpr,
    SCALES: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Heads of one token into the cache. SCALES: 0 none, 1 given for each head, 2 found for each head of each token."""
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    place = cache_ptr + block * block_stride + offset * token_stride + heads[:, None] * head_stride + features[None, :]
    if SCALES == 0:
        tl.store(place, low.to(dtype), mask=inside)
        tl.store(place + HALF, high.to(dtype), mask=inside)
    else:
        is_head = heads < num_kv_heads
        scale_place = scale_ptr + heads * scale_head_stride
        if SCALES == 1:
            scale = tl.load(scale_place, mask=is_head, other=1.0)
        else:
            largest = tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1))
            # A head of zeros has a scale too: the smallest that is no denormal when it is inverted.
            scale = tl.maximum(largest / LARGEST, 1e-12)
            tl.store(scale_place + block * scale_block_stride + offset * scale_token_stride, scale, mask=is_head)
        low, high = low / scale[:, None], high / scale[:, None]
        tl.store(place, _stored(low, dtype, LARGEST), mask=inside)
        tl.store(place + HALF, _stored(high, dtype, LARGEST), mask=inside)


@triton.jit
def _rope_kernel(
    qkv_ptr,
    positions_ptr,
    cos_sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    slots_ptr,
    keys_ptr,
    values_ptr,
    key_scale_ptr,
    value_scale_ptr,
    qkv_stride,
    key_block_stride,
    key_token_stride,
    key_head_stride,
    value_block_stride,
    value_token_stride,
    value_head_stride,
    scale_block_stride,
    scale_token_stride,
    scale_head_stride,
    block_size,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    WRITES: tl.constexpr,
    SCALES: tl.constexpr,
    LARGEST: tl.constexpr,
    HEADS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Program (token, part): parts are groups of query heads, then of key heads, then, where it WRITES, of values."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    query_parts: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    kv_parts: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    is_query = part < query_parts
    is_value = part >= query_parts + kv_parts
    first = tl.where(is_query, part, tl.where(is_value, part - query_parts - kv_parts, part - query_parts)) * HEADS
    num_heads = tl.where(is_query, NUM_HEADS, NUM_KV_HEADS)
    before = tl.where(is_query, 0, tl.where(is_value, NUM_HEADS + NUM_KV_HEADS, NUM_HEADS))

    heads = first + tl.arange(0, HEADS)
    features = tl.arange(0, FEATURES)
    is_feature = features < HALF
    inside = (heads < num_heads)[:, None] & is_feature[None, :]
    place = qkv_ptr + token * qkv_stride + (before + heads[:, None]) * (2 * HALF) + features[None, :]
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    low = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    if is_value == 0:
        if HAS_NORM:
            weight_ptr = k_norm_ptr
            if is_query:
                weight_ptr = q_norm_ptr
            low, high = _head_normed(low, high, weight_ptr, features, is_feature, eps, HALF)
            # As between two kernels: the norm's result has the activations' precision.
            low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)
        position = tl.load(positions_ptr + token).to(tl.int64)
        low, high = _rotated(low, high, cos_sin_ptr + position * (2 * HALF), features, is_feature, HALF)
        low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)
        kept = inside
        if WRITES:
            kept = inside & is_query
        tl.store(place, low.to(dtype), mask=kept)
        tl.store(place + HALF, high.to(dtype), mask=kept)
    if WRITES:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if (slot >= 0) & (is_query == 0):
            block, offset = slot // block_size, slot % block_size
            if is_value:
                _write(
                    low, high, values_ptr, value_scale_ptr, block, offset, heads, features, inside,
                    value_block_stride, value_token_stride, value_head_stride,
                    scale_block_stride, scale_token_stride, scale_head_stride,
                    NUM_KV_HEADS, HALF, SCALES, LARGEST,
                )  # fmt: skip
            else:
                _write(
                    low, high, keys_ptr, key_scale_ptr, block, offset, heads, features, inside,
                    key_block_stride, key_token_stride, key_head_stride,
                    scale_block_stride, scale_token_stride, scale_head_stride,
                    NUM_KV_HEADS, HALF, SCALES, LARGEST,
                )  # fmt: skip


def rope_(
    qkv_TA: Tensor,
    positions_T: Tensor,
    cos_sin_LD: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    eps: float,
    cache: PagedKV | None = None,
    slots_T: Tensor | None = None,
) -> None:
    """Norm (where weights are given) and rotate query and key heads of (T, (N + 2 M) D), pairs (i, i + D/2).

    Without a cache in place. With one, queries are turned in place, keys and values go to their slots (block id * P +
    offset; none below 0), and theirs in `qkv_TA` are left as they were.
    """
    if len(qkv_TA) == 0:
        return
    _check(qkv_TA, positions_T, cos_sin_LD, num_heads + 2 * num_kv_heads, head_dim)
    if (q_norm_D is None) != (k_norm_D is None):
        raise ValueError("norms of heads are of queries and keys both, or of neither")
    if cache is not None:
        _check_cache(cache, slots_T, len(qkv_TA), num_kv_heads, head_dim)
    parts = triton.cdiv(num_heads, _HEADS) + triton.cdiv(num_kv_heads, _HEADS) * (1 if cache is None else 2)
    keys = values = key_scale = value_scale = None
    strides = [0] * 9
    if cache is not None:
        keys, values, key_scale, value_scale = (
            cache.keys_KPMD,
            cache.values_KPMD,
            cache.key_scale,
            cache.value_scale,
        )
        strides = [*keys.stride()[:3], *values.stride()[:3], *_scale_strides(cache)]
    _rope_kernel[(len(qkv_TA), parts)](
        qkv_TA,
        positions_T,
        cos_sin_LD,
        q_norm_D,
        k_norm_D,
        slots_T,
        keys,
        values,
        key_scale,
        value_scale,
        qkv_TA.stride(0),
        *strides,
        1 if keys is None else keys.shape[1],
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        HAS_NORM=q_norm_D is not None,
        WRITES=cache is not None,
        SCALES=0 if cache is None or cache.key_scale is None else 2 if cache.per_token_scales else 1,
        LARGEST=_LARGEST.get(keys.dtype, 0.0) if keys is not None else 0.0,
        HEADS=_HEADS,
        FEATURES=max(2, triton.next_power_of_2(head_dim // 2)),
        num_warps=1,
    )


def _scale_strides(cache: PagedKV) -> list[int]:
    """Of blocks, tokens and heads, the same for keys and values."""
    if cache.key_scale is None:
        return [0, 0, 0]
    return list(cache.key_scale.stride()) if cache.per_token_scales else [0, 0, cache.key_scale.stride(0)]


def _check(qkv_TA: Tensor, positions_T: Tensor, cos_sin_LD: Tensor, num_heads: int, head_dim: int) -> None:
    rows, features = qkv_TA.shape
    if features != num_heads * head_dim or head_dim % 2 or cos_sin_LD.shape[1] != head_dim or qkv_TA.stride(1) != 1:
        raise ValueError(
            f"{num_heads} heads of {head_dim}, an even size, are {num_heads * head_dim} adjacent features and "
            f"{head_dim} cosines and sines; got {features} and {cos_sin_LD.shape[1]}"
        )
    if positions_T.shape != (rows,):
        raise ValueError(f"positions must be {rows}, got {tuple(positions_T.shape)}")
    if cos_sin_LD.dtype != torch.float32 or not cos_sin_LD.is_contiguous():
        raise ValueError("the table of angles must be contiguous float32")


def _check_cache(cache: PagedKV, slots_T: Tensor | None, rows: int, num_kv_heads: int, head_dim: int) -> None:
    keys, values = cache.keys_KPMD, cache.values_KPMD
    if slots_T is None or slots_T.shape != (rows,):
        raise ValueError(f"a slot is needed for each of {rows} tokens")
    if keys.shape[2:] != (num_kv_heads, head_dim) or values.shape != keys.shape:
        raise ValueError(
            f"keys and values must have {num_kv_heads} heads of {head_dim}, got {tuple(keys.shape)} "
            f"and {tuple(values.shape)}"
        )
    if keys.dtype not in CACHE_DTYPES or values.dtype != keys.dtype or {keys.stride(3), values.stride(3)} != {1}:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in CACHE_DTYPES)
        raise ValueError(f"a cache holds {names}, features adjacent; got {keys.dtype} and {values.dtype}")
    if (keys.dtype in _LARGEST) != (cache.key_scale is not None and cache.value_scale is not None):
        raise ValueError(f"a cache of {keys.dtype} has {'' if keys.dtype in _LARGEST else 'no '}scales")
    for scale in (cache.key_scale, cache.value_scale):
        if scale is not None and (scale.dtype != torch.float32 or scale.shape not in ((num_kv_heads,), keys.shape[:3])):
            raise ValueError(
                f"scales must be float32 ({num_kv_heads},) or {tuple(keys.shape[:3])}, got {tuple(scale.shape)}"
            )
