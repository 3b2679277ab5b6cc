"""Paged attention in plain torch: runs wherever torch does, and is what every other backend is tested against.

Shapes: S sequences, T tokens, N query heads, M key/value heads, G = N / M, D head size, L padded context, Q queries of
each sequence, B blocks of a table, K blocks of the cache, P tokens a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from shoal.engine.attention.base import AttentionBatch, HeadSharing, PagedKV
from shoal.engine.attention.latent_cache import LatentCache

_MAX_ELEMENTS = 1 << 25
"""Of one temporary tensor, gathered keys or scores: 128 MiB in float32. Longer work is cut into several."""


class PortableCache:
    """Keys and values of each layer as (K, P, M, D)."""

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        self.keys_KPMD = keys
        self.values_KPMD = values
        self.num_blocks, self.block_size, self.num_kv_heads, self.row_dim = keys[0].shape
        self.nbytes = sum(tensor.nbytes for tensor in keys + values)

    def paged(self, layer: int) -> PagedKV | None:
        return PagedKV(self.keys_KPMD[layer], self.values_KPMD[layer])

    def store(self, layer: int, k_TMD: Tensor, v_TMD: Tensor, slots_T: Tensor) -> None:
        """At `slots_T`, int64."""
        for stored, x_TMD in ((self.keys_KPMD[layer], k_TMD), (self.values_KPMD[layer], v_TMD)):
            stored.flatten(0, 1)[slots_T] = x_TMD.to(stored.dtype)

    def gather(self, layer: int, tables_SB: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (S, B, P, M, D) of whole blocks, in memory of their own."""
        return self.keys_KPMD[layer][tables_SB], self.values_KPMD[layer][tables_SB]


GatheredCache = PortableCache | LatentCache
"""What this backend attends to: rows of blocks, gathered before they are computed with."""


@dataclass(frozen=True)
class _Group:
    """Sequences with equally many queries, computed in one padded call: all decodes are."""

    first_tokens: list[int]
    """Row within T of the first query of each."""
    tokens_SQ: Tensor
    """Rows within T of all."""
    tables_SB: Tensor
    longest: int
    """Of what any of them sees."""


class PortablePages:
    """Keys and values as (blocks, tokens, heads, features): what several backends allocate and write alike."""

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
        # Zeros, not empty: positions outside a window are multiplied by a weight of 0, and 0 * NaN is NaN.
        make = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * num_layers)]
        return PortableCache(make[::2], make[1::2])

    def write(self, cache: GatheredCache, layer: int, k_TMD: Tensor, v_TMD: Tensor, batch: AttentionBatch) -> None:
        cache.store(layer, k_TMD, v_TMD, batch.slot_mapping_T.long())


