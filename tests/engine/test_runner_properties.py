"""Whatever the scheduler does to it, a sequence gets the tokens that it would get alone.

Random requests under random limits: chunks, mixed batches, shared prefixes, preemptions, aborts, plans in flight. The
model's logits depend on every token of the context as the paged cache holds it, so a wrong block, position or token
changes what is drawn.
"""

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.core.config import SchedulerConfig
from shoal.core.engine_core import EngineCore
from shoal.core.types import Request, Sampling
from tests.engine.test_runner import BLOCK, BROKEN, MAX_LEN, VOCAB, ContextModel, runner_on

SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(seed=1),
    Sampling(seed=2, temperature=0.7, top_k=20, top_p=0.9),
    Sampling(seed=3, min_p=0.05, repetition_penalty=1.4, frequency_penalty=0.3),
    Sampling(temperature=0.0, presence_penalty=0.5, logprobs=2),
    BROKEN[0],
)

# Few distinct prompts, most with a common beginning, so that blocks are shared.
PROMPTS = tuple(
    tuple(7 + (i if i < shared else i * k + k) % 60 for i in range(n))
    for shared, k, n in (
        (0, 3, 1),
        (8, 5, 9),
        (8, 7, 13),
        (12, 3, 16),
        (16, 9, 30),
        (4, 2, 6),
    )
)


@cache
def alone(prompt, sampling_number, index, max_tokens):
    """What sequence `index` draws with the engine to itself."""
    request = Request(
        id="alone", prompt=list(prompt), max_tokens=max_tokens, sampling=SAMPLINGS[sampling_number], n=index + 1
    )
    return run([request], num_blocks=64, max_batch_tokens=64, depth=1, aborts={})["alone", index]


def run(requests, *, num_blocks, max_batch_tokens, depth, aborts):
    """Tokens of each (request, index); None where it failed. `aborts` maps a step to the request that ends there."""
    config = SchedulerConfig(
        num_blocks=num_blocks,
        max_len=MAX_LEN,
        vocab_size=VOCAB,
        block_size=BLOCK,
        max_sequences=4,
        max_batch_tokens=max_batch_tokens,
        depth=depth,
    )
    core, runner = EngineCore(config), runner_on(ContextModel(num_blocks), num_slots=4)
    for request in requests:
        assert core.add(request, 0.0) is None
    tokens = {(request.id, index): [] for request in requests for index in range(request.n)}
    plans, step = [], 0
    while core.has_work():
        if step in aborts:
            core.abort(aborts[step], 0.0)
        while (plan := core.plan(0.0)) is not None:
            plans.append(plan)
        outputs = core.take_outputs()
        if plans:
            result = runner.step(plans.pop(0))
            outputs += core.commit(result.plan_id, result, 0.0)
        core.check()
        for output in outputs:
            key = (output.request_id, output.index)
            tokens[key] = None if output.finish == "error" else tokens[key] + output.token_ids
        step += 1
        assert step < 2000, "the engine does not come to an end"
    return tokens


requests = st.lists(
    st.tuples(
        st.sampled_from(PROMPTS),
        st.integers(0, len(SAMPLINGS) - 1),
        st.integers(1, 2),
        st.integers(1, 12),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    requests=requests,
    num_blocks=st.integers(MAX_LEN // BLOCK, 40),
    max_batch_tokens=st.integers(4, 40),
    depth=st.integers(1, 3),
    aborts=st.dictionaries(st.integers(0, 20), st.integers(0, 5).map(str), max_size=2),
)
def test_tokens_do_not_depend_on_company_or_limits(requests, num_blocks, max_batch_tokens, depth, aborts):
    made = [
        Request(id=str(number), prompt=list(prompt), max_tokens=count, sampling=SAMPLINGS[sampling], n=n)
        for number, (prompt, sampling, n, count) in enumerate(requests)
    ]
    drawn = run(made, num_blocks=num_blocks, max_batch_tokens=max_batch_tokens, depth=depth, aborts=aborts)
    aborted = set(aborts.values())
    for number, (prompt, sampling, n, count) in enumerate(requests):
        for index in range(n):
            tokens, expected = drawn[str(number), index], alone(prompt, sampling, index, count)
            if str(number) in aborted:
                assert tokens is None or tokens == (expected or [])[: len(tokens)]
            else:
                assert tokens == expected
                assert (tokens is None) == (SAMPLINGS[sampling] is BROKEN[0])
