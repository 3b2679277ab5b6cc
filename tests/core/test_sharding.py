"""Shards: together they are the model, none holds what it need not, and stages cost alike."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shoal.core.layout import Layout, refusal
from shoal.core.model_spec import ModelSpec, RopeSpec
from shoal.core.sharding import DECODE_TOKENS, Span, shard_of, split_evenly, split_heads, split_layers, whole

SPEC = ModelSpec(
    family="llama",
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_len=8192,
    norm_eps=1e-5,
    rope=RopeSpec(theta=1e5),
    tied_embeddings=True,
)


@given(st.integers(1, 5000), st.integers(1, 16), st.sampled_from([1, 32]))
def test_spans_cover_everything_once_and_differ_by_one_unit(size: int, parts: int, alignment: int) -> None:
    assume(parts <= size)
    spans = split_evenly(size, parts, alignment)
    assert len(spans) == parts and spans[0].start == 0 and spans[-1].stop == size
    assert all(a.stop == b.start for a, b in zip(spans, spans[1:], strict=False))
    unit = alignment if size >= alignment * parts else 1
    assert min(map(len, spans)) > 0
    assert max(map(len, spans)) - min(map(len, spans)) <= 2 * unit - 1
    assert all(span.start % unit == 0 for span in spans)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 16))
def test_every_query_head_is_on_one_rank_with_its_kv_head(kv_heads: int, group: int, ranks: int) -> None:
    spec = msgspec.structs.replace(SPEC, num_heads=kv_heads * group, num_kv_heads=kv_heads)
    assume(refusal(Layout(tp=ranks), spec) is None)
    heads = split_heads(kv_heads * group, kv_heads, ranks)
    assert [h for head in heads for h in range(head.query.start, head.query.stop)] == list(range(kv_heads * group))
    for head in heads:
        served = {query // group for query in range(head.query.start, head.query.stop)}
        assert served == set(range(head.kv.start, head.kv.stop))
    # As good as whole groups, or better.
    whole_groups = -(-kv_heads // ranks) * (group + 1)
    assert ranks > kv_heads or max(len(head.query) + len(head.kv) for head in heads) <= whole_groups


def test_nine_heads_over_two_three_and_four_ranks() -> None:
    sizes = {n: [(len(h.query), len(h.kv)) for h in split_heads(9, 3, n)] for n in (2, 3, 4)}
    assert sizes[2] == [(4, 2), (5, 2)]
    assert sizes[3] == [(3, 1)] * 3
    assert sorted(sizes[4]) == [(1, 1), (2, 1), (3, 1), (3, 1)]


def test_the_head_of_a_small_model_is_worth_many_layers() -> None:
    first, last = split_layers(SPEC, 2)
    assert len(first) > len(last) + 5, "the last stage has the head of 49,152 x 576 too"
    narrow = msgspec.structs.replace(SPEC, vocab_size=64)
    assert [len(span) for span in split_layers(narrow, 3)] == [10, 10, 10]


@given(st.integers(1, 30), st.sampled_from([64, 4096, 49152]))
def test_no_cut_is_better_than_the_one_chosen(stages: int, vocab_size: int) -> None:
    spec = msgspec.structs.replace(SPEC, vocab_size=vocab_size)
    kv = 2 * 3 * 64 * DECODE_TOKENS
    layer, head = spec.attention_matrices() + spec.mlp_matrices(0) + kv, vocab_size * spec.hidden_size
    spans = split_layers(spec, stages)
    assert [span.start for span in spans[1:]] == [span.stop for span in spans[:-1]]
    assert spans[0].start == 0 and spans[-1].stop == 30 and min(map(len, spans)) >= 1
    dearest = max(len(span) * layer + (head if span is spans[-1] else 0) for span in spans)
    # All layers are alike: the best is found by trying every length of the last stage.
    best = min(
        max(last * layer + head, -(-(30 - last) // (stages - 1)) * layer if stages > 1 else 0)
        for last in ([30] if stages == 1 else range(1, 32 - stages))
    )
    assert dearest == best


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=4), Layout(pp=3), Layout(tp=2, pp=2)])
def test_ranks_hold_the_whole_model_between_them(layout: Layout) -> None:
    shards = [shard_of(SPEC, layout, rank) for rank in range(layout.ranks)]
    for pp in range(layout.pp):
        stage = [shards[rank] for rank in range(layout.ranks) if layout.place(rank).pp == pp]
        for name, size in (("mlp", 1536), ("vocab", 49152)):
            assert sum(len(getattr(shard, name)) for shard in stage) == size
        assert [shard.adds_bias for shard in stage] == [True] + [False] * (len(stage) - 1)
        assert {shard.is_first for shard in stage} == {pp == 0}
        assert {shard.is_last for shard in stage} == {pp == layout.pp - 1}


def test_one_rank_holds_everything() -> None:
    shard = whole(SPEC)
    assert shard.heads.query == Span(0, 9) and shard.heads.kv == Span(0, 3)
    assert (shard.mlp, shard.vocab, shard.layers) == (Span(0, 1536), Span(0, 49152), Span(0, 30))
    assert shard.is_first and shard.is_last and shard.adds_bias
