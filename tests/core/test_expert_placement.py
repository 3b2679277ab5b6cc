"""Placements: every expert has a place, none has more than fit, and copies never make the busiest place busier."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.config import EngineConfig
from shoal.core.expert_placement import Placement, balanced, contiguous, require_dispatch
from shoal.core.layout import Layout, LayoutError

PROBLEMS = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(0, 4)).flatmap(
    lambda sizes: st.tuples(
        st.lists(st.integers(0, 9) | st.integers(0, 10**6), min_size=sizes[0] * sizes[1], max_size=sizes[0] * sizes[1]),
        st.just(sizes[0]),
        st.just(sizes[2]),
    )
)
"""Rows of each expert, places, and room for copies on each."""


@given(PROBLEMS)
def test_every_expert_has_a_place_and_no_place_more_than_fit(problem: tuple[list[int], int, int]) -> None:
    rows, places, redundant = problem
    held = balanced(rows, places, redundant).held
    assert len(held) == places
    assert {expert for experts in held for expert in experts} == set(range(len(rows)))
    for experts in held:
        assert len(experts) <= len(rows) // places + redundant
        assert list(experts) == sorted(set(experts))


@given(PROBLEMS)
def test_the_busiest_place_is_never_busier_than_without_copies(problem: tuple[list[int], int, int]) -> None:
    rows, places, redundant = problem
    busiest = max(balanced(rows, places, redundant).load(rows))
    assert busiest <= max(balanced(rows, places, 0).load(rows)) <= max(contiguous(len(rows), places).load(rows))
    assert sum(balanced(rows, places, redundant).load(rows)) == pytest.approx(sum(rows))
    assert busiest >= sum(rows) / places * (1 - 1e-9)


def test_an_expert_that_outweighs_all_others_gets_the_copies() -> None:
    rows = [90, 2, 2, 2, 1, 1, 1, 1]
    alone, copied = balanced(rows, 4, 0), balanced(rows, 4, 1)
    assert max(alone.load(rows)) == 91, "each place has two"
    counts = Counter(expert for experts in copied.held for expert in experts)
    assert counts[0] == 4 and max(copied.load(rows)) < 30


def test_heavy_experts_do_not_share_a_place() -> None:
    rows = [10, 10, 1, 1]
    assert contiguous(4, 2).load(rows) == [20, 2]
    assert balanced(rows, 2, 0).load(rows) == [11, 11]


def test_without_any_load_experts_stay_in_order() -> None:
    assert balanced([0] * 8, 4, 1) == contiguous(8, 4)


def test_copies_are_found_by_place_and_index() -> None:
    placement = Placement(((0, 2), (1, 2, 3)))
    assert placement.copies(4) == [[(0, 0)], [(1, 0)], [(0, 1), (1, 1)], [(1, 2)]]
    assert placement.load([4, 1, 6, 2]) == [7, 6]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"expert_dispatch": "all_to_all"}, "expert_dispatch is for experts on several ranks: set .*ep. to 2 or more"),
        ({"expert_load": "load.json"}, "expert_load is for experts on several ranks"),
        ({"redundant_experts": 1}, "redundant_experts is for experts on several ranks"),
        ({"layout": Layout(ep=2), "redundant_experts": -1}, "at least 0, got -1"),
        (
            {"layout": Layout(ep=2), "redundant_experts": 1, "expert_load": "load.json"},
            "goes with expert_dispatch all_to_all, not with replicate",
        ),
        ({"layout": Layout(ep=2), "expert_dispatch": "all_to_all", "redundant_experts": 1}, "needs expert_load"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_together_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        require_dispatch(EngineConfig(model="m", **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layout": Layout(ep=2), "expert_dispatch": "all_gather", "expert_load": "load.json"},
        {
            "layout": Layout(ep=2),
            "expert_dispatch": "all_to_all",
            "expert_load": "load.json",
            "redundant_experts": 2,
        },
    ],
    ids=str,
)
def test_settings_that_do_are_not(settings: dict[str, Any]) -> None:
    require_dispatch(EngineConfig(model="m", **settings))
