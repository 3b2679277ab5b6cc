"""The sampler against a plain float64 implementation of one row; its distribution; its independence of the batch."""

import itertools

import numpy as np
import pytest
import torch

from shoal.core.types import Sampling
from shoal.engine.grammar import compile_grammar
from shoal.engine.grammar_state import GrammarFactory
from shoal.engine.ops import TorchOps
from shoal.engine.random_stream import as_words, exponentials
from shoal.engine.sampler import Sampler, TokenCounts
from tests.engine.vocabulary import TinyVocabulary

VOCAB = 1031  # odd, so that no row after the first is aligned


def logits_of(rows, seed=0, spread=3.0, vocab=VOCAB):
    return torch.from_numpy((np.random.default_rng(seed).standard_normal((rows, vocab)) * spread).astype(np.float32))


def sampler_for(settings, *, vocab=VOCAB, tokens=None, num_prompt=0, min_tokens=0, stop_ids=()):
    """A sampler with one setting a slot; all sequences share `tokens`."""
    sampler = Sampler(len(settings), vocab, TorchOps(torch.device("cpu")))
    for slot, sampling in enumerate(settings):
        sampler.assign(slot, sampling, slot, tokens or [], num_prompt, min_tokens, stop_ids, None)
    return sampler


def sample(sampler, logits, slots=None, position=50):
    rows = len(logits)
    slots = np.arange(rows) if slots is None else np.array(slots)
    return sampler.sample(logits.clone(), slots, np.full(rows, position))


def filtered_distribution(logits, sampling, prompt=(), output=()):
    """Probabilities (V) from which the token is drawn, in float64, straight from the definitions."""
    x = logits.astype(np.float64)
    for token, bias in sampling.logit_bias.items():
        x[token] += bias
    for token in set(prompt) | set(output):
        r = sampling.repetition_penalty
        x[token] = x[token] / r if x[token] > 0 else x[token] * r
    for token in set(output):
        x[token] -= sampling.frequency_penalty * output.count(token) + sampling.presence_penalty
    x = x / sampling.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    p[p < sampling.min_p * p.max()] = 0
    if 0 < sampling.top_k < len(p):
        p[p < np.sort(p)[-sampling.top_k]] = 0
    p /= p.sum()
    if sampling.top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[(before > 0) & (before >= sampling.top_p)]] = 0
    return p / p.sum()


def assert_drawn(token, probabilities, seed, index, position):
    """`token` wins the race for these probabilities, but for float32 rounding."""
    words = as_words([seed]), as_words([index]), as_words([position])
    race = probabilities / exponentials(*words, len(probabilities), torch.device("cpu"))[0].numpy()
    assert probabilities[token] > 0
    assert race[token] >= race.max() * (1 - 1e-4)


SETTINGS = [
    Sampling(seed=1),
    Sampling(seed=2, temperature=0.3),
    Sampling(seed=3, temperature=2.5),
    Sampling(seed=4, top_k=1),
    Sampling(seed=5, top_k=17),
    Sampling(seed=6, top_p=0.5),
    Sampling(seed=7, top_p=0.97, temperature=1.5),
    Sampling(seed=8, min_p=0.1),
    Sampling(seed=9, min_p=0.02, top_k=40, top_p=0.9, temperature=1.2),
    Sampling(seed=10, presence_penalty=1.5),
    Sampling(seed=11, frequency_penalty=0.7),
    Sampling(seed=12, repetition_penalty=1.8),
    Sampling(seed=13, repetition_penalty=0.7, frequency_penalty=-0.5, presence_penalty=0.3, top_p=0.8),
    Sampling(seed=14, logit_bias={3: 9.0, 8: -100.0, VOCAB - 1: 4.0}),
    Sampling(seed=15, top_p=0.0),
    Sampling(seed=16, top_k=VOCAB + 5),
]
PROMPT, OUTPUT = [5, 6, 7, 7, 900], [7, 8, 8, 8, 20, VOCAB - 1]


