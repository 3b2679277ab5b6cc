"""Native paged attention against the portable one, and against itself: no query sees what is computed beside it.

Shapes: T tokens, N query heads, M key/value heads, D head size.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.engine.attention.base import AttentionBatch, HeadSharing
from shoal.engine.attention.native import NativeAttention
from shoal.engine.attention.portable import PortableAttention
from shoal.engine.native import unavailable_reason, variants
from shoal.engine.native_ops import NativeOps

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))


@pytest.fixture(params=variants())
def attention(request: pytest.FixtureRequest) -> Iterator[NativeAttention]:
    ops = NativeOps(threads=2, variant=request.param)
    yield NativeAttention(ops)
    ops.close()


class Sequences:
    """Fused q/k/v of some sequences, whose blocks are scattered over a cache; the same for every backend."""

    def __init__(
        self, lens: list[int], heads: int = 6, kv_heads: int = 2, head_dim: int = 64, block_size: int = 16
    ) -> None:
        self.lens, self.heads, self.kv_heads, self.head_dim, self.block_size = (
            lens,
            heads,
            kv_heads,
            head_dim,
            block_size,
        )
        generator = torch.Generator().manual_seed(sum(lens))
        features = (heads + 2 * kv_heads) * head_dim
        self.qkv = [torch.randn(length, features, generator=generator) for length in lens]
        counts = [-(-length // block_size) for length in lens]
        self.num_blocks = sum(counts) + 3
        blocks = list(range(self.num_blocks))
        random.Random(5).shuffle(blocks)
        self.tables = [[blocks.pop() for _ in range(count)] for count in counts]

    def batch(self, parts: list[tuple[int, int, int]]) -> AttentionBatch:
        """`parts`: (sequence, first token, one past the last) of each in the step."""
        starts, slots = [0], []
        for i, first, end in parts:
            slots += [
                self.tables[i][at // self.block_size] * self.block_size + at % self.block_size
                for at in range(first, end)
            ]
            starts.append(len(slots))
        widest = max(len(self.tables[i]) for i, _, _ in parts)
        # Beyond a sequence's own blocks a table holds anything.
        tables = [self.tables[i] + [-7] * (widest - len(self.tables[i])) for i, _, _ in parts]

        def int32(values: list[int] | list[list[int]]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32)

        return AttentionBatch.causal(
            query_starts_S1=int32(starts),
            context_lens_S=int32([end for _, _, end in parts]),
            block_tables_SB=int32(tables),
            slot_mapping_T=int32(slots),
        )

    def run(
        self,
        backend: Any,
        steps: list[list[tuple[int, int, int]]],
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Output and log-sum-exp of every token of each sequence, computed in these steps."""
        n, m, d = self.heads, self.kv_heads, self.head_dim
        cache = backend.allocate(2, self.num_blocks, self.block_size, m, d, dtype, torch.device("cpu"))
        out = [torch.zeros(length, n, d) for length in self.lens]
        lse = [torch.zeros(length, n) for length in self.lens]
        for parts in steps:
            batch = self.batch(parts)
            fused = torch.cat([self.qkv[i][first:end] for i, first, end in parts]).view(-1, n + 2 * m, d)
            backend.write(cache, 1, fused[:, n : n + m], fused[:, n + m :], batch)
            y, scores = backend.forward(cache, 1, fused[:, :n], batch, scale=d**-0.5, need_lse=True, **options)
            assert scores is not None
            starts = batch.query_starts_S1.tolist()
            for k, (i, first, end) in enumerate(parts):
                out[i][first:end], lse[i][first:end] = y[starts[k] : starts[k + 1]], scores[starts[k] : starts[k + 1]]
        return out, lse

    def whole(self) -> list[list[tuple[int, int, int]]]:
        """All tokens of all sequences in one step."""
        return [[(i, 0, length) for i, length in enumerate(self.lens)]]


def assert_close(
    found: tuple[list[Tensor], list[Tensor]], expected: tuple[list[Tensor], list[Tensor]], by: float
) -> None:
    for ours, theirs in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=by, atol=by)


def assert_equal(found: tuple[list[Tensor], list[Tensor]], expected: tuple[list[Tensor], list[Tensor]]) -> None:
    for ours, theirs in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256, 120, 72, 8])
