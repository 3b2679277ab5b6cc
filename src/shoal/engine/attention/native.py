"""Paged attention by the native CPU kernels: see native/attention.h for the layout and the order of computation.

Shapes: T tokens, N query heads, M key/value heads, D head size.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from shoal.engine.attention.base import AttentionBatch, HeadSharing, PagedKV
from shoal.engine.native import AttentionCall
from shoal.engine.native_ops import NativeOps

_VECTOR = 16
"""Floats; block sizes are multiples of it, and the rows of values are padded to it."""
_MAX_HEAD_DIM = 256


class NativeCache:
    """Keys (blocks, M, D, block_size) and values (blocks, M, block_size, D padded to whole vectors) of each layer,
    float32 or bfloat16."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], block_size: int, num_kv_heads: int) -> None:
        self.keys = keys
        self.values = values
        self.num_blocks = keys[0].shape[0]
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = keys[0].shape[2]
        self.is_bfloat16 = keys[0].dtype == torch.bfloat16
        self.nbytes = sum(tensor.nbytes for tensor in keys + values)
        self.addresses = [(k.data_ptr(), v.data_ptr()) for k, v in zip(keys, values, strict=True)]

    def paged(self, layer: int) -> PagedKV | None:
        """None: keys lie by feature."""
        return None


class NativeAttention:
    name = "native"
    capturable = False
    serves_latents = False

    def __init__(self, ops: NativeOps, sharing: HeadSharing | None = None) -> None:
        """`sharing` None: key/value heads are shared by equally many query heads each."""
        self.ops = ops
        self._sharing = sharing
        self._write = ops.library.shoal_write_kv
        self._attention = ops.library.shoal_attention

    @staticmethod
    def unsupported_reason(head_dim: int, block_size: int) -> str | None:
        """Why these kernels cannot serve a model of this shape; None if they can."""
        if head_dim % 2 or not 0 < head_dim <= _MAX_HEAD_DIM:
            return f"head size {head_dim} is not an even number up to {_MAX_HEAD_DIM}"
        if block_size < 1 or block_size % _VECTOR:
            return f"block size {block_size} is not a multiple of {_VECTOR}"
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
        reason = self.unsupported_reason(head_dim, block_size)
        if reason is not None:
            raise ValueError(f"native attention: {reason}")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"native attention keeps KV as float32 or bfloat16, not {dtype}")
        width = -(-head_dim // _VECTOR) * _VECTOR
        keys = [torch.empty((num_blocks, num_kv_heads, head_dim, block_size), dtype=dtype) for _ in range(num_layers)]
        values = [torch.empty((num_blocks, num_kv_heads, block_size, width), dtype=dtype) for _ in range(num_layers)]
        return NativeCache(keys, values, block_size, num_kv_heads)

    def write(self, cache: NativeCache, layer: int, k_TMD: Tensor, v_TMD: Tensor, batch: AttentionBatch) -> None:
        keys, values = cache.addresses[layer]
        tokens, kv_heads, head_dim = k_TMD.shape
        if k_TMD.stride() != v_TMD.stride() or k_TMD.stride()[1:] != (head_dim, 1):
            raise ValueError("keys and values must be views of one fused tensor or both contiguous")
        if v_TMD.shape != k_TMD.shape or (kv_heads, head_dim) != (cache.num_kv_heads, cache.head_dim):
            raise ValueError(
                f"the cache holds {cache.num_kv_heads} heads of {cache.head_dim}, got keys {tuple(k_TMD.shape)} "
                f"and values {tuple(v_TMD.shape)}"
            )
        if k_TMD.dtype != torch.float32 or v_TMD.dtype != torch.float32:
            raise ValueError(f"keys and values must be float32, got {k_TMD.dtype} and {v_TMD.dtype}")
        slots, num_slots = batch.slot_mapping_T, cache.num_blocks * cache.block_size
        if slots.dtype != torch.int32 or slots.shape != (tokens,) or not slots.is_contiguous():
            raise ValueError(f"slot_mapping must be {tokens} int32, got {tuple(slots.shape)} of {slots.dtype}")
        if self._write(
            self.ops.pool,
            keys,
            values,
            k_TMD.data_ptr(),
            v_TMD.data_ptr(),
            k_TMD.stride(0),
            slots.data_ptr(),
            num_slots,
            tokens,
            kv_heads,
            head_dim,
            cache.block_size,
            cache.is_bfloat16,
        ):
            self.ops.fail(f"slot_mapping must lie in [0, {num_slots})")

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
        if q_TND.stride()[1:] != (head_dim, 1) or q_TND.dtype != torch.float32:
            raise ValueError("queries must be float32, the heads of a token contiguous")
        sharing = self._sharing or HeadSharing(max(1, heads // cache.num_kv_heads))
        if head_dim != cache.head_dim or not sharing.covers(heads, cache.num_kv_heads):
            raise ValueError(
                f"the cache holds {cache.num_kv_heads} heads of {cache.head_dim}, got queries {tuple(q_TND.shape)}"
            )
        starts, seen, tables = batch.query_starts_S1, batch.seen_T, batch.block_tables_SB
        unseen = None if window is None else batch.unseen_T(window)
        sequences = starts.shape[0] - 1
        if seen.shape[0] != tokens or tables.shape[0] != sequences or tables.stride(1) != 1:
            raise ValueError(
                f"{sequences + 1} query starts, {seen.shape[0]} tokens that see, {tokens} queries and tables "
                f"{tuple(tables.shape)} do not fit each other"
            )
        if not starts.dtype == seen.dtype == tables.dtype == torch.int32:
            raise ValueError(f"lengths and tables must be int32, got {starts.dtype}, {seen.dtype}, {tables.dtype}")
        if unseen is not None and (unseen.dtype != torch.int32 or unseen.shape != seen.shape):
            raise ValueError(f"what lies before windows must be {tokens} int32, got {tuple(unseen.shape)}")
        keys, values = cache.addresses[layer]
        out_TND = torch.empty((tokens, heads, head_dim))
        lse_TN = torch.empty((tokens, heads)) if need_lse else None
        call = AttentionCall(
            q_TND.data_ptr(),
            q_TND.stride(0),
            keys,
            values,
            starts.data_ptr(),
            seen.data_ptr(),
            None if unseen is None else unseen.data_ptr(),
            tables.data_ptr(),
            tables.stride(0),
            out_TND.data_ptr(),
            None if lse_TN is None else lse_TN.data_ptr(),
            heads,
            cache.num_kv_heads,
            head_dim,
            cache.block_size,
            cache.num_blocks,
            scale,
            soft_cap or 0.0,
            cache.is_bfloat16,
            tables.shape[1],
            sharing.group,
            sharing.skipped,
        )
        if self._attention(self.ops.pool, ctypes.addressof(call), sequences, tokens):
            self.ops.fail("query starts, what queries see or block tables reach beyond the tokens or the cache")
        return out_TND, lse_TN
