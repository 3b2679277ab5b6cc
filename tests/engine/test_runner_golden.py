"""Runner, decoder and scheduler together against transformers: greedy tokens are identical whatever the plans."""

import json

import pytest
import torch

from shoal.core.config import SchedulerConfig
from shoal.core.engine_core import EngineCore
from shoal.core.model_config import spec_from_config
from shoal.core.types import Request, Row, Sampling, SlotAssignment, StepPlan
from shoal.engine.attention.native import NativeAttention
from shoal.engine.attention.portable import PortableAttention
from shoal.engine.grammar_state import GrammarFactory
from shoal.engine.model import Decoder
from shoal.engine.native import unavailable_reason
from shoal.engine.native_ops import NativeOps
from shoal.engine.ops import TorchOps
from shoal.engine.runner import Runner
from shoal.engine.weights import open_weights
from tests.checkpoints import VOCAB, make_checkpoint

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0)
NUM_TOKENS = 24
PROMPTS = [
    [(7 * i * i + 13 * j + 5) % (VOCAB - 8) + 8 for i in range(length)] for j, length in enumerate((37, 5, 16, 60, 1))
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint("llama3", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["torch", "native"])
def decoder(checkpoint, request):
    if request.param == "torch":
        ops, attention = TorchOps(CPU), PortableAttention()
    elif (reason := unavailable_reason()) is not None:
        pytest.skip(reason)
    else:
        ops = NativeOps(threads=2)
        attention = NativeAttention(ops)
    spec = spec_from_config(json.loads((checkpoint / "config.json").read_text()))
    decoder = Decoder(spec, ops, attention, "float32", device=CPU)
    source = open_weights(checkpoint)
    decoder.load(source)
    source.close()
    yield decoder
    ops.close()


@pytest.fixture(scope="module")
def expected(checkpoint):
    """What transformers generates for each prompt."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    outputs = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NUM_TOKENS,
                min_new_tokens=NUM_TOKENS,
                # No token may be masked: the engine is not asked to avoid end-of-text.
                eos_token_id=None,
                suppress_tokens=None,
            )
            outputs.append(out[0, len(prompt) :].tolist())
    return outputs


def runner_on(decoder, num_blocks=64, block_size=16, num_slots=8, max_len=128):
    return Runner(
        decoder,
        decoder.new_cache(num_blocks, block_size),
        num_slots=num_slots,
        max_len=max_len,
        vocab_size=VOCAB,
        device=CPU,
        ops=decoder.ops,
        grammars=GrammarFactory(lambda: pytest.fail("no grammar was asked for")),
    )


def assignment(slot, tokens, num_prompt, blocks):
    return SlotAssignment(slot, "r", 0, tokens, num_prompt, blocks, GREEDY, 0, [])


def test_whole_prompts_in_one_batch(decoder, expected):
    runner = runner_on(decoder)
    assigned = [assignment(i, prompt, len(prompt), list(range(8 * i, 8 * i + 8))) for i, prompt in enumerate(PROMPTS)]
    result = runner.step(StepPlan(0, [], assigned, [Row(i, 0, len(p), True, []) for i, p in enumerate(PROMPTS)]))
    drawn = [[item.token_id] for item in result.sampled]
    for step in range(NUM_TOKENS - 1):
        rows = [Row(i, len(p) + step, 1, True, []) for i, p in enumerate(PROMPTS)]
        for item in runner.step(StepPlan(step + 1, [], [], rows)).sampled:
            drawn[item.slot].append(item.token_id)
    assert drawn == expected


def test_chunks_scrambled_blocks_and_a_preemption(decoder, expected):
    """The longest prompt in chunks of 7 beside a decode; then its blocks are taken and it starts over elsewhere."""
    runner = runner_on(decoder, num_blocks=20)
    long, short = PROMPTS[3], PROMPTS[1]
    result = runner.step(StepPlan(0, [], [assignment(1, short, 5, [19, 3, 11])], [Row(1, 0, 5, True, [])]))
    drawn = {0: [], 1: [result.sampled[0].token_id]}
    assigned, blocks = [assignment(0, long, 60, [])], {0: [9], 16: [2], 32: [17], 48: [5], 64: [0]}
    for number, start in enumerate(range(0, 60, 7)):
        count = min(7, 60 - start)
        new = [b for at, ids in blocks.items() if start <= at < start + count for b in ids]
        rows = [Row(1, 5 + number, 1, True, []), Row(0, start, count, start + count == 60, new)]
        for item in runner.step(StepPlan(1 + number, [], assigned, rows)).sampled:
            drawn[item.slot].append(item.token_id)
        assigned = []
    assert drawn[1] == expected[1][:10]
    rows = [Row(0, 60, 1, True, [])]
    drawn[0].append(runner.step(StepPlan(20, [], [], rows)).sampled[0].token_id)
    # Another sequence overwrites the blocks of the preempted one.
    runner.step(StepPlan(21, [0], [assignment(0, PROMPTS[0], 37, [9, 2, 17])], [Row(0, 0, 37, True, [])]))
    again = assignment(5, long + drawn[0], 60, [4, 6, 8, 10, 12, 14])
    result = runner.step(StepPlan(22, [], [again], [Row(5, 0, 62, True, [])]))
    drawn[0] += [item.token_id for item in result.sampled]
    for step in range(NUM_TOKENS - 3):
        result = runner.step(StepPlan(23 + step, [], [], [Row(5, 62 + step, 1, True, [])]))
        drawn[0].append(result.sampled[0].token_id)
    assert drawn[0] == expected[3]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(
    ("num_blocks", "block_size", "max_batch_tokens"),
    [(96, 16, 512), (96, 16, 8), (8, 16, 128)],
    ids=["roomy", "chunked", "tight"],
)
def test_under_the_scheduler(decoder, expected, depth, num_blocks, block_size, max_batch_tokens):
    """All at once through EngineCore. The tight one has blocks for three prompts but not for what they become."""
    core = EngineCore(
        SchedulerConfig(
            num_blocks=num_blocks,
            max_len=128,
            vocab_size=VOCAB,
            block_size=block_size,
            max_sequences=8,
            max_batch_tokens=max_batch_tokens,
            depth=depth,
        )
    )
    runner = runner_on(decoder, num_blocks, block_size)
    for number in reversed(range(len(PROMPTS))):
        request = Request(id=str(number), prompt=PROMPTS[number], max_tokens=NUM_TOKENS, sampling=GREEDY)
        assert core.add(request, 1.0) is None
    drawn = {str(number): [] for number in range(len(PROMPTS))}
    now, plans = 10.0, []
    while core.has_work():
        # Plans are queued before the results of those ahead of them are known to the core.
        while (plan := core.plan(now)) is not None:
            plans.append(plan)
        result = runner.step(plans.pop(0))
        assert not result.failed
        for output in core.commit(result.plan_id, result, now):
            drawn[output.request_id] += output.token_ids
        core.check()
        now += 0.01
    assert list(drawn.values()) == expected
    assert (core.load().preemptions > 0) == (num_blocks == 8)
