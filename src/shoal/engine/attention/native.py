"""Paged attention by the native CPU kernels: see native/attention.h for the layout and the order of computation.

Shapes: T tokens, N query heads, M key/value heads, D head size.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from shoal.engine.attention.base import AttentionBatch
from shoal.engine.native import AttentionCall
from shoal.engine.native_ops import NativeOps

_VECTOR = 16
"""Floats; head and block sizes are multiples of it."""
_MAX_HEAD_DIM = 256
_MAX_GROUP = 6
"""Query heads of one key/value head that the AVX2 kernels hold at once."""


class NativeCache:
    """Keys (blocks, M, D, block_size) and values (blocks, M, block_size, D) of each layer, float32 or bfloat16."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], block_size: int, num_kv_heads: int) -> None:
        self.keys = keys
        self.values = values
        self.num_blocks = keys[0].shape[0]
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.is_bfloat16 = keys[0].dtype == torch.bfloat16
        self.nbytes = sum(tensor.nbytes for tensor in keys + values)
        self.addresses = [(k.data_ptr(), v.data_ptr()) for k, v in zip(keys, values, strict=True)]


class NativeAttention:
    name = "native"

    def __init__(self, ops: NativeOps) -> None:
        self._ops = ops
        self._write = ops.library.shoal_write_kv
        self._attention = ops.library.shoal_attention

    @staticmethod
    def unsupported_reason(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> str | None:
        """Why these kernels cannot serve a model of this shape; None if they can."""
        if head_dim % _VECTOR or head_dim > _MAX_HEAD_DIM:
            return f"head size {head_dim} is not a multiple of {_VECTOR} up to {_MAX_HEAD_DIM}"
        if block_size % _VECTOR:
            return f"block size {block_size} is not a multiple of {_VECTOR}"
        if num_heads // num_kv_heads > _MAX_GROUP:
            return f"{num_heads // num_kv_heads} query heads share a key/value head, more than {_MAX_GROUP}"
        return None

    def allocate(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> NativeCache:
        """Not filled, so that the system gives memory to blocks only as they are used."""
        reason = self.unsupported_reason(num_kv_heads, num_kv_heads, head_dim, block_size)
        if reason is not None:
            raise ValueError(f"native attention: {reason}")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"native attention keeps KV as float32 or bfloat16, not {dtype}")
        keys = [torch.empty((num_blocks, num_kv_heads, head_dim, block_size), dtype=dtype) for _ in range(num_layers)]
        values = [torch.empty((num_blocks, num_kv_heads, block_size, head_dim), dtype=dtype) for _ in range(num_layers)]
        return NativeCache(keys, values, block_size, num_kv_heads)

    def write(self, cache: NativeCache, layer: int, k_TMD: Tensor, v_TMD: Tensor, batch: AttentionBatch) -> None:
        keys, values = cache.addresses[layer]
        tokens, kv_heads, head_dim = k_TMD.shape
        if k_TMD.stride() != v_TMD.stride() or k_TMD.stride()[1:] != (head_dim, 1):
            raise ValueError("keys and values must be views of one fused tensor or both contiguous")
        self._write(
            self._ops.pool,
            keys,
            values,
            k_TMD.data_ptr(),
            v_TMD.data_ptr(),
            k_TMD.stride(0),
            batch.slot_mapping_T.data_ptr(),
            tokens,
            kv_heads,
            head_dim,
            cache.block_size,
            cache.is_bfloat16,
        )

    def forward(
        self,
        cache: NativeCache,
        layer: int,
        q_TND: Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        need_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        tokens, heads, head_dim = q_TND.shape
        if q_TND.stride()[1:] != (head_dim, 1):
            raise ValueError("the heads of a token must be contiguous")
        keys, values = cache.addresses[layer]
        out_TND = torch.empty((tokens, heads, head_dim))
        lse_TN = torch.empty((tokens, heads)) if need_lse else None
        call = AttentionCall(
            q_TND.data_ptr(),
            q_TND.stride(0),
            keys,
            values,
            batch.query_starts_S1.data_ptr(),
            batch.context_lens_S.data_ptr(),
            batch.block_tables_SB.data_ptr(),
            batch.block_tables_SB.stride(0),
            out_TND.data_ptr(),
            None if lse_TN is None else lse_TN.data_ptr(),
            heads,
            cache.num_kv_heads,
            head_dim,
            cache.block_size,
            scale,
            soft_cap or 0.0,
            window or 0,
            cache.is_bfloat16,
        )
        self._attention(self._ops.pool, ctypes.addressof(call), batch.context_lens_S.shape[0])
        return out_TND, lse_TN