@pytest.mark.parametrize("seed", range(8))
def test_every_setting_against_the_reference(seed):
    logits = logits_of(len(SETTINGS), seed)
    sampler = sampler_for(SETTINGS, tokens=PROMPT + OUTPUT, num_prompt=len(PROMPT))
    draws = sample(sampler, logits, position=50 + seed)
    assert not draws.failures
    for row, sampling in enumerate(SETTINGS):
        expected = filtered_distribution(logits[row].numpy(), sampling, PROMPT, OUTPUT)
        assert_drawn(draws.tokens[row], expected, sampling.seed, row, 50 + seed)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.5), Sampling(top_k=9), Sampling(top_p=0.6), Sampling(min_p=0.2)],
    ids=["plain", "temperature", "top_k", "top_p", "min_p"],
)
def test_distribution_over_many_positions(sampling):
    """Chi-square over the tokens expected at least 5 times; 5 standard deviations above its mean is the limit."""
    vocab, count = 64, 6000
    logits = logits_of(1, 3, 1.0, vocab)
    sampler = sampler_for([sampling], vocab=vocab)
    draws = sampler.sample(logits.repeat(count, 1), np.zeros(count, dtype=np.int64), np.arange(count))
    expected = filtered_distribution(logits[0].numpy(), sampling) * count
    observed = np.bincount(draws.tokens, minlength=vocab)
    assert observed[expected == 0].sum() == 0
    cells = expected >= 5
    freedom = cells.sum() - 1
    assert ((observed - expected) ** 2 / np.maximum(expected, 1e-9))[cells].sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_a_row_alone_and_in_any_batch_is_bitwise_the_same():
    settings = [
        *SETTINGS,
        Sampling(temperature=0.0, logprobs=4),
        Sampling(temperature=0.0),
        Sampling(seed=3, logprobs=0),
    ]
    logits = logits_of(len(settings), 7)
    together = sample(sampler_for(settings, tokens=PROMPT + OUTPUT, num_prompt=5), logits)
    orders = [list(reversed(range(len(settings)))), list(range(0, len(settings), 2))]
    for slots in itertools.chain(orders, ([slot] for slot in range(len(settings)))):
        sampler = sampler_for(settings, tokens=PROMPT + OUTPUT, num_prompt=5)
        draws = sample(sampler, logits[slots], slots)
        assert draws.tokens == [together.tokens[slot] for slot in slots]
        assert draws.logprobs == [together.logprobs[slot] for slot in slots]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_large_vocabulary_in_a_large_batch(threads):
    """Enough elements that torch splits its loops over threads, in other places for other batch sizes."""
    vocab, before = 32_003, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        settings = [Sampling(seed=i, top_p=0.9 if i % 2 else 1.0, logprobs=2) for i in range(9)]
        logits = logits_of(9, 1, 2.0, vocab)
        together = sample(sampler_for(settings, vocab=vocab), logits)
        for slot in range(9):
            alone = sample(sampler_for(settings, vocab=vocab), logits[slot : slot + 1], [slot])
            assert (alone.tokens[0], alone.logprobs[0]) == (together.tokens[slot], together.logprobs[slot])
    finally:
        torch.set_num_threads(before)


def test_greedy_is_the_largest_logit_and_the_lowest_id_among_equals():
    logits = logits_of(4, 2)
    logits[1, [40, 700]] = 50.0
    for settings in ([Sampling(temperature=0.0)] * 4, [Sampling(temperature=0.0)] * 3 + [Sampling(temperature=1.0)]):
        draws = sample(sampler_for(settings), logits)
        assert draws.tokens[:3] == logits[:3].argmax(dim=1).tolist()
        assert draws.tokens[1] == 40


def test_a_tiny_temperature_is_greedy_and_finite():
    logits = logits_of(3, 4, 30.0)
    settings = [Sampling(temperature=t) for t in (1e-5, 2e-5, 1e-300)]
    assert sample(sampler_for(settings), logits).tokens == logits.argmax(dim=1).tolist()


def test_equal_probabilities_stay_or_go_together():
    logits = torch.full((1, 8), -5.0)
    logits[0, [1, 4, 6]] = 2.0
    seen = {sample(sampler_for([Sampling(seed=seed, top_k=2)], vocab=8), logits).tokens[0] for seed in range(60)}
    assert seen == {1, 4, 6}


def test_min_tokens_masks_stop_tokens_until_enough_were_generated():
    logits = torch.zeros(1, 16)
    logits[0, 9] = 30.0
    sampler = sampler_for(
        [Sampling(temperature=0.0)], vocab=16, tokens=[1, 2, 3], num_prompt=3, min_tokens=2, stop_ids=[9]
    )
    tokens = [sampler.sample(logits.clone(), np.array([0]), np.array([position])).tokens[0] for position in (3, 4, 5)]
    # The core ends a sequence at a stop token once it has generated more than min_tokens, that one included.
    assert tokens == [0, 0, 9]


