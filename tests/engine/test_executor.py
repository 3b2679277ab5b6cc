"""The executor: results in order, on the caller's thread at depth 1, beside the caller at depth 2."""

import threading

import pytest
import torch

from shoal.core.config import EngineConfig, SchedulerConfig
from shoal.core.engine_core import EngineCore
from shoal.core.types import Request, Sampling, StepPlan, StepResult, WorkerFailure
from shoal.engine.in_process import InProcExecutor
from tests.checkpoints import make_checkpoint


class SlowWorker:
    """Steps that wait until the test lets them go on, and that say on which thread they ran."""

    def __init__(self):
        self.gate = threading.Semaphore(0)
        self.threads = []
        self.closed = 0

    def start(self, progress):
        return "info"

    def step(self, plan):
        self.gate.acquire()
        self.threads.append(threading.current_thread())
        if plan.plan_id == 13:
            return WorkerFailure(13, "unlucky")
        return StepResult(plan.plan_id, [])

    def close(self):
        self.closed += 1


@pytest.fixture
def slow(monkeypatch):
    worker = SlowWorker()
    monkeypatch.setattr("shoal.engine.in_process.Worker", lambda config: worker)
    return worker


def plan(number):
    return StepPlan(number, [], [], [])


def test_depth_1_runs_on_the_callers_thread(slow):
    executor = InProcExecutor(EngineConfig(model="m", depth=1))
    assert executor.start() == "info"
    assert executor.poll() is None, "nothing was submitted"
    executor.submit(plan(1))
    slow.gate.release()
    assert executor.poll().plan_id == 1
    assert slow.threads == [threading.current_thread()]
    executor.stop()


def test_depth_2_runs_beside_the_caller(slow):
    executor = InProcExecutor(EngineConfig(model="m", depth=2))
    executor.start()
    executor.submit(plan(1))
    executor.submit(plan(13))
    assert executor.poll(timeout=0.01) is None, "the first step has not been let go"
    slow.gate.release(2)
    assert executor.poll().plan_id == 1
    assert executor.poll() == WorkerFailure(13, "unlucky"), "a failure comes where its result would"
    assert executor.poll() is None, "nothing is left, so there is nothing to wait for"
    assert threading.current_thread() not in slow.threads and len(set(slow.threads)) == 1
    executor.stop()
    executor.stop()
    assert not slow.threads[0].is_alive() and slow.closed == 2


def test_stop_with_steps_under_way_leaves_no_thread(slow):
    executor = InProcExecutor(EngineConfig(model="m", depth=2))
    executor.start()
    executor.submit(plan(1))
    slow.gate.release()
    executor.stop()
    assert not any(thread.name == "shoal-worker" for thread in threading.enumerate())
    assert executor.poll() is None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(make_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3")))


@pytest.mark.parametrize("ops", ["torch", "native"])
def test_a_live_engine_gives_the_same_tokens_at_any_depth(checkpoint, ops):
    """EngineCore over an executor as a driver runs it: greedy and random sequences, in chunks, with penalties."""
    threads = torch.get_num_threads()
    outputs = []
    for depth, max_batch_tokens in ((1, 64), (2, 64), (3, 16)):
        config = EngineConfig(
            model=checkpoint, device="cpu", ops=ops, depth=depth, kv_cache_bytes=10**6, max_len=128, max_sequences=6
        )
        try:
            outputs.append(run_engine(config, max_batch_tokens))
        except ValueError as error:
            if ops == "native" and "not available" in str(error):
                pytest.skip(str(error))
            raise
        finally:
            torch.set_num_threads(threads)
    assert outputs[0] == outputs[1] == outputs[2]
    assert all(len(tokens) == 20 for tokens in outputs[0].values())
    assert len({tuple(tokens) for tokens in outputs[0].values()}) == len(outputs[0]), "each sequence is its own"


def run_engine(config, max_batch_tokens):
    executor = InProcExecutor(config)
    info = executor.start()
    core = EngineCore(
        SchedulerConfig(
            num_blocks=info.num_blocks,
            max_len=info.max_len,
            vocab_size=info.spec.vocab_size,
            max_sequences=config.max_sequences,
            max_batch_tokens=max_batch_tokens,
            depth=config.depth,
        )
    )
    settings = [
        Sampling(temperature=0.0),
        Sampling(seed=3),
        Sampling(seed=4, temperature=0.8, top_p=0.9, top_k=40),
        Sampling(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.2),
    ]
    for number, sampling in enumerate(settings):
        prompt = [(number * 31 + i * 17) % 400 + 8 for i in range(10 + 25 * number)]
        n = 2 if sampling.seed == 3 else 1
        assert core.add(Request(id=str(number), prompt=prompt, max_tokens=20, sampling=sampling, n=n), 0.0) is None
    tokens = {}
    while core.has_work():
        while (step := core.plan(0.0)) is not None:
            executor.submit(step)
        result = executor.poll()
        assert isinstance(result, StepResult), result
        for output in core.commit(result.plan_id, result, 0.0):
            assert output.error is None
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    executor.stop()
    return tokens
