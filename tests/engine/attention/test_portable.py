"""PortableAttention against softmax attention written out for one query at a time in float64.

Shapes: T tokens, N query heads, M key/value heads, D head size.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shoal.engine.attention import portable
from shoal.engine.attention.base import AttentionBatch
from shoal.engine.attention.portable import PortableAttention, PortableCache

N, M, D, SCALE = 4, 2, 8, 0.3
CPU = torch.device("cpu")


class Case:
    """Sequences with some of their tokens already in the cache, over scrambled tables."""

    def __init__(self, lens: list[tuple[int, int]], block_size: int = 4) -> None:
        """`lens` holds (context, queries) of each sequence."""
        generator = torch.Generator().manual_seed(3)
        blocks = list(range(sum(-(-context // block_size) for context, _ in lens) + 3))
        random.Random(5).shuffle(blocks)
        self.lens = lens
        self.backend = PortableAttention()
        self.cache = self.backend.allocate(2, len(blocks), block_size, M, D, torch.float32, CPU)
        self.keys = [torch.randn(context, M, D, generator=generator) for context, _ in lens]
        self.values = [torch.randn(context, M, D, generator=generator) for context, _ in lens]
        self.queries = [torch.randn(queries, N, D, generator=generator) for _, queries in lens]
        self.tables = [[blocks.pop() for _ in range(-(-context // block_size))] for context, _ in lens]
        self.unused = blocks
        width = max(map(len, self.tables))
        slots = [
            [table[p // block_size] * block_size + p % block_size for p in range(context)]
            for table, (context, _) in zip(self.tables, lens, strict=True)
        ]
        starts = [0]
        for _, queries in lens:
            starts.append(starts[-1] + queries)

        def batch(mapping: list[int]) -> AttentionBatch:
            return AttentionBatch.causal(
                query_starts_S1=torch.tensor(starts, dtype=torch.int32),
                context_lens_S=torch.tensor([context for context, _ in lens], dtype=torch.int32),
                # What pads a row is rubbish: a stranger's block, or no block at all.
                block_tables_SB=torch.tensor(
                    [t + [self.unused[0], 10_000][: width - len(t)] + [-7] * (width - len(t) - 2) for t in self.tables],
                    dtype=torch.int32,
                ),
                slot_mapping_T=torch.tensor(mapping, dtype=torch.int32),
            )

        self.batch = batch([])
        everything = batch([slot for row in slots for slot in row])
        self.backend.write(self.cache, 1, torch.cat(self.keys), torch.cat(self.values), everything)

    def forward(self, **options: int | float | None) -> tuple[Tensor, Tensor]:
        out, lse = self.backend.forward(
            self.cache, 1, torch.cat(self.queries), self.batch, scale=SCALE, need_lse=True, **options
        )
        assert lse is not None
        return out, lse

    def expected(self, window: int | None = None, soft_cap: float | None = None) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for (context, queries), q, k, v in zip(self.lens, self.queries, self.keys, self.values, strict=True):
            for i in range(queries):
                last = context - queries + i
                first = 0 if window is None else max(0, last - window + 1)
                for head in range(N):
                    kv = head // (N // M)
                    scores = k[first : last + 1, kv].double() @ q[i, head].double() * SCALE
                    if soft_cap is not None:
                        scores = torch.tanh(scores / soft_cap) * soft_cap
                    outs.append(scores.softmax(0) @ v[first : last + 1, kv].double())
                    lses.append(scores.logsumexp(0))
        return torch.stack(outs).view(-1, N, D).float(), torch.stack(lses).view(-1, N).float()


LENS = {
    "decodes": [(1, 1), (9, 1), (4, 1), (30, 1)],
    "prefills": [(7, 7), (12, 12), (7, 7)],
    "mixed": [(20, 5), (9, 1), (5, 5), (16, 1), (30, 12)],
}


@pytest.mark.parametrize("limit", [None, 200])
@pytest.mark.parametrize(
    "options", [{}, {"window": 6}, {"window": 1}, {"soft_cap": 0.8}, {"window": 9, "soft_cap": 2.0}]
)
@pytest.mark.parametrize("lens", LENS.values(), ids=list(LENS))
def test_output_and_log_sum_exp(
    lens: list[tuple[int, int]], options: dict[str, int], limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit is not None:
        # So small that every call is cut into tiles of queries and groups of sequences.
        monkeypatch.setattr(portable, "_MAX_ELEMENTS", limit)
    case = Case(lens)
    out, lse = case.forward(**options)
    expected_out, expected_lse = case.expected(**options)
    torch.testing.assert_close(out, expected_out, atol=2e-6, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=2e-6, rtol=0)


def test_parts_of_a_context_merge_by_their_log_sum_exp() -> None:
    """What split-KV and context parallelism rest on: softmax(lse) weighs the parts."""
    whole, window = Case([(12, 1)]), 5
    out, lse = whole.forward()
    near, near_lse = whole.forward(window=window)
    far = Case([(12, 1)])
    far.batch = replace(far.batch, seen_T=torch.tensor([12 - window], dtype=torch.int32))
    rest, rest_lse = far.forward()
    weights = torch.stack([near_lse, rest_lse]).softmax(0)[..., None]
    torch.testing.assert_close(weights[0] * near + weights[1] * rest, out, atol=2e-6, rtol=0)
    torch.testing.assert_close(torch.logaddexp(near_lse, rest_lse), lse, atol=2e-6, rtol=0)


def test_a_strangers_nan_does_not_leak_through_padding() -> None:
    case = Case([(30, 1), (3, 1)])
    case.cache.keys_KPMD[1][case.unused] = float("nan")
    case.cache.values_KPMD[1][case.unused] = float("nan")
    expected, _ = case.expected()
    torch.testing.assert_close(case.forward()[0], expected, atol=2e-6, rtol=0)


def test_views_of_a_fused_tensor_are_read_and_written_in_place() -> None:
    case = Case([(6, 6)])
    fused = torch.cat([case.queries[0], case.keys[0], case.values[0]], dim=1)
    case.cache = case.backend.allocate(2, case.cache.num_blocks, 4, M, D, torch.float32, CPU)
    slots = [case.tables[0][p // 4] * 4 + p % 4 for p in range(6)]
    batch = replace(case.batch, slot_mapping_T=torch.tensor(slots, dtype=torch.int32))
    case.backend.write(case.cache, 1, fused[:, N : N + M], fused[:, N + M :], batch)
    out, lse = case.backend.forward(case.cache, 1, fused[:, :N], batch, scale=SCALE)
    assert lse is None
    torch.testing.assert_close(out, case.expected()[0], atol=2e-6, rtol=0)
    assert all(not tensor.any() for tensor in (case.cache.keys_KPMD[0], case.cache.values_KPMD[0]))


def test_cache_counts_its_bytes() -> None:
    cache: PortableCache = PortableAttention().allocate(3, 5, 16, M, D, torch.bfloat16, CPU)
    assert (cache.num_blocks, cache.block_size, cache.nbytes) == (5, 16, 3 * 2 * 5 * 16 * M * D * 2)