def test_logprobs_are_of_the_raw_distribution():
    logits = logits_of(2, 5)
    sampling = Sampling(temperature=0.0, logprobs=3, logit_bias={11: 1000.0}, top_k=1)
    draws = sample(sampler_for([sampling, Sampling(temperature=0.0)]), logits)
    raw = torch.log_softmax(logits[0].double(), 0)
    best = torch.topk(raw, 3)
    assert draws.tokens[0] == 11
    assert draws.logprobs[0].logprob == pytest.approx(raw[11].item(), abs=1e-5)
    assert draws.logprobs[0].top_ids == best.indices.tolist()
    assert draws.logprobs[0].top_logprobs == pytest.approx(best.values.tolist(), abs=1e-5)
    assert draws.logprobs[1] is None


def test_penalties_follow_what_is_drawn_and_match_a_fresh_start():
    """Counts that grew with the draws equal those of a sequence that is assigned again with its tokens."""
    settings = [Sampling(temperature=0.0, frequency_penalty=0.9, presence_penalty=0.4, repetition_penalty=1.3)]
    logits = logits_of(1, 9)
    sampler = sampler_for(settings, tokens=PROMPT, num_prompt=len(PROMPT))
    output = []
    for step in range(30):
        again = sampler_for(settings, tokens=PROMPT + output, num_prompt=len(PROMPT))
        token = sample(sampler, logits, position=5 + step).tokens[0]
        assert sample(again, logits, position=5 + step).tokens[0] == token
        output.append(token)
    assert len(set(output)) > 3, "the penalties changed what is drawn"


def test_token_counts_grow_beyond_their_first_room():
    counts = TokenCounts([1, 2, 2], [3, 3])
    for token in range(500):
        counts.add(token)
    found = dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True))
    assert found == {token: 1.0 for token in range(500)} | {3: 3.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_fail_their_row_alone(value, temperature):
    settings = [Sampling(seed=i, temperature=temperature, top_p=0.9) for i in range(3)]
    logits = logits_of(3, 6)
    expected = sample(sampler_for(settings), logits)
    logits[1, 77] = value
    draws = sample(sampler_for(settings), logits)
    assert list(draws.failures) == [1] and "not finite" in draws.failures[1]
    assert [draws.tokens[0], draws.tokens[2]] == [expected.tokens[0], expected.tokens[2]]


def test_a_row_with_nothing_left_to_draw_fails():
    draws = sample(sampler_for([Sampling(temperature=0.0), Sampling()]), torch.full((2, VOCAB), -torch.inf))
    assert sorted(draws.failures) == [0, 1]


@pytest.mark.parametrize(
    ("sampling", "stop_ids", "message"),
    [
        (Sampling(logit_bias={VOCAB: 1.0}), [], f"token {VOCAB}"),
        (Sampling(logit_bias={1: float("nan")}), [], "logit_bias of token 1"),
        (Sampling(temperature=float("nan")), [], "temperature"),
        (Sampling(repetition_penalty=0.0), [], "repetition_penalty"),
        (Sampling(), [-1], "stop_token_ids"),
    ],
)
def test_settings_that_cannot_be_applied_are_refused(sampling, stop_ids, message):
    with pytest.raises(ValueError, match=message):
        Sampler(1, VOCAB, TorchOps(torch.device("cpu"))).assign(0, sampling, 0, [1], 1, 0, stop_ids, None)


def test_min_tokens_holds_back_the_end_of_a_grammar_that_can_go_on_and_yields_where_it_cannot():
    import xgrammar

    vocabulary = TinyVocabulary()
    compiler = xgrammar.GrammarCompiler(vocabulary.info(), max_threads=1)
    eos, factory = vocabulary.eos_id, GrammarFactory(vocabulary.info)
    logits = torch.zeros(1, vocabulary.vocab_size)
    logits[0, eos] = 30.0
    for pattern, expected in (
        ("a{0,9}", [*vocabulary.encode("aaa"), eos]),
        ("a", [*vocabulary.encode("a"), eos, eos, eos]),
    ):
        sampler = Sampler(1, vocabulary.vocab_size, TorchOps(torch.device("cpu")))
        grammar = factory.state(compile_grammar("regex", pattern, compiler))
        sampler.assign(0, Sampling(temperature=0.0), 0, [], 0, 3, [eos], grammar)
        draws = [sampler.sample(logits.clone(), np.array([0]), np.array([position])) for position in range(4)]
        assert [draw.tokens[0] for draw in draws] == expected
        assert not any(draw.failures for draw in draws)
