"""PrefixIndex against a plain model: for every endpoint a list of blocks, most recently used last."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.core.prefix_index import PrefixIndex

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
        index.check()
    expected = {}
    for name, blocks in model.items():
        assert index.size(name) == len(blocks)
        depth = next((i for i, block in enumerate(chain(asked)) if block not in blocks), len(asked))
        assert index.depth(name, chain(asked)) == depth
        if depth:
            expected[name] = depth
    assert index.match(chain(asked)) == expected
