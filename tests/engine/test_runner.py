"""The runner through hand-made plans, on a model whose every logit depends on the whole context in the paged cache."""

import re

import numpy as np
import pytest
import torch
import xgrammar

from shoal.core.types import Grammar as GrammarSource
from shoal.core.types import Row, Sampling, SequenceFailure, SlotAssignment, StepPlan
from shoal.engine.grammar import compile_grammar
from shoal.engine.grammar_state import GrammarFactory
from shoal.engine.ops import TorchOps
from shoal.engine.runner import Runner
from tests.engine.vocabulary import TinyVocabulary

VOCABULARY = TinyVocabulary()
VOCAB, BLOCK, MAX_LEN = VOCABULARY.vocab_size, 4, 64
CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0)


class ContextModel:
    """Keeps token ids where keys and values would be; a token's hidden state is a hash of all ids up to it."""

    def __init__(self, num_blocks):
        self.num_blocks, self.block_size, self.nbytes = num_blocks, BLOCK, 0
        self.ids = torch.full((num_blocks * BLOCK,), -1, dtype=torch.int64)
        self.fails = False

    def forward(self, ids_T, positions_T, batch, cache):
        if self.fails:
            raise RuntimeError("the device is gone")
        assert cache is self and ids_T.dtype == positions_T.dtype == torch.int64
        self.ids[batch.slot_mapping_T.long()] = ids_T
        hidden = []
        starts = batch.query_starts_S1.tolist()
        assert starts[-1] == len(ids_T)
        assert batch.max_query_len == max(np.diff(starts)) and batch.max_context_len == batch.seen_T.max()
        for row, length in enumerate(batch.seen_T[batch.query_starts_S1[1:] - 1].tolist()):
            at = torch.arange(length)
            context = self.ids[batch.block_tables_SB[row].long()[at // BLOCK] * BLOCK + at % BLOCK].tolist()
            first = length - (starts[row + 1] - starts[row])
            assert positions_T[starts[row] : starts[row + 1]].tolist() == list(range(first, length))
            hidden += [context_hash(context[: end + 1]) for end in range(first, length)]
        return torch.tensor(hidden, dtype=torch.float64)[:, None]

    def logits(self, hidden_SH):
        return torch.stack([logits_after(int(value)) for value in hidden_SH[:, 0]])


def context_hash(tokens):
    value = 1
    for token in tokens:
        value = (value * 1_000_003 + token + 7) % (2**31)
    return value


def logits_after(value):
    return torch.from_numpy(np.random.default_rng(value).standard_normal(VOCAB).astype(np.float32))


def expected_greedy(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_after(context_hash(tokens)).argmax()))
    return tokens[len(prompt) :]


def runner_on(model=None, num_slots=4):
    model = model or ContextModel(64)
    return Runner(
        model,
        model,
        num_slots=num_slots,
        max_len=MAX_LEN,
        vocab_size=VOCAB,
        device=CPU,
        ops=TorchOps(CPU),
        grammars=GrammarFactory(VOCABULARY.info),
    )


def assignment(slot, tokens, num_prompt, blocks, sampling=GREEDY, index=0):
    return SlotAssignment(slot, f"request-{slot}", index, tokens, num_prompt, blocks, sampling, 0, [])


def generate(runner, plans):
    """Run plans and collect the tokens of each slot."""
    drawn = {}
    for number, (released, assigned, rows) in enumerate(plans):
        result = runner.step(StepPlan(number, released, assigned, rows))
        assert result.plan_id == number and not result.failed
        for item in result.sampled:
            drawn.setdefault(item.slot, []).append(item.token_id)
    return drawn


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


def test_prefill_then_decode():
    plans = [([], [assignment(2, PROMPT, 9, [5, 9, 1])], [Row(2, 0, 9, True, [])])]
    plans += [([], [], [Row(2, 9 + i, 1, True, [20 + i] if (9 + i) % BLOCK == 0 else [])]) for i in range(10)]
    assert generate(runner_on(), plans)[2] == expected_greedy(PROMPT, 11)


def test_chunks_beside_a_decode():
    """Slot 0 decodes while slot 1's prompt comes in three chunks, with blocks as they are needed."""
    other = [8, 8, 2]
    plans = [
        ([], [assignment(0, other, 3, [0])], [Row(0, 0, 3, True, [])]),
        ([], [assignment(1, PROMPT, 9, [])], [Row(0, 3, 1, True, []), Row(1, 0, 2, False, [7])]),
        ([], [], [Row(0, 4, 1, True, [1]), Row(1, 2, 5, False, [3])]),
        ([], [], [Row(1, 7, 2, True, [4]), Row(0, 5, 1, True, [])]),
        ([], [], [Row(0, 6, 1, True, []), Row(1, 9, 1, True, [])]),
    ]
    drawn = generate(runner_on(), plans)
    assert drawn == {0: expected_greedy(other, 5), 1: expected_greedy(PROMPT, 2)}


def test_preempted_and_assigned_again_to_another_slot():
    """The blocks go to a sequence that overwrites them; the first one recomputes its tokens elsewhere."""
    expected = expected_greedy(PROMPT, 5)
    other = [60, 61, 62, 63, 64, 65]
    plans = [
        ([], [assignment(0, PROMPT, 9, [0, 1, 2])], [Row(0, 0, 9, True, [])]),
        ([], [], [Row(0, 9, 1, True, [])]),
        ([0], [assignment(0, other, 6, [2, 0])], [Row(0, 0, 6, True, [])]),
        ([], [assignment(3, PROMPT + expected[:2], 9, [8, 9, 10])], [Row(3, 0, 6, False, []), Row(0, 6, 1, True, [])]),
        ([], [], [Row(3, 6, 5, True, [])]),
        ([], [], [Row(3, 11, 1, True, [])]),
        ([], [], [Row(3, 12, 1, True, [11])]),
    ]
    drawn = generate(runner_on(), plans)
    assert drawn[0] == expected[:2] + expected_greedy(other, 2)
    assert drawn[3] == expected[2:]


def test_shared_prefix_blocks_are_not_computed_again():
    plans = [
        ([], [assignment(0, PROMPT, 9, [0, 1, 2])], [Row(0, 0, 9, True, [])]),
        ([], [assignment(1, [*PROMPT[:8], 50], 9, [0, 1, 7])], [Row(1, 8, 1, True, [])]),
    ]
    assert generate(runner_on(), plans)[1] == expected_greedy([*PROMPT[:8], 50], 1)


def test_a_queued_plan_reads_the_token_that_its_predecessor_draws():
    """Plans of depth 2 are made before the token is known, so nothing but the slot can supply it."""
    runner = runner_on()
    first = StepPlan(0, [], [assignment(0, PROMPT, 9, [0, 1, 2])], [Row(0, 0, 9, True, [])])
    second = StepPlan(1, [], [], [Row(0, 9, 1, True, [])])
    drawn = [runner.step(plan).sampled[0].token_id for plan in (first, second)]
    assert drawn == expected_greedy(PROMPT, 2)


def test_random_sampling_does_not_depend_on_batch_chunks_or_preemption():
    sampling = Sampling(temperature=1.2, top_p=0.95, seed=99)
    whole = [([], [assignment(0, PROMPT, 9, [0, 1, 2, 3], sampling, 1)], [Row(0, 0, 9, True, [])])]
    whole += [([], [], [Row(0, 9 + i, 1, True, [])]) for i in range(5)]
    expected = generate(runner_on(), whole)[0]
    assert expected != expected_greedy(PROMPT, 6)
    in_slot_2 = assignment(2, PROMPT, 9, [0, 1, 2, 3], sampling, 1)
    mixed = [
        ([], [assignment(1, [5], 1, [9]), in_slot_2], [Row(2, 0, 4, False, [])]),
        ([], [], [Row(1, 0, 1, True, []), Row(2, 4, 5, True, [])]),
        ([], [], [Row(2, 9, 1, True, []), Row(1, 1, 1, True, [])]),
        ([2], [assignment(3, PROMPT + expected[:2], 9, [20, 21, 22, 23], sampling, 1)], [Row(3, 0, 11, True, [])]),
        ([], [], [Row(1, 2, 1, True, []), Row(3, 11, 1, True, [])]),
        ([], [], [Row(3, 12, 1, True, [])]),
        ([], [], [Row(3, 13, 1, True, [])]),
    ]
    drawn = generate(runner_on(), mixed)
    assert drawn[2] + drawn[3] == expected


BROKEN = [
    Sampling(temperature=0.0, logit_bias={VOCAB: 1.0}),
    Sampling(temperature=0.0, grammar=GrammarSource("regex", "a", "not a compiled grammar")),
]


@pytest.mark.parametrize("sampling", BROKEN, ids=["bias", "grammar"])
def test_a_sequence_that_cannot_be_prepared_fails_alone(sampling):
    def run(middle):
        model = ContextModel(64)
        runner = runner_on(model)
        results = []
        prompts = {0: PROMPT, 1: [7, 7, 7, 7, 7], 2: [1, 2]}
        assigned = [
            assignment(
                slot, prompt, len(prompt), [10 * slot, 10 * slot + 1, 10 * slot + 2], middle if slot == 1 else GREEDY
            )
            for slot, prompt in prompts.items()
        ]
        rows = [Row(slot, 0, len(prompt), True, []) for slot, prompt in prompts.items()]
        results.append(runner.step(StepPlan(0, [], assigned, rows)))
        rows = [Row(slot, len(prompt), 1, True, []) for slot, prompt in prompts.items()]
        results.append(runner.step(StepPlan(1, [], [], rows)))
        results.append(
            runner.step(StepPlan(2, [1], [assignment(1, PROMPT, 9, [30, 31, 32])], [Row(1, 0, 9, True, [])]))
        )
        return model, results

    model, results = run(sampling)
    clean_model, clean = run(GREEDY)
    for result, reference in zip(results[:2], clean[:2], strict=True):
        assert [failure.slot for failure in result.failed] == [1] and result.failed[0].message
        assert result.sampled == [item for item in reference.sampled if item.slot != 1]
    # The prompt's keys and values are there all the same, since other sequences may share the blocks.
    assert model.ids[40:45].tolist() == clean_model.ids[40:45].tolist() == [7, 7, 7, 7, 7]
    # The slot is good again for the next sequence.
    assert results[2] == clean[2] and not results[2].failed


def test_a_grammar_is_followed_through_a_preemption_and_beside_rows_without():
    compiler = xgrammar.GrammarCompiler(VOCABULARY.info(), max_threads=1)
    source = r"\[\d{3}, (true|ab)\]"
    grammar = GrammarSource("regex", source, compile_grammar("regex", source, compiler))
    sampling = Sampling(temperature=1.0, seed=5, grammar=grammar)
    stops = [VOCABULARY.eos_id]

    def assigned(slot, tokens, blocks):
        return SlotAssignment(slot, "r", 0, tokens, 9, blocks, sampling, 3, stops)

    whole = [([], [assigned(0, PROMPT, list(range(12)))], [Row(0, 0, 9, True, [])])]
    whole += [([], [], [Row(0, 9 + i, 1, True, [])]) for i in range(20)]
    drawn = generate(runner_on(), whole)[0]
    text = drawn[: drawn.index(VOCABULARY.eos_id)]
    assert re.fullmatch(source, VOCABULARY.decode(text))
    # Past the end the sequence may go on in steps that are in flight; nothing but end-of-text is drawn then.
    assert set(drawn[len(text) :]) == set(stops)
    cut = 3
    split = [([], [assigned(0, PROMPT, list(range(12))), assignment(1, [1], 1, [13])], [Row(0, 0, 9, True, [])])]
    split += [([], [], [Row(0, 9 + i, 1, True, []), Row(1, i, 1, True, [])]) for i in range(cut - 1)]
    split += [([0], [assigned(2, PROMPT + drawn[:cut], list(range(20, 32)))], [Row(2, 0, 9 + cut, True, [])])]
    split += [([], [], [Row(2, 9 + cut + i, 1, True, [])]) for i in range(20 - cut)]
    again = generate(runner_on(), split)
    assert again[0] + again[2] == drawn


def test_a_failing_chunk_is_reported_before_it_samples():
    runner = runner_on()
    plan = StepPlan(0, [], [assignment(0, PROMPT, 9, [0, 1, 2], BROKEN[0])], [Row(0, 0, 4, False, [])])
    assert runner.step(plan).failed[0].slot == 0


def test_logits_that_are_not_finite_fail_one_sequence():
    class Poisoned(ContextModel):
        def logits(self, hidden_SH):
            logits = super().logits(hidden_SH)
            logits[0, 5] = torch.nan
            return logits

    runner = runner_on(Poisoned(64))
    assigned = [assignment(slot, PROMPT, 9, [10 * slot, 10 * slot + 1, 10 * slot + 2]) for slot in (0, 1)]
    result = runner.step(StepPlan(0, [], assigned, [Row(0, 0, 9, True, []), Row(1, 0, 9, True, [])]))
    assert [item.token_id for item in result.sampled] == expected_greedy(PROMPT, 1)
    assert len(result.failed) == 1 and isinstance(result.failed[0], SequenceFailure) and result.failed[0].slot == 0


def test_a_sequence_may_fill_its_slot_to_the_last_token():
    prompt = [i % VOCAB for i in range(MAX_LEN)]
    plans = [([], [assignment(0, prompt, MAX_LEN, list(range(16)))], [Row(0, 0, MAX_LEN, True, [])])]
    assert generate(runner_on(), plans)[0] == expected_greedy(prompt, 1)


def test_plans_without_rows_and_rows_without_samples():
    runner = runner_on()
    assert runner.step(StepPlan(0, [0, 1], [], [])).sampled == []
    result = runner.step(StepPlan(1, [], [assignment(0, PROMPT, 9, [0, 1, 2])], [Row(0, 0, 4, False, [])]))
    assert (result.sampled, result.failed) == ([], [])


def test_a_failing_forward_raises_for_the_worker_to_report():
    model = ContextModel(8)
    runner = runner_on(model)
    model.fails = True
    with pytest.raises(RuntimeError, match="the device is gone"):
        runner.step(StepPlan(0, [], [assignment(0, [1], 1, [0])], [Row(0, 0, 1, True, [])]))
