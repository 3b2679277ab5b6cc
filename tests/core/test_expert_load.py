"""What ranks counted, put together, written down and read again."""

from __future__ import annotations

import msgspec
import pytest

from shoal.core.expert_load import BadExpertLoad, ExpertReport, HeldRows, imbalance, merged, placements, rows_of
from shoal.core.expert_placement import balanced, contiguous
from shoal.core.model_spec import ModelSpec, MoESpec, RopeSpec

SPEC = ModelSpec(
    family="mixtral",
    num_layers=3,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=512,
    max_len=512,
    norm_eps=1e-5,
    rope=RopeSpec(theta=1e4),
    moe=MoESpec(num_experts=4, num_experts_per_token=2, expert_intermediate_size=32, first_dense_layers=1),
)
COUNTS = [
    HeldRows(1, 0, [0, 1], [6, 2]),
    HeldRows(1, 1, [1, 2, 3], [1, 0, 3]),
    HeldRows(2, 1, [2, 3], [4, 4]),
    HeldRows(2, 0, [0, 1], [4, 4]),
]


def test_counts_of_ranks_and_of_copies_add_up() -> None:
    load = merged(COUNTS, 4, 2)
    assert [(layer.layer, layer.experts, layer.ranks) for layer in load.layers] == [
        (1, [6, 3, 0, 3], [8, 4]),
        (2, [4, 4, 4, 4], [8, 8]),
    ]
    assert load.expert_imbalance == (6 + 4) / (3 + 4)
    assert load.rank_imbalance == (8 + 8) / (6 + 8)


def test_what_has_computed_nothing_is_even() -> None:
    assert imbalance([]) == imbalance([[0, 0], [0, 0]]) == 1.0
    assert imbalance([[0, 0, 9]]) == 3.0


def test_a_report_is_read_as_it_was_written_and_engines_are_summed() -> None:
    load = merged(COUNTS, 4, 2)
    report = msgspec.json.encode(ExpertReport(engines=[load, load]))
    assert rows_of(report, SPEC) == {1: [12, 6, 0, 6], 2: [8, 8, 8, 8]}


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (b"[]", "is not what GET /v1/experts answers"),
        (b"not json", "is not what GET /v1/experts answers"),
        (msgspec.json.encode(ExpertReport(engines=[merged(COUNTS, 8, 2)])), "has 8 experts, and the model 3 layers"),
        (msgspec.json.encode(ExpertReport(engines=[merged([HeldRows(3, 0, [], [])], 4, 2)])), "its layer 3 has 4"),
        (msgspec.json.encode(ExpertReport(engines=[merged([HeldRows(1, 0, [0], [-1])], 4, 2)])), "of another model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_report_of_this_model_is_refused(report: bytes, reason: str) -> None:
    with pytest.raises(BadExpertLoad, match=reason):
        rows_of(report, SPEC)


def test_layers_are_placed_by_their_own_rows_and_others_stay_in_order() -> None:
    rows = {1: [12, 6, 0, 6], 2: [9, 8, 8, 8]}
    placed = placements(SPEC, 2, rows, 1)
    assert placed == (contiguous(4, 2), balanced(rows[1], 2, 1), balanced(rows[2], 2, 1))
    assert placed[1] != contiguous(4, 2)
