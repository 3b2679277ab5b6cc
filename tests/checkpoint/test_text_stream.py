"""Streams of text: the pieces are the decoded whole, stop strings are never seen, whatever the pushes."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.checkpoint.text_stream import TextStream
from shoal.checkpoint.tokenizer import load_tokenizer
from tests.checkpoint.gguf_files import sentencepiece_metadata, write_gguf
from tests.checkpoints import VOCAB, save_tokenizer

WORDS = ["▁", "▁a", "ab", "▁ab", "a", "b", "é", "▁▁", "b▁"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes")
    save_tokenizer(path)
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    return load_tokenizer(write_gguf(tmp_path_factory.mktemp("spm") / "m.gguf", sentencepiece_metadata(WORDS)))


def pushes(ids, cuts):
    """The ids in groups of the sizes `cuts`, the rest one by one."""
    groups, at = [], 0
    for size in cuts:
        groups.append(ids[at : at + size])
        at += size
    return groups + [[i] for i in ids[at:]]


def stream_all(stream, groups):
    pieces = [stream.push(group)[0] for group in groups]
    return [*pieces, stream.flush()]


IDS = {"byte_level": st.integers(0, VOCAB - 1), "spm": st.integers(0, 258 + len(WORDS))}
CUTS = st.lists(st.integers(0, 4), max_size=5)
TOKENIZERS = ["byte_level", "spm"]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("skip", [True, False])
def test_pieces_are_the_whole(request, name, skip):
    tokenizer = request.getfixturevalue(name)

    @given(st.lists(IDS[name], max_size=30), CUTS)
    @settings(max_examples=120, deadline=None)
    def check(ids, cuts):
        pieces = stream_all(TextStream(tokenizer, skip_special_tokens=skip), pushes(ids, cuts))
        assert "".join(pieces) == tokenizer.decode(ids, skip)

    check()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_characters_come_whole(request, name):
    tokenizer = request.getfixturevalue(name)
    text = "é漢😀👩‍👧 ab"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)
    stream = TextStream(tokenizer)
    pieces = [stream.push([i])[0] for i in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text
    assert stream.flush() == ""


def test_an_unfinished_character_shows_at_the_end_only(byte_level):
    fish = byte_level.encode("🐟")
    stream = TextStream(byte_level)
    assert stream.push(fish[:-1]) == ("", None)
    assert stream.flush() == "\ufffd"


def first_stop(text, stops):
    """By definition: of the stop strings that are complete first, the longest; and where it begins."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return end - len(longest), longest
    return None


def undecided(text, stops):
    """By definition: the longest end of the text that begins a stop string."""
    ends = [text[at:] for at in range(len(text))] + [""]
    return next(end for end in ends if any(stop.startswith(end) for stop in stops))


SHORT = st.text(alphabet="ab ", min_size=1, max_size=5)


@given(st.text(alphabet="ab ", max_size=30), st.lists(SHORT, min_size=1, max_size=3), CUTS, st.booleans())
@example("aabaabaab b", ["aabaab b", "abaaba"], [], False)
@settings(max_examples=400, deadline=None)
def test_stop_strings(byte_level, text, stops, cuts, include):
    ids = byte_level.encode(text)
    stream = TextStream(byte_level, stops, include_stop=include)
    shown, seen = "", ""
    for group in pushes(ids, cuts):
        shown += stream.push(group)[0]
        seen += byte_level.decode(group)
        if stream.stopped is None:
            assert shown + undecided(seen, stops) == seen
    shown += stream.flush()
    hit = first_stop(text, stops)
    if hit is None:
        assert (shown, stream.stopped) == (text, None)
    else:
        at, stop = hit
        assert (shown, stream.stopped) == (text[: at + len(stop)] if include else text[:at], stop)
        assert stream.push(ids) == ("", stop)
        assert stream.flush() == ""


def test_only_what_may_begin_a_stop_string_is_held_back(byte_level):
    stream = TextStream(byte_level, ["END", "\n\n"])
    shown = [stream.push(byte_level.encode(piece))[0] for piece in ("some", " E", "N", "ough", "\n", "x\n", "\n")]
    assert shown == ["some", " ", "", "ENough", "", "\nx", ""]
    assert stream.stopped == "\n\n"


def test_text_held_back_comes_out_at_the_end(byte_level):
    stream = TextStream(byte_level, ["END"])
    assert stream.push(byte_level.encode("the EN"))[0] == "the "
    assert stream.flush() == "EN"
    assert stream.flush() == ""


def test_a_long_stop_string_costs_no_more_than_its_characters(byte_level):
    """Half a match that fails again and again: an automaton looks at each character at most twice."""
    looks = 0

    class Counting(str):
        def __getitem__(self, key):
            nonlocal looks
            looks += 1
            return str.__getitem__(self, key)

    stop = Counting("a" * 2000 + "b")
    stream = TextStream(byte_level, [stop])
    assert type(stream._stops[0].text) is Counting
    looks = 0
    ids = byte_level.encode("a" * 5000)
    shown = "".join(stream_all(stream, [[i] for i in ids]))
    assert shown == "a" * 5000
    assert looks < 5 * 5000


def test_special_tokens_are_left_out_unless_asked_for(byte_level):
    ids = [1, *byte_level.encode("ab"), 4]
    assert "".join(stream_all(TextStream(byte_level), [ids])) == "ab"
    assert "".join(stream_all(TextStream(byte_level, skip_special_tokens=False), [ids])) == "<s>ab<|im_end|>"


def test_a_leading_space_belongs_to_a_continued_text(spm):
    word = spm.id_of("▁ab")
    assert TextStream(spm).push([word, word])[0] == "ab ab"
    assert TextStream(spm, prompt_ids=[1]).push([word])[0] == "ab"
    assert TextStream(spm, prompt_ids=[1, spm.id_of("a")]).push([word])[0] == " ab"


def test_a_character_that_the_prompt_began_is_completed(byte_level):
    fish = byte_level.encode("look: 🐟!")
    cut = len(fish) - 2
    prompt, answer = fish[:cut], fish[cut:]
    assert byte_level.decode(prompt).endswith("\ufffd")
    assert "".join(stream_all(TextStream(byte_level, prompt_ids=prompt), [answer])) == "🐟!"
