from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.plan.diagnose.prometheus_text import NotAnExposition, parse


def test_samples_are_found_by_the_name_of_their_line() -> None:
    found = parse('# TYPE a:b counter\na:b_total{x="1",y="2"} 3\na:b_total{x="2",y="2"} NaN\n')
    assert [sample.labels["x"] for sample in found["a:b_total"]] == ["1", "2"]
    assert found["a:b_total"][0].key == (("x", "1"), ("y", "2"))
    assert "a:b_total" in found
    assert found["absent"] == []


@pytest.mark.parametrize(
    "text", ["", "\n", "# HELP a b\n", "<html><body>no</body></html>", '{"error": 1}', "a{ 1", 'a{x="1} 2', "a b c d"]
)
def test_anything_else_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(NotAnExposition, match=".{10}"):
        parse(text)


@given(st.text())
def test_no_text_breaks_the_parser(text: str) -> None:
    with contextlib.suppress(NotAnExposition):
        assert parse(text).samples