@pytest.mark.parametrize("block_size", [16, 32])
def test_agrees_with_the_reference(attention: NativeAttention, head_dim: int, block_size: int) -> None:
    sequences = Sequences([1, 15, 16, 17, 63, 64, 65, 150], head_dim=head_dim, block_size=block_size)
    found = sequences.run(attention, sequences.whole())
    assert_close(found, sequences.run(PortableAttention(), sequences.whole()), by=5e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (1, 1), (4, 4), (8, 1), (14, 2), (32, 2), (71, 1)])
def test_any_number_of_heads_may_share(attention: NativeAttention, heads: int, kv_heads: int) -> None:
    sequences = Sequences([40, 3, 90], heads=heads, kv_heads=kv_heads, head_dim=32)
    found = sequences.run(attention, sequences.whole())
    assert_close(found, sequences.run(PortableAttention(), sequences.whole()), by=5e-6)


@pytest.mark.parametrize(("query", "kv"), [((0, 4), (0, 2)), ((4, 9), (1, 3)), ((4, 5), (1, 2)), ((2, 8), (0, 3))])
def test_a_ranks_heads_give_what_they_give_among_all(
    attention: NativeAttention, query: tuple[int, int], kv: tuple[int, int]
) -> None:
    """Groups that are cut: 9 heads in threes, of which a rank has some."""
    everything = Sequences([40, 3, 90, 700], heads=9, kv_heads=3, head_dim=32)
    outs, lses = everything.run(attention, everything.whole())
    some = copy.copy(everything)
    some.heads, some.kv_heads = query[1] - query[0], kv[1] - kv[0]
    q, k, v = (slice(first, end) for first, end in (query, (9 + kv[0], 9 + kv[1]), (12 + kv[0], 12 + kv[1])))
    heads = [x.view(-1, 15, 32) for x in everything.qkv]
    some.qkv = [torch.cat([x[:, q], x[:, k], x[:, v]], dim=1).flatten(1) for x in heads]
    sharing = HeadSharing(3, query[0] - 3 * kv[0])
    expected = [out[:, q] for out in outs], [lse[:, q] for lse in lses]
    assert_equal(some.run(NativeAttention(attention.ops, sharing), some.whole()), expected)
    assert_close(some.run(PortableAttention(sharing), some.whole()), expected, by=5e-6)


@pytest.mark.parametrize(
    "options", [{"window": 1}, {"window": 20}, {"window": 300}, {"soft_cap": 2.0}, {"window": 70, "soft_cap": 30.0}]
)
def test_window_and_soft_cap(attention: NativeAttention, options: dict[str, Any]) -> None:
    """Windows shorter and longer than a tile and than a split."""
    sequences = Sequences([400, 30, 600])
    found = sequences.run(attention, sequences.whole(), **options)
    assert_close(found, sequences.run(PortableAttention(), sequences.whole(), **options), by=1e-5)


def test_bfloat16_cache(attention: NativeAttention) -> None:
    sequences = Sequences([100, 300, 7])
    found = sequences.run(attention, sequences.whole(), torch.bfloat16)
    assert_close(found, sequences.run(PortableAttention(), sequences.whole(), torch.bfloat16), by=5e-6)


def test_large_scores_do_not_overflow(attention: NativeAttention) -> None:
    sequences = Sequences([300])
    sequences.qkv[0][:, : 7 * 64] *= 30  # queries and a head of keys: scores in the thousands
    out, lse = found = sequences.run(attention, sequences.whole())
    assert all(bool(each.isfinite().all()) for each in out + lse)
    expected = sequences.run(PortableAttention(), sequences.whole())
    assert_close(found, expected, by=2e-3)


# --- invariance -----------------------------------------------------------------------------------------------------

LENS = [5, 64, 530, 257, 4]


def chunked(size: int) -> list[list[tuple[int, int, int]]]:
    """Each sequence alone, in chunks."""
    return [[(i, at, min(length, at + size))] for i, length in enumerate(LENS) for at in range(0, length, size)]


