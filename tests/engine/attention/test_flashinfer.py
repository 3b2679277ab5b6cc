"""What FlashInfer is told, and what is made of its answer: held against the portable backend.

There is none on a CPU, so it is replaced there by its documentation: plain attention of each sequence over its pages.
On a GPU with flashinfer installed it is itself (`pytest -m gpu`).
"""

from __future__ import annotations

import importlib.util
import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.engine.attention import flashinfer_backend
from shoal.engine.attention.base import AttentionBatch, HeadSharing
from shoal.engine.attention.flashinfer_backend import FlashInferAttention
from shoal.engine.attention.portable import PortableAttention

CPU = torch.device("cpu")


class Documented:
    """Both wrappers. Pages in one list, cut by sequence; masks are aligned at the last query and the last key."""

    made = 0

    def __init__(self, workspace: Tensor, kv_layout: str, use_tensor_cores: bool = False) -> None:
        assert workspace.dtype == torch.uint8 and kv_layout == "NHD"
        Documented.made += 1
        self.plans = 0

    def run(
        self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], return_lse: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        assert q.is_contiguous() and q.dtype == self.options["q_data_type"]
        assert paged_kv_cache[0].dtype == self.options["kv_data_type"]
        (heads, kv_heads, head_dim, page), out = self.sizes, torch.empty_like(q)
        lse = torch.empty(q.shape[:2])
        left, cap = self.options["window_left"], self.options["logits_soft_cap"]
        for i, last in enumerate(self.last_page_len.tolist()):
            rows = slice(*self.starts[i : i + 2].tolist())
            pages = self.indices[self.indptr[i] : self.indptr[i + 1]].long()
            context = (len(pages) - 1) * page + last
            assert 1 <= last <= page
            k, v = (
                x[pages].flatten(0, 1)[:context].repeat_interleave(heads // kv_heads, 1).float() for x in paged_kv_cache
            )
            assert k.shape[2] == head_dim
            scores = torch.einsum("qnd,lnd->nql", q[rows].float(), k) * self.options["sm_scale"]
            if cap:
                scores = torch.tanh(scores / cap) * cap
            at = torch.arange(context - (rows.stop - rows.start), context)[:, None]
            hidden = torch.arange(context) > at
            if left >= 0:
                hidden |= torch.arange(context) < at - left
            scores = scores.masked_fill(hidden, float("-inf"))
            out[rows] = torch.einsum("nql,lnd->qnd", scores.softmax(-1), v).to(out.dtype)
            lse[rows] = (scores.logsumexp(-1) / math.log(2)).T
        return (out, lse) if return_lse else out


class Decode(Documented):
    def plan(self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, *sizes: int, **options: Any) -> None:
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        self.indptr, self.indices, self.last_page_len, self.sizes = indptr, indices, last_page_len, sizes
        self.starts, self.options = torch.arange(len(indptr)), options
        self.plans += 1


class Prefill(Decode):
    def plan(self, qo_indptr: Tensor, *arguments: Any, causal: bool = False, **options: Any) -> None:
        assert causal and qo_indptr.dtype == torch.int32
        super().plan(*arguments, **options)
        self.starts = qo_indptr


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = Decode
    module.BatchPrefillWithPagedKVCacheWrapper = Prefill
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flashinfer_backend, "missing_reason", lambda: None)
    monkeypatch.setattr(flashinfer_backend, "_WORKSPACE_BYTES", 1)
    monkeypatch.setattr(Documented, "made", 0)


def assert_agrees(
    queries: list[int],
    heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    tolerance: float,
    **options: Any,
) -> None:
    """Three sequences of 80, 30 and 33 tokens, the last of which are queries, in two layers."""
    starts = [0, *torch.tensor(queries).cumsum(0).tolist()]
    batch = AttentionBatch.causal(
        query_starts_S1=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens_S=torch.tensor([80, 30, 33], dtype=torch.int32, device=device),
        block_tables_SB=torch.tensor(
            [[3, 0, 9, 7, 11], [4, 2, 77, -1, 5], [10, 1, 6, 0, 0]], dtype=torch.int32, device=device
        ),
        slot_mapping_T=torch.arange(starts[-1], dtype=torch.int32, device=device),
    )
    generator = torch.Generator().manual_seed(1)
    fused = torch.randn(starts[-1], heads + 4, head_dim, generator=generator).to(device, dtype)
    outputs = []
    backends: list[Any] = [PortableAttention(), FlashInferAttention(HeadSharing(heads // 2))]
    for backend in backends:
        cache: Any = backend.allocate(2, 12, 16, 2, head_dim, dtype, device)
        filling = torch.Generator().manual_seed(2)
        for layer in (0, 1):
            for stored in (cache.keys_KPMD[layer], cache.values_KPMD[layer]):
                stored.copy_(torch.randn(stored.shape, generator=filling))
            backend.write(cache, layer, fused[:, heads : heads + 2], fused[:, heads + 2 :], batch)
            found = backend.forward(
                cache, layer, fused[:, :heads], batch, scale=head_dim**-0.5, need_lse=layer == 0, **options
            )
            outputs.append(found)
    for (out, lse), (expected, expected_lse) in zip(outputs[2:], outputs[:2], strict=True):
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
        assert (lse is None) == (expected_lse is None)
        if lse is not None and expected_lse is not None:
            torch.testing.assert_close(lse, expected_lse, atol=tolerance, rtol=tolerance)


STEPS = pytest.mark.parametrize("queries", [[1, 1, 1], [1, 30, 7]], ids=["decodes", "mixed"])
OPTIONS = pytest.mark.parametrize("options", [{}, {"window": 20}, {"soft_cap": 2.0}], ids=str)


@STEPS
@OPTIONS
@pytest.mark.parametrize("heads", [2, 8])
def test_agrees_with_portable(
    queries: list[int], options: dict[str, Any], heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    assert_agrees(queries, heads, 16, CPU, torch.float32, 3e-6, **options)
    assert Documented.made == 1  # layers of one kind share it


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="flashinfer is not installed")
@STEPS
@OPTIONS
@pytest.mark.parametrize("heads", [2, 8])
def test_agrees_with_portable_on_a_gpu(queries: list[int], options: dict[str, Any], heads: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    assert_agrees(queries, heads, 128, torch.device("cuda"), torch.bfloat16, 2e-2, **options)


def test_a_step_is_planned_once_for_each_kind_of_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    one, table = torch.ones(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    backend = FlashInferAttention()
    cache = backend.allocate(4, 1, 16, 1, 16, torch.float32, CPU)
    for _ in range(2):
        batch = AttentionBatch.causal(torch.tensor([0, 1], dtype=torch.int32), one, table, one)
        for layer, window in enumerate((None, 8, None, 8)):
            backend.forward(cache, layer, torch.ones(1, 2, 16), batch, scale=1.0, window=window)
    assert [wrapper.plans for wrapper in backend._wrappers.values()] == [2, 2]


def test_what_it_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    with pytest.raises(ValueError, match="1 are cut off"):
        FlashInferAttention(HeadSharing(3, 1))
