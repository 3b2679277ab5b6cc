"""Layouts: where ranks stand, which cannot work, and what is offered instead."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.layout import Layout, LayoutError, nearest, refusal, require_possible
from shoal.core.model_spec import ModelSpec, MoESpec, RopeSpec

SMOLLM2 = ModelSpec(
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
MIXTRAL = msgspec.structs.replace(
    SMOLLM2, family="mixtral", moe=MoESpec(num_experts=8, num_experts_per_token=2, expert_intermediate_size=64)
)
layouts = st.builds(Layout, tp=st.integers(1, 4), pp=st.integers(1, 3), ep=st.integers(1, 3), cp=st.integers(1, 3))


@given(layouts)
def test_every_rank_has_a_place_of_its_own(layout: Layout) -> None:
    places = [layout.place(rank) for rank in range(layout.ranks)]
    assert len(set(places)) == layout.ranks == layout.tp * layout.pp * layout.ep * layout.cp
    assert [layout.rank(place) for place in places] == list(range(layout.ranks))


@given(layouts)
def test_the_groups_of_an_axis_cover_all_ranks_once(layout: Layout) -> None:
    sizes = {"tensor": layout.tp * layout.ep, "expert": layout.ep, "context": layout.cp, "pipeline": layout.pp}
    for axis, size in sizes.items():
        groups = {tuple(layout.group(rank, axis)) for rank in range(layout.ranks)}  # type: ignore[arg-type]
        assert sorted(rank for group in groups for rank in group) == list(range(layout.ranks))
        assert {len(group) for group in groups} == {size}


def test_neighbours_are_of_the_axis_that_talks_most() -> None:
    layout = Layout(tp=2, pp=2)
    assert layout.group(0, "tensor") == [0, 1]
    assert layout.group(1, "pipeline") == [1, 3]


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (Layout(tp=0), "tp must be at least 1, got 0"),
        (Layout(tp=10), "needs as many attention heads, and the model has 9"),
        (Layout(pp=31), "pp 31 is more stages than the model has layers .30."),
        (Layout(ep=2), "ep 2 splits experts, and llama has none"),
        (Layout(dp=-1), "dp must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused_with_layouts_that_do(layout: Layout, reason: str) -> None:
    with pytest.raises(LayoutError, match=reason + ".*; layouts that work: "):
        require_possible(layout, SMOLLM2)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=3), Layout(tp=4), Layout(tp=9), Layout(pp=3, tp=2)])
def test_uneven_heads_and_shared_kv_heads_are_no_reason(layout: Layout) -> None:
    require_possible(layout, SMOLLM2)


def test_kv_heads_cannot_be_on_more_ranks_than_queries_share_them() -> None:
    spec = msgspec.structs.replace(SMOLLM2, num_heads=8, num_kv_heads=3)  # not a real model: 2 queries a group
    assert "only 2 query heads share one" in (refusal(Layout(tp=7), spec) or "")


def test_experts_must_divide_and_devices_must_be_there() -> None:
    require_possible(Layout(ep=4), MIXTRAL)
    with pytest.raises(LayoutError, match="ep 3 does not divide the model's 8 experts"):
        require_possible(Layout(ep=3), MIXTRAL)
    with pytest.raises(LayoutError, match=r"tp2 x pp2 needs 4 devices, and 2 are there"):
        require_possible(Layout(tp=2, pp=2), SMOLLM2, num_devices=2)
    require_possible(Layout(tp=2), SMOLLM2, num_devices=2)


@given(layouts, st.sampled_from([SMOLLM2, MIXTRAL]), st.one_of(st.none(), st.integers(1, 4)))
def test_what_is_offered_works(layout: Layout, spec: ModelSpec, devices: int | None) -> None:
    offered = nearest(layout, spec, devices)
    assert offered
    for other in offered:
        require_possible(other, spec, devices)


def test_the_nearest_keeps_the_number_of_ranks_where_it_can() -> None:
    assert nearest(Layout(tp=10), SMOLLM2)[0].ranks in (9, 10)
    assert str(Layout(tp=2, pp=3)) == "tp2 x pp3" and str(Layout()) == "tp1"
