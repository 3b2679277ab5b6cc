"""Mock shoal engines: what the executor draws and when, and the process behind the engine's own front."""

import asyncio
import time

from gateway.mock_engine import MockExecutor, use_mock_engines
from gateway.timing import Law
from gateway.tokens import vocabulary
from shoal.checkpoint.builtin import pull
from shoal.core.config import EngineConfig
from shoal.core.types import Request, Row, Sampling, SlotAssignment, StepPlan
from shoal.serve.engine_client import EngineClient


def plan(number, rows, assigned=()):
    return StepPlan(number, released=[], assigned=list(assigned), rows=rows)


def assignment(slot, tokens):
    return SlotAssignment(slot, "r", 0, tokens, len(tokens), [0], Sampling(), 0, [])


def test_a_mock_step_takes_its_time_and_goes_on_after_a_preemption(monkeypatch):
    words = vocabulary("")
    monkeypatch.setattr("gateway.mock_engine.vocabulary", lambda model: words)
    executor = MockExecutor(EngineConfig(model="any"), Law(itl=0.02, prefill_rate=1000.0))
    expected = words.continuation([5, 6, 7], 3)
    began = time.monotonic()
    executor.submit(plan(0, [Row(1, 0, 3, True, [])], [assignment(1, [5, 6, 7])]))
    executor.submit(plan(1, [Row(1, 3, 1, True, [])]))
    assert executor.poll(0.0) is None
    results = [executor.poll(), executor.poll()]
    assert time.monotonic() - began >= 2 * 0.02 + 3 / 1000
    executor.submit(plan(2, [Row(0, 0, 5, True, [])], [assignment(0, [5, 6, 7, *expected[:2]])]))
    results.append(executor.poll())
    assert [sampled.token_id for result in results for sampled in result.sampled] == expected
    assert executor.poll() is None


def test_a_mock_engine_is_an_engine_to_its_front(monkeypatch):
    model = str(pull("smollm2-135m"))
    words = vocabulary(model)
    monkeypatch.setattr(asyncio, "create_subprocess_exec", asyncio.create_subprocess_exec)
    use_mock_engines(Law(itl=0.001))

    async def run(resume):
        client = await EngineClient.start(EngineConfig(model=model))
        try:
            request = Request(id="r", prompt=[5, 6, 7], max_tokens=20, resume=resume)
            outputs = [output async for output in client.generate(request)]
            return client.info.device, [token for output in outputs for token in output.token_ids]
        finally:
            await client.stop()

    expected = words.continuation([5, 6, 7], 20)
    assert asyncio.run(run(None)) == ("mock", expected)
    device, tokens = asyncio.run(run({0: expected[:8]}))
    assert (device, tokens[-12:]) == ("mock", expected[8:])