class PortableAttention(PortablePages):
    name = "portable"
    capturable = False
    serves_latents = True

    def __init__(self, sharing: HeadSharing | None = None) -> None:
        """`sharing` None: key/value heads are shared by equally many query heads each."""
        self._sharing = sharing
        # Of the step in progress: every layer asks for the same, and finding it waits for the device.
        self._batch: AttentionBatch | None = None
        self._groups: list[_Group] = []
        self._seen: list[int] = []
        self._unseen: dict[int, list[int]] = {}

    def forward(
        self,
        cache: GatheredCache,
        layer: int,
        q_TND: Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        need_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        first, end = 0, q_TND.shape[1]
        if self._sharing is not None:
            first, end = self._sharing.skipped, self._sharing.skipped + end
            whole = cache.num_kv_heads * self._sharing.group
            q_TND = pad(q_TND, [0, 0, first, whole - end])  # whole groups, of which some heads are thrown away again
        num_tokens, num_heads, head_dim = q_TND.shape
        out_TND = torch.empty((num_tokens, num_heads, head_dim), dtype=q_TND.dtype, device=q_TND.device)
        lse_TN = torch.empty((num_tokens, num_heads), dtype=torch.float32, device=q_TND.device)
        if self._batch is not batch:
            self._seen, self._unseen = batch.seen_T.tolist(), {}
            self._groups = list(_groups(batch, self._seen, cache))
            self._batch = batch
        for group in self._groups:
            for tile in _query_tiles(group, num_heads):
                queries = group.tokens_SQ[:, tile]
                start, stop = self._bounds(group, tile, batch, window)
                start = start // cache.block_size * cache.block_size
                seen_SQ = batch.seen_T[queries]
                unseen_SQ = None if window is None else batch.unseen_T(window)[queries]
                keys, values = _gather(cache, layer, group, start, stop, seen_SQ[:, -1:])
                out, lse = _attend(q_TND[queries], keys, values, seen_SQ, unseen_SQ, start, scale, soft_cap)
                out_TND[queries] = out.to(out_TND.dtype)
                lse_TN[queries] = lse
        return out_TND[:, first:end], lse_TN[:, first:end] if need_lse else None

    def _bounds(self, group: _Group, tile: slice, batch: AttentionBatch, window: int | None) -> tuple[int, int]:
        """[start, stop) of the positions that any of the tile's queries of any sequence sees."""
        stop = max(self._seen[token + tile.stop - 1] for token in group.first_tokens)
        if window is None:
            return 0, stop
        if window not in self._unseen:
            self._unseen[window] = batch.unseen_T(window).tolist()
        unseen = self._unseen[window]
        return min(unseen[token + tile.start] for token in group.first_tokens), stop


def _groups(batch: AttentionBatch, seen: list[int], cache: GatheredCache) -> Iterator[_Group]:
    starts = batch.query_starts_S1.tolist()
    lens = [seen[end - 1] if end > start else 0 for start, end in zip(starts, starts[1:], strict=False)]
    per_position = cache.num_kv_heads * cache.row_dim
    # Sorted, so that a call pads sequences to the length of their likes.
    order = sorted(
        (i for i in range(len(lens)) if starts[i + 1] > starts[i]), key=lambda i: (_queries(starts, i), lens[i])
    )
    members: list[int] = []
    for i in order:
        too_many = (len(members) + 1) * lens[i] * per_position > _MAX_ELEMENTS
        if members and (too_many or _queries(starts, i) != _queries(starts, members[0])):
            yield _group(members, starts, lens, batch, cache)
            members = []
        members.append(i)
    if members:
        yield _group(members, starts, lens, batch, cache)


def _queries(starts: list[int], i: int) -> int:
    return starts[i + 1] - starts[i]


def _group(
    members: list[int], starts: list[int], lens: list[int], batch: AttentionBatch, cache: GatheredCache
) -> _Group:
    device = batch.seen_T.device
    longest = max(lens[i] for i in members)
    rows = torch.tensor(members, device=device)
    tables_SB = batch.block_tables_SB[rows, : -(-longest // cache.block_size)].long()
    first_tokens_S1 = torch.tensor([[starts[i]] for i in members], device=device)
    return _Group(
        first_tokens=[starts[i] for i in members],
        tokens_SQ=first_tokens_S1 + torch.arange(_queries(starts, members[0]), device=device),
        # Beyond a sequence's own blocks a table holds anything: any valid block will do, for it is masked.
        tables_SB=tables_SB.clamp(0, cache.num_blocks - 1),
        longest=longest,
    )


def _query_tiles(group: _Group, num_heads: int) -> Iterator[slice]:
    """Ranges of queries whose scores over the whole context stay within the limit."""
    num_sequences, num_queries = group.tokens_SQ.shape
    step = max(1, _MAX_ELEMENTS // (num_sequences * num_heads * max(1, group.longest)))
    for first in range(0, num_queries, step):
        yield slice(first, min(first + step, num_queries))


def _gather(
    cache: GatheredCache, layer: int, group: _Group, start: int, stop: int, lens_S1: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values (S, L, M, D) of positions [start, stop), start a block's first; zeros behind a sequence's end."""
    tables = group.tables_SB[:, start // cache.block_size : -(-stop // cache.block_size)]
    keys, values = (x.flatten(1, 2)[:, : stop - start] for x in cache.gather(layer, tables))
    # A block that pads the table may hold another sequence's NaN, which a weight of 0 would not stop.
    foreign_SL = torch.arange(start, stop, device=values.device) >= lens_S1
    return keys, values.masked_fill_(foreign_SL[:, :, None, None], 0.0)


def _attend(
    q_SQND: Tensor,
    k_SLMD: Tensor,
    v_SLMD: Tensor,
    seen_SQ: Tensor,
    unseen_SQ: Tensor | None,
    start: int,
    scale: float,
    soft_cap: float | None,
) -> tuple[Tensor, Tensor]:
    """Softmax in float32. Queries see positions [unseen, seen), keys are of `start` and on.

    Returns (S, Q, N, D) and (S, Q, N).
    """
    sequences, queries, _, head_dim = q_SQND.shape
    q = q_SQND.reshape(sequences, queries, k_SLMD.shape[2], -1, head_dim).float()
    scores = torch.einsum("sqmgd,slmd->smgql", q, k_SLMD.float()) * scale
    if soft_cap is not None:
        scores = torch.tanh(scores / soft_cap) * soft_cap
    positions_L = torch.arange(start, start + k_SLMD.shape[1], device=q.device)
    hidden_SQL = positions_L >= seen_SQ[:, :, None]
    if unseen_SQ is not None:
        hidden_SQL |= positions_L < unseen_SQ[:, :, None]
    scores = scores.masked_fill(hidden_SQL[:, None, None], float("-inf"))
    lse_SMGQ = scores.logsumexp(dim=-1)
    # Minus infinity of a query that sees nothing: its weights are to be 0.
    shift_SMGQ = lse_SMGQ.masked_fill(lse_SMGQ == float("-inf"), 0.0)
    weights = (scores - shift_SMGQ[..., None]).exp()
    out = torch.einsum("smgql,slmd->sqmgd", weights, v_SLMD.float())
    return out.flatten(2, 3), lse_SMGQ.permute(0, 3, 1, 2).flatten(2, 3)
