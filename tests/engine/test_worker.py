"""A worker on a real checkpoint: what it reports, how it refuses, and that its failures are values."""

from pathlib import Path

import pytest
import torch

from shoal.checkpoint.errors import CheckpointError, ModelNotFound
from shoal.core.config import EngineConfig
from shoal.core.start_report import StartProgress
from shoal.core.types import Row, Sampling, SlotAssignment, StepPlan, StepResult, WorkerFailure
from shoal.engine.memory import OutOfMemory
from shoal.engine.native import unavailable_reason
from shoal.engine.worker import Worker
from tests.checkpoints import VOCAB, make_checkpoint
from tests.quantized_checkpoints import make_twins

KV_BYTES_PER_TOKEN = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, head size, float32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(make_checkpoint("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture(autouse=True)
def same_torch_threads():
    """A worker sets torch's threads for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def config(checkpoint, **changes):
    return EngineConfig(**({"model": checkpoint, "device": "cpu", "ops": "torch", "kv_cache_bytes": 10**6} | changes))


def first_step(tokens, sampling=None):
    sampling = sampling or Sampling(temperature=0.0)
    blocks = list(range(-(-len(tokens) // 16)))
    assignment = SlotAssignment(0, "r", 0, tokens, len(tokens), blocks, sampling, 0, [])
    return StepPlan(7, [], [assignment], [Row(0, 0, len(tokens), True, [])])


def test_info_and_progress(checkpoint):
    seen = []
    worker = Worker(config(checkpoint))
    info = worker.start(seen.append)
    assert info.num_blocks == 10**6 // (16 * KV_BYTES_PER_TOKEN)
    assert info.kv_bytes == info.num_blocks * 16 * KV_BYTES_PER_TOKEN
    assert info.max_len == info.spec.max_len == 512
    assert info.weight_bytes == pytest.approx(4 * info.spec.num_parameters(), rel=0.01)
    assert (info.device, info.ops, info.dtype) == ("cpu", "torch", "float32")
    assert [phase.name for phase in info.start.phases] == ["open", "read", "convert", "allocate", "warm-up"]
    assert all(phase.where == "rank 0" and phase.seconds > 0 for phase in info.start.phases)
    (rank,) = info.start.ranks
    assert rank.bytes_read == 4 * info.spec.num_parameters() and rank.gigabytes_per_second > 0
    assert rank.read_seconds + rank.convert_seconds < info.start.total_seconds
    assert seen[0].what == "reading the checkpoint" and seen[-1] == StartProgress("ready", 1.0)
    loading = [progress.fraction for progress in seen if progress.what == "loading the weights"]
    assert loading == sorted(loading) and loading[-1] == 1.0 and len(loading) > 5
    assert {progress.bytes_total for progress in seen if progress.bytes_read} == {rank.bytes_read}
    worker.close()


def test_sequences_are_as_long_as_the_cache_allows_unless_told(checkpoint):
    worker = Worker(config(checkpoint, kv_cache_bytes=5 * 16 * KV_BYTES_PER_TOKEN))
    assert worker.start().max_len == 80
    worker.close()


def test_steps_before_and_after_a_failure(checkpoint):
    worker = Worker(config(checkpoint))
    assert worker.step(first_step([5, 6])) == WorkerFailure(7, "the worker is not running")
    worker = Worker(config(checkpoint))
    worker.start()
    result = worker.step(first_step(list(range(20, 60))))
    assert isinstance(result, StepResult) and 0 <= result.sampled[0].token_id < VOCAB
    # A token that is in no vocabulary cannot be looked up: the whole step fails, and so does every later one.
    failure = worker.step(first_step([VOCAB + 1]))
    assert isinstance(failure, WorkerFailure) and failure.plan_id == 7 and "out of bounds" in failure.message
    assert worker.step(first_step([5])) == failure
    worker.close()
    worker.close()


def test_warm_up_leaves_no_trace(checkpoint):
    """The first request gets slot 0 and the first blocks, which the warm-up used."""
    tokens = [9, 8, 7, 6, 5, 4, 3]
    drawn = []
    for length in (None, 8):
        worker = Worker(config(checkpoint, max_len=length))
        worker.start()
        drawn.append(worker.step(first_step(tokens)))
        worker.close()
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "/no/such/place"}, ModelNotFound, "/no/such/place"),
        ({"max_len": 513}, ValueError, "max_len is 513, and the model was made for 512"),
        ({"threads": 0}, ValueError, "threads must be at least 1"),
        ({"ops": "native", "block_size": 20}, ValueError, "native kernels are not available"),
        ({"device": "abacus"}, ValueError, "device 'abacus' is unknown"),
        ({"device": "cuda:99"}, ValueError, "'cuda:99' is not there"),
        ({"max_len": 512, "kv_cache_bytes": 20_000}, OutOfMemory, "set max_len to at most 16"),
        ({"kv_cache_bytes": 2**60}, OutOfMemory, "are available"),
        ({"quantize": "fp8", "dtype": "int8"}, ValueError, "quantize is fp8 and dtype is int8: leave out one"),
        ({"quantize": "fp8", "ops": "native"}, ValueError, "they store int8, not fp8: take quantize int8"),
    ],
)
def test_what_it_refuses(checkpoint, changes, error, message):
    with pytest.raises(error, match=message):
        Worker(config(checkpoint, **changes)).start()


def test_a_truncated_checkpoint_is_named(checkpoint, tmp_path):
    make_checkpoint("llama", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        Worker(config(str(tmp_path))).start()


def test_grammar_from_the_checkpoints_own_tokenizer(checkpoint):
    """The engine builds its vocabulary from the checkpoint; a grammar compiled for the front's copy fits it."""
    import xgrammar

    from shoal.checkpoint.tokenizer import load_tokenizer
    from shoal.core.types import Grammar
    from shoal.engine.grammar import compile_grammar, tokenizer_info

    tokenizer = load_tokenizer(checkpoint)
    info = tokenizer_info(tokenizer, VOCAB, tokenizer.eos_ids)
    source = r"\d{4}-(jan|feb)"
    compiled = compile_grammar("regex", source, xgrammar.GrammarCompiler(info, max_threads=1))
    worker = Worker(config(checkpoint))
    worker.start()
    sampling = Sampling(seed=1, temperature=1.0, grammar=Grammar("regex", source, compiled))
    tokens = [30, 31, 32]
    drawn = [worker.step(first_step(tokens, sampling)).sampled[0].token_id]
    while drawn[-1] not in tokenizer.eos_ids:
        row = Row(0, len(tokens) + len(drawn) - 1, 1, True, [])
        drawn.append(worker.step(StepPlan(8, [], [], [row])).sampled[0].token_id)
    text = tokenizer.decode(drawn)
    assert text[4:] in ("-jan", "-feb") and text[:4].isdigit()
    worker.close()


@pytest.mark.parametrize("wanted", [True, False])
def test_a_worker_that_is_to_prepare_grammars_has_done_so_once_it_is_ready(checkpoint, monkeypatch, wanted):
    loads = []
    monkeypatch.setattr("shoal.engine.worker._tokenizer_info", lambda path, spec: loads.append(path))
    worker = Worker(config(checkpoint, prepare_grammars=wanted))
    worker.start()
    assert len(loads) == wanted
    worker.close()


@pytest.mark.parametrize(
    ("changes", "stored", "ops"),
    [
        ({"quantize": "fp8", "ops": "auto"}, "fp8", "torch"),
        ({"quantize": "int4"}, "int4", "torch"),
        ({"quantize": "int8", "ops": "auto"}, "int8", "native"),
        ({"dtype": "int8", "ops": "auto"}, "int8", "native"),
        ({"quantize": "int8"}, "int8", "torch"),
    ],
)
def test_what_is_quantised_at_load_and_by_which_arithmetic(checkpoint, changes, stored, ops):
    if ops == "native" and unavailable_reason() is not None:
        pytest.skip(unavailable_reason())
    plain = Worker(config(checkpoint))
    bytes_before = plain.start().weight_bytes
    worker = Worker(config(checkpoint, **changes))
    info = worker.start()
    assert (info.dtype, info.ops) == (stored, ops)
    assert info.weight_bytes < bytes_before
    result = worker.step(first_step([9, 8, 7, 6, 5]))
    assert isinstance(result, StepResult) and 0 <= result.sampled[0].token_id < VOCAB
    plain.close()
    worker.close()


def test_a_quantised_checkpoint_is_served_and_not_quantised_again(checkpoint, tmp_path):
    quantised, _ = make_twins(Path(checkpoint), tmp_path, "awq")
    worker = Worker(config(str(quantised)))
    assert worker.start().dtype == "int4"
    worker.close()
    with pytest.raises(ValueError, match=r"quantised already \(int4, awq\): leave out quantize"):
        Worker(config(str(quantised), quantize="int8")).start()
