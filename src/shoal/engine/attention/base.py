"""What a step tells an attention backend, and what a backend is.

Shapes: S sequences of the step, T their new tokens (rows of one sequence are adjacent, in order), B blocks of the
longest block table, N query heads, M key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionBatch:
    """All tensors are on the model's device; integers are int32 unless it says otherwise."""

    query_starts_S1: Tensor
    """First token of each sequence within T, and T at the end."""
    seen_T: Tensor
    """How many of its sequence's tokens, from the first one that is kept here, each token sees, once this step's are
    written: never fewer than the token before it in its sequence. Where all are kept that is its position + 1."""
    block_tables_SB: Tensor
    """Block ids; the row is only meaningful as far as the sequence's last token sees."""
    slot_mapping_T: Tensor
    """Where each token's KV goes: block id * block_size + offset."""
    max_query_len: int
    max_context_len: int
    kept_T: Tensor | None = None
    """Context parallelism: int64 indices of the tokens whose KV this rank keeps; `slot_mapping_T` is of those alone.
    None is all."""
    kept_before: Callable[[int], Tensor] | None = None
    """Context parallelism: how many of its sequence's tokens that are kept here lie before each token's window of so
    many. None is what follows where all are kept."""
    _unseen: dict[int, Tensor] = field(init=False, default_factory=dict, compare=False, repr=False)

    @classmethod
    def causal(
        cls, query_starts_S1: Tensor, context_lens_S: Tensor, block_tables_SB: Tensor, slot_mapping_T: Tensor
    ) -> AttentionBatch:
        """Of sequences whose last tokens are the step's; with them they have `context_lens_S`."""
        queries_S = query_starts_S1.diff()
        until_end_T = torch.repeat_interleave(context_lens_S - query_starts_S1[1:], queries_S)
        seen_T = until_end_T + torch.arange(1, len(until_end_T) + 1, device=until_end_T.device)
        longest = int(context_lens_S.max()), int(queries_S.max())
        return cls(query_starts_S1, seen_T.int(), block_tables_SB, slot_mapping_T, longest[1], longest[0])

    def unseen_T(self, window: int) -> Tensor:
        """How many of the tokens that `seen_T` counts lie before each token's window."""
        if window not in self._unseen:
            before_T = (self.seen_T - window).clamp_(min=0) if self.kept_before is None else self.kept_before(window)
            self._unseen[window] = before_T
        return self._unseen[window]


@dataclass(frozen=True)
class HeadSharing:
    """Which of a rank's query heads share a key/value head: `group` in a row, as in the whole model.

    Other ranks may have the first `skipped` heads of its first group, and any of its last.
    """

    group: int
    skipped: int = 0

    def covers(self, num_heads: int, num_kv_heads: int) -> bool:
        """Whether each of so many query heads has its key/value head here, and the other way round."""
        most = num_kv_heads * self.group - self.skipped
        return 0 <= self.skipped < self.group and most - self.group < num_heads <= most


@dataclass(frozen=True)
class PagedKV:
    """Keys and values of one layer's blocks, as (blocks, tokens of a block, key/value heads, head size), whatever
    order they lie in; the features of a head are adjacent.

    float8_e4m3fn and int8 have scales, float32: stored * scale is the value. (M) has one for each head, given;
    (blocks, tokens, M) one for each head of each token, written with it.
    """

    keys_KPMD: Tensor
    values_KPMD: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    @property
    def per_token_scales(self) -> bool:
        return self.key_scale is not None and self.key_scale.dim() == 3


class KVCache(Protocol):
    """Blocks of every layer, in whatever layout their backend reads best."""

    num_blocks: int
    block_size: int
    nbytes: int

    def paged(self, layer: int) -> PagedKV | None:
        """Where a kernel other than the backend's own may write; None where only the backend knows the layout."""


class ScaledKVCache(KVCache, Protocol):
    """One whose float8 numbers have a scale for each layer and key/value head."""

    def set_scales(self, layer: int, keys_M: Tensor, values_M: Tensor) -> None:
        """What keys and values are multiplied by as they are read, 1 unless set. Before anything is written."""


class AttentionBackend(Protocol):
    name: str
    capturable: bool
    """Launches depend on sizes alone and nothing is read back, so that a CUDA graph can hold them."""
    serves_latents: bool
    """Whether its `forward` takes a cache of latents, keys and values at once."""

    def allocate(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache: ...

    def write(self, cache: KVCache, layer: int, k_TMD: Tensor, v_TMD: Tensor, batch: AttentionBatch) -> None:
        """Store the step's keys and values. Comes before `forward`, so tokens of one step see each other."""

    def forward(
        self,
        cache: KVCache,
        layer: int,
        q_TND: Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        need_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Causal attention over the paged KV: output (T, N, D) and, if asked, log-sum-exp (T, N) in float32.

        `window` w: position p sees only positions > p - w. A token that sees nothing, as it may where ranks share a
        context, gets 0 and a log-sum-exp of minus infinity. q, k and v may be strided views of one fused tensor: the
        last two dimensions are contiguous, the first has any stride.
        """


def kv_bytes_per_token(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Of one layer, keys and values; of int8 with the float32 scale that each token and head has."""
    scale = torch.float32.itemsize if dtype == torch.int8 else 0
    return 2 * num_kv_heads * (head_dim * dtype.itemsize + scale)
