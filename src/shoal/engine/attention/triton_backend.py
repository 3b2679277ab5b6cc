"""Paged attention by the Triton kernels: chunks of prompts and decodes in one step, KV as it is or quantised.

A step takes at most three launches a layer: sequences of one query go to the decode kernel and its merge, all others to
the prefill kernel. Each of them finds its sequences on the device, so nothing waits for the host, and a launch depends
on nothing but sizes: it can be captured in a graph.

Shapes: T tokens, N query heads, M key/value heads, D head size, K blocks of the cache, P tokens a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.engine.attention.base import AttentionBatch, HeadSharing, PagedKV
from shoal.engine.attention.triton_decode import attend_decode, decode_tiles, num_parts
from shoal.engine.attention.triton_parts import Paged, Rows, empty_like_queries
from shoal.engine.attention.triton_prefill import attend_prefill, prefill_tiles
from shoal.engine.attention.triton_write import write_pages


class TritonCache:
    """Keys and values of each layer as (K, M, P, D): a head's page lies in one piece.

    float8_e4m3fn has a scale for each head and layer, (M) in float32, which is 1 until `set_scales`; int8 has one for
    each token and head, (K, M, P), found as it is written.
    """

    def __init__(self, pages: list[Paged]) -> None:
        self.pages = pages
        self.num_blocks, self.num_kv_heads, self.block_size, self.head_dim = pages[0].keys_KMPD.shape
        tensors = [t for page in pages for t in (page.keys_KMPD, page.values_KMPD, page.key_scales, page.value_scales)]
        self.nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def paged(self, layer: int) -> PagedKV:
        page = self.pages[layer]

        def by_token(scales: Tensor | None) -> Tensor | None:
            return scales if scales is None or scales.dim() == 1 else scales.transpose(1, 2)

        keys, values = page.keys_KMPD.transpose(1, 2), page.values_KMPD.transpose(1, 2)
        return PagedKV(keys, values, by_token(page.key_scales), by_token(page.value_scales))

    def set_scales(self, layer: int, keys_M: Tensor, values_M: Tensor) -> None:
        """What a float8 cache's numbers are multiplied by, as a checkpoint has it. Before anything is written."""
        page = self.pages[layer]
        if page.scales != 1 or page.key_scales is None or page.value_scales is None:
            raise ValueError(f"only a float8 cache has scales to set, not one of {page.keys_KMPD.dtype}")
        if not (keys_M.min() > 0 and values_M.min() > 0):
            raise ValueError(f"scales must be positive, got {keys_M.tolist()} and {values_M.tolist()}")
        page.key_scales.copy_(keys_M)
        page.value_scales.copy_(values_M)


class TritonAttention:
    name = "triton"
    capturable = True
    serves_latents = False

    def __init__(self, processors: int, sharing: HeadSharing | None = None, parts: int | None = None) -> None:
        """`processors` are the device's. `sharing` None: key/value heads are shared by equally many query heads each.

        `parts` None: contexts of decodes are split so that all processors are in use.
        """
        self._processors = processors
        self._sharing = sharing
        self._parts = parts

    def allocate(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> TritonCache:
        """Not filled: what was never written is never read."""
        shape = (num_blocks, num_kv_heads, block_size, head_dim)

        def scales() -> Tensor | None:
            if dtype == torch.float8_e4m3fn:
                return torch.ones(num_kv_heads, device=device)
            return torch.empty(shape[:3], device=device) if dtype == torch.int8 else None

        def pages() -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return TritonCache([Paged(pages(), pages(), scales(), scales()) for _ in range(num_layers)])

    def write(self, cache: TritonCache, layer: int, k_TMD: Tensor, v_TMD: Tensor, batch: AttentionBatch) -> None:
        tokens, kv_heads, head_dim = k_TMD.shape
        if v_TMD.shape != k_TMD.shape or (kv_heads, head_dim) != (cache.num_kv_heads, cache.head_dim):
            raise ValueError(
                f"the cache holds {cache.num_kv_heads} heads of {cache.head_dim}, got keys {tuple(k_TMD.shape)} "
                f"and values {tuple(v_TMD.shape)}"
            )
        if not k_TMD.stride()[1:] == v_TMD.stride()[1:] == (head_dim, 1):
            raise ValueError(f"the heads of a token must be contiguous, got {k_TMD.stride()} and {v_TMD.stride()}")
        if batch.slot_mapping_T.shape != (tokens,):
            raise ValueError(f"slot_mapping must be of {tokens} tokens, got {tuple(batch.slot_mapping_T.shape)}")
        write_pages(k_TMD, v_TMD, cache.pages[layer], batch.slot_mapping_T)

    def forward(
        self,
        cache: TritonCache,
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
        sharing = self._sharing or HeadSharing(max(1, heads // cache.num_kv_heads))
        if head_dim != cache.head_dim or not sharing.covers(heads, cache.num_kv_heads):
            raise ValueError(
                f"the cache holds {cache.num_kv_heads} heads of {cache.head_dim}, got queries {tuple(q_TND.shape)}"
            )
        if q_TND.stride()[1:] != (head_dim, 1) or batch.block_tables_SB.stride(1) != 1:
            raise ValueError("the heads of a token, and the blocks of a sequence, must be contiguous")
        unseen_T = None if window is None else batch.unseen_T(window)
        rows = Rows(batch.query_starts_S1, batch.seen_T, unseen_T, batch.block_tables_SB)
        sequences = len(batch.query_starts_S1) - 1
        itemsize = cache.pages[layer].keys_KMPD.element_size()
        out_TND, lse_TN = empty_like_queries(q_TND, need_lse)
        if batch.max_query_len > 1:
            rows_wanted = batch.max_query_len * sharing.group
            attend_prefill(
                q_TND,
                out_TND,
                lse_TN,
                cache.pages[layer],
                rows,
                group=sharing.group,
                skipped=sharing.skipped,
                scale=scale,
                soft_cap=soft_cap,
                tiles=prefill_tiles(head_dim, max(itemsize, q_TND.element_size()), rows_wanted),
            )
        # Where all sequences have the most queries that one has, none has a single one.
        if batch.max_query_len == 1 or tokens < sequences * batch.max_query_len:
            longest = batch.max_context_len if window is None else min(batch.max_context_len, window)
            tiles = decode_tiles(head_dim, itemsize, sharing.group)
            programs = sequences * cache.num_kv_heads
            attend_decode(
                q_TND,
                out_TND,
                lse_TN,
                cache.pages[layer],
                rows,
                group=sharing.group,
                skipped=sharing.skipped,
                scale=scale,
                soft_cap=soft_cap,
                parts=self._parts or num_parts(programs, longest, tiles.positions, self._processors),
                tiles=tiles,
            )
        return out_TND, lse_TN
