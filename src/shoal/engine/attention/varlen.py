"""Paged attention by torch's own variable-length flash attention, where that is right: blocks of 256 and 16-bit KV.

Its pages are those of flash attention 2, which every CUDA build of torch has from compute capability 8.0 on. Contexts
are not split (`num_splits=1`): left to itself it splits, and then decodes over a block table are NaN now and then.

Shapes: S sequences, T tokens, N query heads, D head size.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from shoal.engine.attention.base import AttentionBatch, HeadSharing
from shoal.engine.attention.portable import PortableCache, PortablePages


def missing_reason() -> str | None:
    """Why this torch has no such attention; None if it has."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    lacking = {"block_table", "seqused_k", "num_splits", "enable_gqa"} - set(inspect.signature(varlen_attn).parameters)
    if lacking:
        return f"varlen_attn of torch {torch.__version__} has no {', '.join(sorted(lacking))}"
    return None


class VarlenAttention(PortablePages):
    """Cache and writes are those of portable attention: (blocks, tokens, heads, features)."""

    name = "varlen"
    capturable = False
    serves_latents = False

    def __init__(self, sharing: HeadSharing | None = None) -> None:
        reason = missing_reason()
        if reason is not None:
            raise ValueError(f"attention: varlen is not there: {reason}")
        if sharing is not None and sharing.skipped:
            raise ValueError(f"attention: varlen takes whole groups of query heads; {sharing.skipped} are cut off")

    def forward(
        self,
        cache: PortableCache,
        layer: int,
        q_TND: Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        need_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if soft_cap is not None or batch.kept_before is not None:
            raise ValueError("varlen attention has no soft cap, and no ranks that share a context")
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        starts_S1 = batch.query_starts_S1
        context_S = batch.seen_T[starts_S1[1:].long() - 1]
        context_starts_S1 = torch.zeros_like(starts_S1)
        torch.cumsum(context_S, 0, dtype=torch.int32, out=context_starts_S1[1:])
        keys, values = cache.keys_KPMD[layer], cache.values_KPMD[layer]
        found = varlen_attn(
            q_TND.contiguous(),
            keys,
            values,
            starts_S1,
            context_starts_S1,
            batch.max_query_len,
            batch.max_context_len,
            return_aux=AuxRequest(lse=True),
            scale=scale,
            # How many tokens before its own a query sees, and behind it.
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=keys.shape[2] != q_TND.shape[1],
            seqused_k=context_S,
            block_table=batch.block_tables_SB,
            num_splits=1,
        )
        out_TND, lse_NT = found
        # (N, T), whatever its documentation says.
        return out_TND, lse_NT.transpose(0, 1).contiguous() if need_lse else None
