"""Writes a step's keys and values into the pages of the cache, in Triton, quantised on the way where the cache is.

Shapes: T tokens, M key/value heads, D head size, K blocks of the cache, P tokens a block.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from shoal.engine.attention.triton_parts import Paged

_MOST_ELEMENTS = 4096
"""Of one program: 32 for each thread of 4 warps."""
FLOAT8_MAX = tl.constexpr(448.0)
INT8_MAX = tl.constexpr(127.0)


@triton.jit
def _store(
    x_MD,
    rows,
    scales,
    head_M,
    live_MD,
    block,
    offset,
    SCALES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
):
    """Heads (M, D) of one token. SCALES as for reading: 1 divides by the head's scale, 2 finds one and keeps it."""
    if SCALES == 1:
        scale_M = tl.load(scales + head_M, mask=head_M < KV_HEADS, other=1.0)
        x_MD = tl.clamp(x_MD / scale_M[:, None], -FLOAT8_MAX, FLOAT8_MAX)
    elif SCALES == 2:
        # Of zeros alone too there is a scale that can be divided by.
        scale_M = tl.maximum(tl.max(tl.abs(x_MD), axis=1) / INT8_MAX, 1e-20)
        x_MD = tl.floor(x_MD / scale_M[:, None] + 0.5)
        tl.store(scales + (block * KV_HEADS + head_M) * PAGE + offset, scale_M, mask=head_M < KV_HEADS)
    at_MD = ((block * KV_HEADS + head_M) * PAGE + offset)[:, None] * D + tl.arange(0, D_PADDED)[None, :]
    tl.store(rows + at_MD, x_MD.to(rows.dtype.element_ty), mask=live_MD)


@triton.jit
def _write_kernel(
    k,
    v,
    keys,
    values,
    key_scales,
    value_scales,
    slots,
    k_stride,
    v_stride,
    KV_HEADS: tl.constexpr,
    TOGETHER: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    SCALES: tl.constexpr,
):
    """Grid: (T, heads in groups of TOGETHER). A token whose slot is negative is not kept."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    head_M = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    dims_D = tl.arange(0, D_PADDED)
    live_MD = (head_M < KV_HEADS)[:, None] & (dims_D < D)[None, :]
    from_MD = (head_M * D)[:, None] + dims_D[None, :]
    block = slot // PAGE
    offset = slot % PAGE
    k_MD = tl.load(k + token * k_stride + from_MD, mask=live_MD, other=0.0).to(tl.float32)
    _store(k_MD, keys, key_scales, head_M, live_MD, block, offset, SCALES, KV_HEADS, PAGE, D, D_PADDED)
    v_MD = tl.load(v + token * v_stride + from_MD, mask=live_MD, other=0.0).to(tl.float32)
    _store(v_MD, values, value_scales, head_M, live_MD, block, offset, SCALES, KV_HEADS, PAGE, D, D_PADDED)


def write_pages(k_TMD: Tensor, v_TMD: Tensor, paged: Paged, slots_T: Tensor) -> None:
    """Store keys and values at `slots_T` (block * P + offset, int32). The last two dimensions are contiguous."""
    tokens, kv_heads, head_dim = k_TMD.shape
    padded = max(16, triton.next_power_of_2(head_dim))
    together = min(triton.next_power_of_2(kv_heads), max(1, _MOST_ELEMENTS // padded))
    _write_kernel[(tokens, -(-kv_heads // together))](
        k_TMD,
        v_TMD,
        paged.keys_KMPD,
        paged.values_KMPD,
        slots_T if paged.key_scales is None else paged.key_scales,
        slots_T if paged.value_scales is None else paged.value_scales,
        slots_T,
        k_TMD.stride(0),
        v_TMD.stride(0),
        KV_HEADS=kv_heads,
        TOGETHER=together,
        PAGE=paged.keys_KMPD.shape[2],
        D=head_dim,
        D_PADDED=padded,
        SCALES=paged.scales,
        num_warps=4 if together * padded >= 1024 else 1,
    )
