"""Quantities as people write them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.plan import units
from shoal.plan.units import UnitError


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (units.duration, "500ms", 0.5),
        (units.duration, "0.5s", 0.5),
        (units.duration, " 30 MS ", 0.03),
        (units.duration, "2min", 120.0),
        (units.duration, "80us", 80e-6),
        (units.rate, "20/s", 20.0),
        (units.rate, "1200/min", 20.0),
        (units.rate, "20 req/s", 20.0),
        (units.rate, "20rps", 20.0),
        (units.rate, "3.5", 3.5),
        (units.size, "80GB", 80_000_000_000),
        (units.size, "80GiB", 85_899_345_920),
        (units.size, "512", 512),
        (units.money_per_hour, "$30/h", 30.0),
        (units.money_per_hour, "$7,300/month", 10.0),
        (units.money_per_hour, "2.5", 2.5),
        (units.share, "90%", 0.9),
        (units.share, "0.9", 0.9),
        (units.count, "2k", 2000),
        (units.count, "128Ki", 131_072),
        (units.failures, "1 gpu", "gpu"),
        (units.failures, "1node", "node"),
        (units.failures, "none", ""),
    ],
)
def test_what_people_write(parse: Callable[[str], object], text: str, value: object) -> None:
    assert parse(text) == pytest.approx(value) if isinstance(value, float) else parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "example"),
    [
        (units.duration, "500", "500ms"),
        (units.duration, "fast", "500ms"),
        (units.duration, "-5ms", "500ms"),
        (units.duration, "5 parsecs", "500ms"),
        (units.rate, "20/fortnight", "20/s"),
        (units.rate, "20 tokens/s", "20/s"),
        (units.size, "80G", "80GB or 80GiB"),
        (units.size, "big", "80GB"),
        (units.money_per_hour, "$30/token", "$30/h"),
        (units.share, "140%", "90%"),
        (units.share, "1.5", "0.9"),
        (units.count, "2 pages", "2000"),
        (units.failures, "2 gpus", "1gpu"),
    ],
)
def test_refusals_name_the_value_and_show_an_example(parse: Callable[[str], object], text: str, example: str) -> None:
    with pytest.raises(UnitError) as refusal:
        parse(text)
    assert repr(text) in str(refusal.value) or text.replace("$", "") in str(refusal.value)
    assert example in str(refusal.value)


@given(st.floats(1e-6, 900.0))
def test_a_shown_duration_is_read_back_within_its_three_digits(seconds: float) -> None:
    assert units.duration(units.show_duration(seconds).replace(",", "")) == pytest.approx(seconds, rel=0.01)


@given(st.text(max_size=12))
def test_any_text_is_a_quantity_or_refused(text: str) -> None:
    for parse in (units.duration, units.rate, units.size, units.money_per_hour, units.share, units.count):
        try:
            value = parse(text)
        except UnitError as refusal:
            assert "write" in str(refusal)
        else:
            assert value >= 0


@pytest.mark.parametrize("text", ["0", "0%", "120%", "1.5"])
def test_a_share_is_above_nothing_and_at_most_all(text: str) -> None:
    with pytest.raises(units.UnitError, match="above 0 and at most 100%"):
        units.share(text)
