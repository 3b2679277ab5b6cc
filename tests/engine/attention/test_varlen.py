"""What torch's variable-length attention is given, and what is made of its answer: held against the portable backend.

There is none on a CPU, so it is replaced here by its documentation: plain attention of each sequence over its pages.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.engine.attention import varlen
from shoal.engine.attention.base import AttentionBatch, HeadSharing
from shoal.engine.attention.portable import PortableAttention
from shoal.engine.attention.varlen import VarlenAttention

torch_varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no variable-length attention")
if (missing := varlen.missing_reason()) is not None:
    pytest.skip(missing, allow_module_level=True)

CPU = torch.device("cpu")


def documented(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Masks are aligned at the last query and the last key. The log-sum-exp is (heads, tokens), as it really is."""
    starts, used = cu_seq_q.tolist(), options["seqused_k"].tolist()
    assert cu_seq_k.tolist() == [sum(used[:i]) for i in range(len(used) + 1)]
    assert options["num_splits"] == 1 and options["return_aux"].lse
    assert max_q == max(b - a for a, b in zip(starts, starts[1:], strict=False)) and max_k == max(used)
    assert query.is_contiguous() and options["block_table"].dtype == torch.int32
    before, behind = options["window_size"]
    assert behind == 0
    out, lse = torch.empty_like(query), torch.empty(query.shape[1], query.shape[0])
    for i, context in enumerate(used):
        rows = slice(starts[i], starts[i + 1])
        pages = options["block_table"][i, : -(-context // key.shape[1])].long()
        repeats = query.shape[1] // key.shape[2]
        assert (repeats > 1) == options["enable_gqa"]
        k, v = (x[pages].flatten(0, 1)[:context].repeat_interleave(repeats, 1) for x in (key, value))
        scores = torch.einsum("qnd,lnd->nql", query[rows], k) * options["scale"]
        at = torch.arange(context - (starts[i + 1] - starts[i]), context)[:, None]
        hidden = torch.arange(context) > at
        if before >= 0:
            hidden |= torch.arange(context) < at - before
        scores = scores.masked_fill(hidden, float("-inf"))
        out[rows] = torch.einsum("nql,lnd->qnd", scores.softmax(-1), v)
        lse[:, rows] = scores.logsumexp(-1)
    return out, lse


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("heads", [2, 4])
def test_agrees_with_portable(heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    backends: list[Any] = [PortableAttention(), VarlenAttention(HeadSharing(heads // 2))]
    monkeypatch.setattr(torch_varlen, "varlen_attn", documented)
    batch = AttentionBatch.causal(
        query_starts_S1=torch.tensor([0, 1, 31, 41], dtype=torch.int32),
        context_lens_S=torch.tensor([300, 30, 267], dtype=torch.int32),
        block_tables_SB=torch.tensor([[3, 0], [4, 77], [1, 2]], dtype=torch.int32),
        slot_mapping_T=torch.arange(41, dtype=torch.int32),
    )
    generator = torch.Generator().manual_seed(1)
    fused = torch.randn(41, heads + 4, 16, generator=generator)
    outputs = []
    for backend in backends:
        cache: Any = backend.allocate(1, 5, 256, 2, 16, torch.float32, CPU)
        filling = torch.Generator().manual_seed(2)
        for stored in (cache.keys_KPMD[0], cache.values_KPMD[0]):
            stored.copy_(torch.randn(stored.shape, generator=filling))
        backend.write(cache, 0, fused[:, heads : heads + 2], fused[:, heads + 2 :], batch)
        out, lse = backend.forward(cache, 0, fused[:, :heads], batch, scale=0.25, window=window, need_lse=True)
        assert lse is not None
        outputs.append((out, lse))
    for found, expected in zip(outputs[1], outputs[0], strict=True):
        torch.testing.assert_close(found, expected, atol=3e-6, rtol=3e-6)


def test_what_it_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="1 are cut off"):
        VarlenAttention(HeadSharing(3, 1))
    one, table = torch.ones(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    batch = AttentionBatch.causal(torch.tensor([0, 1], dtype=torch.int32), one, table, one)
    backend = VarlenAttention()
    cache = backend.allocate(1, 1, 256, 1, 8, torch.bfloat16, CPU)
    with pytest.raises(ValueError, match="no soft cap"):
        backend.forward(cache, 0, torch.ones(1, 1, 8), batch, scale=1.0, soft_cap=2.0)