def decoded(count: int) -> list[list[tuple[int, int, int]]]:
    """All sequences side by side: all but the last `count` tokens at once, then one by one."""
    prompts = [(i, 0, length - count) for i, length in enumerate(LENS)]
    return [prompts] + [[(i, at - left, at - left + 1) for i, at in enumerate(LENS)] for left in range(count, 0, -1)]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {}), (torch.float32, {"window": 100, "soft_cap": 20.0}), (torch.bfloat16, {"window": 300})],
)
def test_batch_chunks_and_threads_do_not_change_a_bit(
    attention: NativeAttention, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    sequences = Sequences(LENS, heads=9, kv_heads=3)
    together = sequences.run(attention, sequences.whole(), dtype, **options)
    for steps in (chunked(7), chunked(256), chunked(333), decoded(3)):
        assert_equal(sequences.run(attention, steps, dtype, **options), together)
    for threads in (1, 7):  # 7: long sequences are split among threads, which one thread never does
        ops = NativeOps(threads=threads, variant=attention.ops.variant)
        for steps in (decoded(3), chunked(333), sequences.whole()):
            assert_equal(sequences.run(NativeAttention(ops), steps, dtype, **options), together)
        ops.close()


def test_what_other_blocks_hold_does_not_matter(attention: NativeAttention) -> None:
    """Memory of the cache that was never written, NaN here, is not part of any result."""
    sequences = Sequences([37, 270], head_dim=72)
    expected = sequences.run(attention, sequences.whole())

    class Poisoned(NativeAttention):
        def allocate(self, *args, **options):  # type: ignore[no-untyped-def]
            cache = super().allocate(*args, **options)
            for tensor in cache.keys + cache.values:
                tensor.fill_(float("nan"))
            return cache

    assert_equal(sequences.run(Poisoned(attention.ops), sequences.whole()), expected)


def test_lse_merges_two_parts_of_a_context(attention: NativeAttention) -> None:
    """What log-sum-exp is for: attention over all positions from attention over two halves of them."""
    sequences = Sequences([128], heads=2, kv_heads=2)
    out, lse = (each[0] for each in sequences.run(attention, sequences.whole()))
    late_out, late_lse = (each[0] for each in sequences.run(attention, sequences.whole(), window=64))
    d, n = 64, 2
    q, k, v = (part.view(128, n, d) for part in sequences.qkv[0].split(n * d, dim=1))
    scores = torch.einsum("nd,lnd->nl", q[127], k[:64]) * d**-0.5
    early_lse = scores.logsumexp(dim=1)
    early_out = torch.einsum("nl,lnd->nd", scores.softmax(dim=1), v[:64])
    merged_lse = torch.logaddexp(early_lse, late_lse[127])
    merged = (early_lse - merged_lse).exp()[:, None] * early_out + (late_lse[127] - merged_lse).exp()[
        :, None
    ] * late_out[127]
    torch.testing.assert_close(merged, out[127], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged_lse, lse[127], rtol=1e-6, atol=1e-6)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_shapes_that_cannot_be_served_are_named(attention: NativeAttention) -> None:
    reason = NativeAttention.unsupported_reason
    assert reason(64, 16) is None
    assert "264" in (reason(264, 16) or "")
    assert "65" in (reason(65, 16) or "")
    assert "block size 24" in (reason(64, 24) or "")
    with pytest.raises(ValueError, match="block size 8"):
        attention.allocate(1, 4, 8, 2, 64, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="float16"):
        attention.allocate(1, 4, 16, 2, 64, torch.float16, torch.device("cpu"))


@pytest.mark.parametrize(
    "change",
    [
        {"slot_mapping_T": torch.tensor([0, 64], dtype=torch.int32)},
        {"slot_mapping_T": torch.tensor([0, -1], dtype=torch.int32)},
        {"slot_mapping_T": torch.tensor([0, 1])},
        {"block_tables_SB": torch.tensor([[4]], dtype=torch.int32)},
        {"block_tables_SB": torch.tensor([[-1]], dtype=torch.int32)},
        {"seen_T": torch.tensor([1, 17], dtype=torch.int32)},
        {"seen_T": torch.tensor([2, 1], dtype=torch.int32)},
        {"seen_T": torch.tensor([-1, 2], dtype=torch.int32)},
        {"seen_T": torch.tensor([2], dtype=torch.int32)},
        {"query_starts_S1": torch.tensor([0, 3], dtype=torch.int32)},
        {"query_starts_S1": torch.tensor([0], dtype=torch.int32)},
        {"seen_T": torch.tensor([1, 2])},
    ],
)
def test_nothing_is_read_or_written_beyond_the_cache(attention: NativeAttention, change: dict[str, Tensor]) -> None:
    def int32(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    fields = {
        "query_starts_S1": int32(0, 2),
        "seen_T": int32(1, 2),
        "block_tables_SB": int32(3)[None],
        "slot_mapping_T": int32(48, 49),
    }
    cache = attention.allocate(1, 4, 16, 2, 64, torch.float32, torch.device("cpu"))
    q, k, v = torch.randn(2, 4, 64), torch.randn(2, 2, 64), torch.randn(2, 2, 64)
    for tensors, is_refused in ((fields, False), (fields | change, True)):
        batch = AttentionBatch(**tensors, max_query_len=2, max_context_len=2)
        try:
            attention.write(cache, 0, k, v, batch)
            attention.forward(cache, 0, q, batch, scale=0.125)
        except ValueError as refused:
            assert is_refused, refused
        else:
            assert not is_refused


def test_tensors_of_another_shape_are_refused(attention: NativeAttention) -> None:
    sequences = Sequences([4], heads=4, kv_heads=2)
    batch = sequences.batch([(0, 0, 4)])
    cache = attention.allocate(1, sequences.num_blocks, 16, 2, 64, torch.float32, torch.device("cpu"))
    for k, v in ((torch.zeros(4, 3, 64), torch.zeros(4, 3, 64)), (torch.zeros(4, 2, 32), torch.zeros(4, 2, 32))):
        with pytest.raises(ValueError, match="2 heads of 64"):
            attention.write(cache, 0, k, v, batch)
    with pytest.raises(ValueError, match="float64"):
        attention.write(cache, 0, torch.zeros(4, 2, 64).double(), torch.zeros(4, 2, 64).double(), batch)
    for q in (torch.zeros(4, 3, 64), torch.zeros(4, 4, 32)):
        with pytest.raises(ValueError, match="2 heads of 64"):
            attention.forward(cache, 0, q, batch, scale=1.0)
    with pytest.raises(ValueError, match="contiguous"):
        attention.forward(cache, 0, torch.zeros(4, 64, 4).transpose(1, 2), batch, scale=1.0)


def test_what_queries_see_may_be_any_growing_part(attention: NativeAttention) -> None:
    """As where ranks share a context: some tokens see nothing of what is here, several see the same."""
    sequences = Sequences([90], head_dim=32)
    n, m, d = sequences.heads, sequences.kv_heads, sequences.head_dim
    seen = [0, 0, 3, 3, *range(17, 65), *([64] * 38)]
    unseen = [max(0, count - 20) for count in seen]
    batch = replace(
        sequences.batch([(0, 0, 90)]),
        seen_T=torch.tensor(seen, dtype=torch.int32),
        kept_before=lambda window: torch.tensor([max(0, count - window) for count in seen], dtype=torch.int32),
    )
    fused = sequences.qkv[0].view(-1, n + 2 * m, d)
    q, k, v = fused[:, :n], fused[:, n : n + m], fused[:, n + m :]
    backends: list[Any] = [attention, PortableAttention()]
    for window, first in ((None, [0] * 90), (20, unseen)):
        for backend in backends:
            cache = backend.allocate(1, sequences.num_blocks, 16, m, d, torch.float32, torch.device("cpu"))
            backend.write(cache, 0, k, v, batch)
            out, lse = backend.forward(cache, 0, q, batch, scale=d**-0.5, window=window, need_lse=True)
            for token in range(90):
                keys = k[first[token] : seen[token]].repeat_interleave(n // m, dim=1)
                values = v[first[token] : seen[token]].repeat_interleave(n // m, dim=1)
                scores = torch.einsum("nd,lnd->nl", q[token], keys) * d**-0.5
                expected = torch.einsum("nl,lnd->nd", scores.softmax(-1), values)
                torch.testing.assert_close(out[token], expected, atol=5e-6, rtol=5e-6)
                torch.testing.assert_close(lse[token], scores.logsumexp(-1), atol=5e-6, rtol=5e-6)
