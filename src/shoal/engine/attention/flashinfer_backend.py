"""Paged attention by FlashInfer (arXiv 2501.01005), where it is installed: its wrappers for decodes and for all else.

A wrapper plans a step, from lengths on the host, and then runs for every layer with the same scale, window and cap.
Written by its documentation as of 0.7; not yet run on a GPU.

Shapes: S sequences, T tokens, N query heads, M key/value heads, D head size, B blocks of a table.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shoal.engine.attention.base import AttentionBatch, HeadSharing
from shoal.engine.attention.portable import PortableCache, PortablePages

_WORKSPACE_BYTES = 128 << 20
"""What its documentation advises; the wrappers of a step take turns with it."""
_PLAIN_GROUPS = (1, 2, 3)
"""Query heads of a key/value head for which decodes do without tensor cores: there are kernels for few others."""


def missing_reason() -> str | None:
    """Why there is no such attention; None if there is."""
    if find_spec("flashinfer") is None:
        return "the package flashinfer-python is not installed: pip install 'shoal[flashinfer]'"
    return None


class _Kind(NamedTuple):
    """Steps and layers that one wrapper serves. Heads are of this rank."""

    is_decode: bool
    scale: float
    window: int | None
    soft_cap: float | None


class FlashInferAttention(PortablePages):
    """Cache and writes are those of portable attention: (blocks, tokens, heads, features), called NHD there."""

    name = "flashinfer"
    capturable = False
    serves_latents = False

    def __init__(self, sharing: HeadSharing | None = None) -> None:
        reason = missing_reason()
        if reason is not None:
            raise ValueError(f"attention: flashinfer is not there: {reason}")
        if sharing is not None and sharing.skipped:
            raise ValueError(f"attention: flashinfer takes whole groups of query heads; {sharing.skipped} are cut off")
        self._workspace: Tensor | None = None
        self._wrappers: dict[_Kind, Any] = {}
        # Of the step in progress: layers of one kind share its plan.
        self._batch: AttentionBatch | None = None
        self._planned: set[_Kind] = set()

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
        if batch.kept_before is not None:
            raise ValueError("flashinfer attention has no ranks that share a context")
        if self._batch is not batch:
            self._batch = batch
            self._planned.clear()
        kind = _Kind(batch.max_query_len == 1, scale, window, soft_cap)
        keys, values = cache.keys_KPMD[layer], cache.values_KPMD[layer]
        wrapper = self._wrappers.get(kind)
        if wrapper is None:
            wrapper = self._wrappers[kind] = self._wrapper(kind, q_TND.shape[1] // keys.shape[2], q_TND.device)
        if kind not in self._planned:
            self._plan(wrapper, kind, q_TND, keys, batch)
            self._planned.add(kind)
        if not need_lse:
            return wrapper.run(q_TND.contiguous(), (keys, values)), None
        out_TND, lse_TN = wrapper.run(q_TND.contiguous(), (keys, values), return_lse=True)
        return out_TND, lse_TN * log(2.0)  # its logarithms are of base 2

    def _wrapper(self, kind: _Kind, group: int, device: torch.device) -> Any:
        flashinfer = import_module("flashinfer")
        if self._workspace is None:
            # Zeros: its kernels count on that of a part of it.
            self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        if kind.is_decode:
            by_matrix_units = group not in _PLAIN_GROUPS
            return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace, "NHD", use_tensor_cores=by_matrix_units
            )
        return flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")

    def _plan(self, wrapper: Any, kind: _Kind, q_TND: Tensor, keys_KPMD: Tensor, batch: AttentionBatch) -> None:
        _, page, kv_heads, head_dim = keys_KPMD.shape
        starts_S1, tables_SB = batch.query_starts_S1, batch.block_tables_SB
        context_S = batch.seen_T[starts_S1[1:].long() - 1]
        pages_S = (context_S + page - 1) // page
        page_starts_S1 = torch.zeros_like(starts_S1)
        torch.cumsum(pages_S, 0, dtype=torch.int32, out=page_starts_S1[1:])
        is_own_SB = torch.arange(tables_SB.shape[1], device=tables_SB.device) < pages_S[:, None]
        arguments = page_starts_S1, tables_SB[is_own_SB], (context_S - 1) % page + 1
        options = {
            "sm_scale": kind.scale,
            # How many tokens before its own a query sees.
            "window_left": -1 if kind.window is None else kind.window - 1,
            "logits_soft_cap": kind.soft_cap,
            "q_data_type": q_TND.dtype,
            "kv_data_type": keys_KPMD.dtype,
        }
        sizes = q_TND.shape[1], kv_heads, head_dim, page
        if kind.is_decode:
            wrapper.plan(*arguments, *sizes, **options)
        else:
            wrapper.plan(starts_S1, *arguments, *sizes, causal=True, **options)
