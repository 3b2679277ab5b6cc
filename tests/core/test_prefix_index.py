"""PrefixIndex against a plain model: for every endpoint a list of blocks, most recently used last."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.prefix_index import FEWEST, WINDOW, PrefixIndex

NAMES = ["a", "b", "c", "d"]


def chain(word: str) -> tuple[bytes, ...]:
    """Blocks named by all that came before them, as chained hashes are."""
    return tuple(word[: i + 1].encode() for i in range(len(word)))


def test_each_endpoint_has_its_own_depth() -> None:
    index = PrefixIndex()
    for name in NAMES:
        index.add(name, 100)
    index.insert("a", chain("xxxxxxxx"))
    index.insert("b", chain("xxxyyyyy"))
    index.insert("c", chain("zzz"))
    assert index.match(chain("xxxxxxxy")) == {"a": 7, "b": 3}
    assert index.match(chain("xxxxxxxxxxx")) == {"a": 8, "b": 3}
    assert index.match(chain("q")) == {}
    assert index.match(()) == {}


def test_the_least_recently_used_end_of_a_chain_goes_first() -> None:
    index = PrefixIndex()
    index.add("a", 6)
    index.insert("a", chain("xxxx"))
    index.insert("a", chain("yyyy"))
    assert index.depth("a", chain("yyyy")) == 4
    assert index.depth("a", chain("xxxx")) == 2
    index.insert("a", chain("xx"))
    index.insert("a", chain("zz"))
    assert index.depth("a", chain("xx")) == 2
    assert index.depth("a", chain("yyyy")) == 2


def test_what_was_forgotten_is_gone_and_its_place_is_used_again() -> None:
    index = PrefixIndex()
    index.add("a", 10)
    index.add("b", 10)
    index.insert("a", chain("xx"))
    index.forget("a")
    index.forget("never there")
    index.insert("a", chain("xx"))
    assert index.match(chain("xx")) == {}
    index.add("c", 10)
    index.insert("c", chain("x"))
    assert index.match(chain("xx")) == {"c": 1}
    index.check()


def wanted(index: PrefixIndex, word: str) -> int:
    return index.wanted(chain(word), index.match(chain(word)).values(), len(NAMES))


def test_what_many_ask_for_and_few_hold_is_wanted() -> None:
    index = PrefixIndex()
    for name in NAMES:
        index.add(name, 1000)
    index.insert("a", chain("xxxx"))
    assert wanted(index, "xxxxx") == 0  # nothing is often asked for before enough prompts came
    for number in range(40):
        index.insert("a", chain("xxxx" + chr(1000 + number)))
        index.insert("b", chain("yy" + chr(2000 + number)))
    assert wanted(index, "xxxxx") == 4  # by half of the prompts, and a quarter of the endpoints has it
    assert wanted(index, "xx") == 2
    assert wanted(index, "xxxx" + chr(1005)) == 4  # not what one prompt had alone
    assert wanted(index, "z") == 0
    index.insert("c", chain("xxx"))
    index.insert("d", chain("xx"))
    assert wanted(index, "xxxxx") == 4
    index.insert("c", chain("xxxx"))
    index.insert("d", chain("xxxx"))
    assert wanted(index, "xxxxx") == 0


def test_what_was_often_asked_for_long_ago_is_not_wanted() -> None:
    index = PrefixIndex()
    for name in NAMES:
        index.add(name, 1000)
    for _ in range(100):
        index.insert("a", chain("xx"))
    assert wanted(index, "xx") == 2
    for _ in range(3 * WINDOW * len(NAMES)):
        index.insert("a", chain("yy"))
    assert wanted(index, "xx") == 0
    assert wanted(index, "yy") == 2


def test_weights_are_scaled_down_before_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    indexes = [PrefixIndex(), PrefixIndex()]
    for index, most in zip(indexes, (1e200, 2.0), strict=True):
        monkeypatch.setattr("shoal.core.prefix_index.MOST_WEIGHT", most)
        index.add("a", 100)
        index.add("b", 100)
        for number in range(200):
            index.insert("a", chain("xx" if number % 3 else "y"))
            assert index._weight <= most * 2
    assert indexes[0]._weight > 100 > indexes[1]._weight
    for word in ("xx", "y", "xy"):
        assert wanted(indexes[0], word) == wanted(indexes[1], word)


words = st.text("xy", min_size=0, max_size=12)
calls = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), st.sampled_from(NAMES), words),
        st.tuples(st.just("add"), st.sampled_from(NAMES), st.integers(1, 9)),
        st.tuples(st.just("forget"), st.sampled_from(NAMES), st.none()),
    ),
    max_size=40,
)


@given(calls, words)
def test_as_a_plain_model(calls: list[tuple[str, str, str | int | None]], asked: str) -> None:
    index, model, capacity = PrefixIndex(), {}, {}
    growth = 1.0
    prompts: list[float] = []
    """Weights."""
    counts: dict[bytes, float] = {}
    for call, name, value in calls:
        if call == "add":
            index.add(name, value)
            model[name], capacity[name] = [], value
        elif call == "forget":
            index.forget(name)
            model.pop(name, None)
        else:
            index.insert(name, chain(value))
            if name in model:
                used = chain(value)[: capacity[name]]
                kept = [block for block in model[name] if block not in used]
                model[name] = (kept + list(reversed(used)))[-capacity[name] :]
                weight = 1.0 if not prompts else prompts[-1] * growth
                prompts.append(weight)
                for block in used:
                    counts[block] = counts.get(block, 0.0) + weight
                growth = 1 + 1 / (WINDOW * len(model))
        held = {block for blocks in model.values() for block in blocks}
        counts = {block: count for block, count in counts.items() if block in held}
        index.check()
    expected = {}
    for name, blocks in model.items():
        assert index.size(name) == len(blocks)
        depth = next((i for i, block in enumerate(chain(asked)) if block not in blocks), len(asked))
        assert index.depth(name, chain(asked)) == depth
        if depth:
            expected[name] = depth
    assert index.match(chain(asked)) == expected
    total = max(sum(prompts), FEWEST * len(NAMES) * (prompts[-1] * growth if prompts else 1.0))
    often = [
        i + 1
        for i, block in enumerate(chain(asked))
        if (holders := sum(depth > i for depth in expected.values()))
        and counts[block] * len(NAMES) > holders * total * (1 + 1e-9)
    ]
    assert wanted(index, asked) == max(often, default=0)
