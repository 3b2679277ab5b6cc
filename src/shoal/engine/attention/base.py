"""What a step tells an attention backend, and what a backend is.

Shapes: S sequences of the step, T their new tokens (rows of one sequence are adjacent, in order), B blocks of the
longest block table, N query heads, M key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionBatch:
    """All tensors are on the model's device; integers are int32."""

    query_starts_S1: Tensor
    """First token of each sequence within T, and T at the end."""
    context_lens_S: Tensor
    """Tokens of KV that each sequence has once this step's are written: query i of a sequence with q new tokens
    sees positions [0, context_len - q + i]."""
    block_tables_SB: Tensor
    """Block ids; the row is only meaningful up to ceil(context_len / block_size)."""
    slot_mapping_T: Tensor
    """Where each token's KV goes: block id * block_size + offset."""
    max_query_len: int
    max_context_len: int
    kept_T: Tensor | None = None
    """Context parallelism: int64 indices of the tokens whose KV this rank keeps; `slot_mapping_T` is of those alone.
    None is all."""
    blind_T: Tensor | None = None
    """Context parallelism: int64 indices of the tokens that see nothing of what this rank keeps."""


class KVCache(Protocol):
    """Blocks of every layer, in whatever layout their backend reads best."""

    num_blocks: int
    block_size: int
    nbytes: int


class AttentionBackend(Protocol):
    name: str

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

        `window` w: position p sees only positions > p - w. q, k and v may be strided views of one fused tensor: the
        last two dimensions are contiguous, the first has any stride.
        """
