"""What the mocks say, and how a transcript is compared with it."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.tokens import FIRST_ID, LAST_ID, Difference, compare, vocabulary

WORDS = vocabulary("")
tokens = st.lists(st.integers(0, 49151), min_size=1, max_size=50)


@given(tokens, st.integers(1, 30), st.data())
def test_a_prompt_with_a_part_of_its_answer_is_answered_with_the_rest(prompt, count, data):
    answer = WORDS.continuation(prompt, count)
    cut = data.draw(st.integers(0, count))
    assert WORDS.continuation(prompt + answer[:cut], count - cut) == answer[cut:]
    assert all(FIRST_ID <= token < LAST_ID for token in answer)


@given(tokens, st.integers(0, 49), st.integers(0, 49151))
def test_another_prompt_has_another_answer(prompt, at, token):
    other = list(prompt)
    other[at % len(prompt)] = token
    assert (other == prompt) == (WORDS.continuation(other, 8) == WORDS.continuation(prompt, 8))


@given(st.lists(st.integers(1, 9), unique=True, min_size=2), st.data())
def test_each_way_to_be_wrong_is_counted(expected, data):
    at = data.draw(st.integers(0, len(expected) - 1))
    assert compare(expected, expected) == Difference()
    assert compare(expected[:at] + expected[at + 1 :], expected) == Difference(1, 0, True)
    assert compare(expected[:at] + expected[at : at + 1] + expected[at:], expected) == Difference(0, 1, True)
    assert compare(expected[::-1], expected) == Difference(0, 0, True)


def test_words_are_the_same_however_they_are_cut():
    answer = WORDS.continuation([1, 2, 3], 20)
    assert WORDS.text(answer) == WORDS.text(answer[:7]) + WORDS.text(answer[7:])
