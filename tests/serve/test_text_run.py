"""The pieces of a run are the same however an endpoint groups the tokens that it sends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.checkpoint.tokenizer import load_tokenizer
from shoal.core.types import Output, Request, TokenLogprobs
from shoal.serve.generation import Job, TextRun
from tests.checkpoints import save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return load_tokenizer(path)


def answer(tokenizer, ids, stop, cuts, include_stop):
    """Text, tokens, log-probabilities, finish and its reason."""
    request = Request(id="r", prompt=[5], max_tokens=100)
    pieces = []
    job = Job(request, continues_prompt=True, stop=stop, include_stop=include_stop, skip_special_tokens=True)
    run = TextRun(tokenizer, job, pieces.append, lambda error: pytest.fail(str(error)), None)
    groups, at = [], 0
    for size in [*cuts, *([1] * len(ids))]:
        groups.append(ids[at : at + size])
        at += size
    for group in [group for group in groups if group]:
        logprobs = [TokenLogprobs(-float(token), [], []) for token in group]
        run.output(Output("r", 0, group, logprobs))
    run.output(Output("r", 0, [], finish="length"))
    return (
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.token_ids],
        [logprob.logprob for piece in pieces for logprob in piece.logprobs],
        pieces[-1].finish,
        pieces[-1].stop_reason,
    )


@pytest.mark.parametrize("include_stop", [False, True])
def test_what_comes_behind_a_stop_string_in_one_output_is_not_the_answers(tokenizer, include_stop):
    ids = tokenizer.encode("some fish END and more")
    text, tokens, logprobs, finish, reason = answer(tokenizer, ids, ["END"], [len(ids)], include_stop)
    assert text == ("some fish END" if include_stop else "some fish ") and (finish, reason) == ("stop", "END")
    assert tokens == ids[: len(tokens)] and tokenizer.decode(tokens).endswith("END") and len(tokens) < len(ids)
    assert logprobs == [-float(token) for token in tokens]


def test_grouping_changes_nothing(tokenizer):
    ids = tokenizer.encode("one fish, two fish, three END four")

    @given(st.lists(st.integers(1, 8), max_size=8), st.sampled_from([[], ["END"], ["fish, t"], ["absent"], ["e", "E"]]))
    @settings(max_examples=80, deadline=None)
    def check(cuts, stop):
        assert answer(tokenizer, ids, stop, cuts, False) == answer(tokenizer, ids, stop, [], False)

    check()
