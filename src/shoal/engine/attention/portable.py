"""Paged attention in plain torch: runs wherever torch does, and is what every other backend is tested against.

Shapes: S sequences, T tokens, N query heads, M key/value heads, G = N / M, D head size, L padded context, Q padded
queries, K blocks of the cache, P tokens a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.engine.attention.base import AttentionBatch


class PortableCache:
    """Keys and values of each layer as (K, P, M, D)."""

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        self.keys_KPMD = keys
        self.values_KPMD = values
        self.num_blocks, self.block_size = keys[0].shape[:2]
        self.nbytes = sum(tensor.nbytes for tensor in keys + values)


class PortableAttention:
    name = "portable"

    def allocate(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> PortableCache:
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        # Zeros, not empty: masked positions are multiplied by a weight of 0, and 0 * NaN is NaN.
        make = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * num_layers)]
        return PortableCache(make[::2], make[1::2])

    def write(self, cache: PortableCache, layer: int, k_TMD: Tensor, v_TMD: Tensor, batch: AttentionBatch) -> None:
        slots = batch.slot_mapping_T.long()
        keys, values = cache.keys_KPMD[layer], cache.values_KPMD[layer]
        keys.flatten(0, 1)[slots] = k_TMD.to(keys.dtype)
        values.flatten(0, 1)[slots] = v_TMD.to(values.dtype)

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
        num_tokens, num_heads, head_dim = q_TND.shape
        out_TND = torch.empty((num_tokens, num_heads, head_dim), dtype=q_TND.dtype, device=q_TND.device)
        lse_TN = torch.empty((num_tokens, num_heads), dtype=torch.float32, device=q_TND.device)
        starts = batch.query_starts_S1.tolist()
        lens = batch.context_lens_S.tolist()
        # Sequences with equally many queries go in one padded call: all decodes do.
        groups: dict[int, list[int]] = {}
        for i in range(len(lens)):
            groups.setdefault(starts[i + 1] - starts[i], []).append(i)
        for num_queries, members in groups.items():
            context = max(lens[i] for i in members)
            num_blocks = -(-context // cache.block_size)
            rows = torch.tensor(members, device=q_TND.device)
            tables_SB = batch.block_tables_SB[rows, :num_blocks].long()
            # Beyond a sequence's own blocks a table holds anything: any valid block will do, for it is masked.
            tables_SB = tables_SB.clamp(0, cache.num_blocks - 1)
            keys = cache.keys_KPMD[layer][tables_SB].flatten(1, 2)[:, :context]
            values = cache.values_KPMD[layer][tables_SB].flatten(1, 2)[:, :context]
            tokens_SQ = torch.tensor([starts[i] for i in members], device=q_TND.device)[:, None] + torch.arange(
                num_queries, device=q_TND.device
            )
            out, lse = _attend(q_TND[tokens_SQ], keys, values, batch.context_lens_S[rows], scale, window, soft_cap)
            out_TND[tokens_SQ] = out.to(out_TND.dtype)
            lse_TN[tokens_SQ] = lse
        return out_TND, lse_TN if need_lse else None


def _attend(
    q_SQND: Tensor,
    k_SLMD: Tensor,
    v_SLMD: Tensor,
    context_lens_S: Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> tuple[Tensor, Tensor]:
    """Softmax in float32. Query j of Q stands at position context_len - Q + j of its sequence."""
    num_queries, num_kv_heads = q_SQND.shape[1], k_SLMD.shape[2]
    q = q_SQND.unflatten(2, (num_kv_heads, -1)).float()
    scores = torch.einsum("sqmgd,slmd->smgql", q, k_SLMD.float()) * scale
    if soft_cap is not None:
        scores = torch.tanh(scores / soft_cap) * soft_cap
    queries = torch.arange(num_queries, device=q.device)
    at_SQ1 = (context_lens_S.long()[:, None] - num_queries + queries)[:, :, None]
    positions_L = torch.arange(k_SLMD.shape[1], device=q.device)
    seen_SQL = positions_L <= at_SQ1
    if window is not None:
        seen_SQL &= positions_L > at_SQ1 - window
    scores = scores.masked_fill(~seen_SQL[:, None, None], float("-inf"))
    lse_SMGQ = scores.logsumexp(dim=-1)
    weights = (scores - lse_SMGQ[..., None]).exp()
    out = torch.einsum("smgql,slmd->sqmgd", weights, v_SLMD.float())
    return out.flatten(2, 3), lse_SMGQ.permute(0, 3, 1, 2).flatten(2, 3)
