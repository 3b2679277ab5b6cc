"""What is said of tokens that came, when it is known what was done to them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.bench.faults.clients import Choice, Outcome
from shoal.bench.faults.oracle import TokenDifference, compare_tokens, differences, tally
from shoal.bench.faults.report import Report, Row
from shoal.bench.faults.workload import CHAT, COMPLETIONS, mix, with_stop

# Distinct tokens: where a token repeats by itself, no one can say which of the two is the one too many.
transcripts = st.lists(st.integers(0, 999), min_size=4, max_size=60, unique=True)


@given(transcripts)
def test_equal_transcripts_have_no_difference(tokens: list[int]) -> None:
    assert compare_tokens(tokens, tokens, whole=True) == TokenDifference()


@given(transcripts, st.data())
def test_a_gap_is_missing_tokens(tokens: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(tokens) - 1))
    count = data.draw(st.integers(1, len(tokens) - start))
    got = tokens[:start] + tokens[start + count :]
    assert compare_tokens(got, tokens, whole=True) == TokenDifference(missing=count)


@given(transcripts, st.data())
def test_a_repeat_is_duplicate_tokens(tokens: list[int], data: st.DataObject) -> None:
    end = data.draw(st.integers(1, len(tokens)))
    count = data.draw(st.integers(1, end))
    got = tokens[:end] + tokens[end - count : end] + tokens[end:]
    assert compare_tokens(got, tokens, whole=True) == TokenDifference(duplicate=count)


@given(transcripts, st.data())
def test_what_has_not_come_yet_is_not_missing(tokens: list[int], data: st.DataObject) -> None:
    end = data.draw(st.integers(0, len(tokens)))
    assert compare_tokens(tokens[:end], tokens, whole=False) == TokenDifference()
    if end < len(tokens):
        assert compare_tokens(tokens[:end], tokens, whole=True).missing == len(tokens) - end


@given(transcripts, st.data())
def test_another_token_is_neither(tokens: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    got = [*tokens[:at], 1000, *tokens[at + 1 :]]
    assert compare_tokens(got, tokens, whole=True) == TokenDifference(other=1)


def outcome(spec: int = 0, end: str = "completed", **changes: object) -> Outcome:
    choice = Choice([1, 2, 3], [10.0, 10.1, 12.1], "abc", [-0.1, -0.2, -0.3], "length")
    for name, value in changes.items():
        setattr(choice, name, value)
    return Outcome(spec, "r", 9.0, {0: choice}, end, 12.2, usage=(4, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token_ids": [1, 2]}, "2 tokens, unequal from 2 on, instead of 3"),
        ({"text": "abd"}, "text 'abd' instead of 'abc'"),
        ({"finish": "stop"}, "finish stop instead of length"),
        ({"logprobs": [-0.1, -0.2]}, "2 log-probabilities instead of 3"),
        ({"logprobs": [-0.1, -0.2, -0.9]}, "log-probabilities differ"),
    ],
)
def test_every_part_of_an_answer_counts(changes: dict[str, object], said: str) -> None:
    assert differences(outcome(**changes), outcome()) == [f"choice 0: {said}"]
    found = tally([outcome(**changes)], {0: outcome()})
    assert found.unequal == 1 and said in found.complaints[0]
    assert tally([outcome(**changes)], {0: outcome()}, unstable=[0]).unequal == 0, "it never was the same"


def test_usage_and_choices_count_too() -> None:
    other = outcome()
    other.usage = 4, 5
    other.choices[1] = Choice()
    assert differences(other, outcome()) == ["choices [0, 1] instead of [0]", "usage (4, 5) instead of (4, 3)"]


def test_ends_are_counted_apart() -> None:
    ends = ["completed", "refused", "expired", "failed", "lost", None]
    found = tally([outcome(end=end) for end in ends], {0: outcome()})  # type: ignore[arg-type]
    counts = [found.offered, found.completed, found.refused, found.expired, found.failed, found.lost]
    assert counts == [6, 1, 1, 1, 1, 2], "no end at all is lost"


def test_a_gap_belongs_to_the_fault_that_fell_into_it() -> None:
    outcomes = [outcome()]
    assert tally(outcomes, {0: outcome()}).longest_gap == pytest.approx(2.0)
    assert tally(outcomes, {0: outcome()}, strikes=[(11.0, 11.1)]).gap_at_fault == pytest.approx(2.0)
    assert tally(outcomes, {0: outcome()}, strikes=[(10.02, 10.05)]).gap_at_fault == pytest.approx(0.1)
    assert tally(outcomes, {0: outcome()}, strikes=[(13.0, 14.0)]).gap_at_fault == 0.0


def test_the_mix_is_seeded_and_covers_what_it_promises() -> None:
    specs = mix("m", seed=3, count=32, max_tokens=40)
    assert specs == mix("m", seed=3, count=32, max_tokens=40) != mix("m", seed=4, count=32, max_tokens=40)
    assert {spec.path for spec in specs} == {CHAT, COMPLETIONS}
    assert {spec.stream for spec in specs} == {True, False}
    features = {"greedy", "seeded", "n=2", "logprobs", "stop", "penalties", "repetition", "schema"}
    assert {spec.feature for spec in specs} == features
    assert {spec.num_choices for spec in specs} == {1, 2}
    assert all(spec.body["temperature"] == 0.0 for spec in mix("m", seed=3, count=9, max_tokens=40, greedy_only=True))
    assert with_stop(specs[4], "many fish swim as one").body["stop"] == [" as on"]


def test_a_report_shows_what_was_broken() -> None:
    good, bad = Row(fault="kill", injected=1), Row(fault="hang", breaches=["3 lost"])
    late, skipped = Row(fault="reset", late=["a fault made a gap"]), Row(fault="cut", skipped="no proxy")
    report = Report(
        version="1",
        seed=0,
        streams=4,
        endpoints=["a"],
        undisturbed=tally([outcome()], {0: outcome()}),
        prefill_again=0.5,
        capacity=1.0,
        tokens_per_second=2.0,
        unstable=[],
        rows=[good, skipped],
    )
    assert report.ok and "No promise was broken." in report.markdown()
    assert "not tried: no proxy" in report.markdown()
    report.rows += [bad, late]
    assert not report.ok
    assert "- hang: 3 lost" in report.markdown() and "- reset: a fault made a gap" in report.markdown()
    table = [line for line in report.markdown().splitlines() if line.startswith("| ")]
    rows = ("| fault | times", "| kill | 1", "| cut | 0", "| hang | 0")
    widths = {line.count("|") for line in table if line.startswith(rows)}
    assert len(widths) == 1, "every row has every column"
