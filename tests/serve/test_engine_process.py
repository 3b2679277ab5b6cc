"""The engine process and its client: outputs, aborts, a worker that fails, recordings, and no process left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from shoal.core.config import EngineConfig
from shoal.core.replay import decode_all, replay
from shoal.core.types import Output, Request, Sampling, StepPlan, StepResult, WorkerFailure
from shoal.engine.executor import Progress, WorkerInfo
from shoal.engine.in_process import InProcExecutor
from shoal.serve.engine_client import EngineClient, EngineLost, RequestRejected
from shoal.serve.engine_process import EngineLoop, WorkerLost
from shoal.serve.messages import Add, Started, Step, Stop, encode, from_engine
from tests.serve.running import PATIENCE, alive, running, state_of, until, wait_until

GREEDY = Sampling(temperature=0.0)


def config_of(checkpoint: Path, **changes: Any) -> EngineConfig:
    return EngineConfig(
        model=str(checkpoint),
        **({"threads": 1, "max_sequences": 4, "check": True, "kv_cache_bytes": 8 << 20} | changes),
    )


def request(name: str, max_tokens: int = 8, **changes: Any) -> Request:
    fields = {"prompt": [5, 6, 7, 8], "sampling": GREEDY} | changes
    return Request(id=name, max_tokens=max_tokens, **fields)


async def tokens_of(client: EngineClient, wanted: Request) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in range(wanted.n)]
    async for output in client.generate(wanted):
        tokens[output.index] += output.token_ids
    return tokens


def with_client(config: EngineConfig, body: Callable[[EngineClient], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        client = await EngineClient.start(config, **options)
        try:
            await body(client)
        finally:
            await client.stop()
        assert not alive(client.pid)

    asyncio.run(run())


@pytest.mark.parametrize("depth", [1, 2])
def test_outputs_are_the_same_at_any_depth_and_a_recording_replays(
    checkpoint: Path, tmp_path: Path, depth: int, expected: list[int]
) -> None:
    recording = tmp_path / "run.jsonl"
    steps = []

    async def body(client: EngineClient) -> None:
        answers = await asyncio.gather(*(tokens_of(client, request(f"r{i}", n=2)) for i in range(6)))
        assert answers == [[expected, expected]] * 6
        assert client.num_streams == 0 and client.load is not None

    with_client(config_of(checkpoint, depth=depth), body, recording=str(recording), on_step=steps.append)
    assert sum(len(step.outputs) for step in steps) >= 6 * 2 * 8 and steps[-1].load.num_free_blocks > 0
    with recording.open("rb") as lines:
        replay(decode_all(lines))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[int]:
    """Tokens of `request` from an engine that does nothing else."""
    found: list[list[int]] = []

    async def body(client: EngineClient) -> None:
        found.extend(await tokens_of(client, request("alone")))

    with_client(config_of(checkpoint), body)
    assert len(found[0]) == 8
    return found[0]


def test_leaving_the_iterator_aborts_and_refusals_are_raised(checkpoint: Path) -> None:
    async def body(client: EngineClient) -> None:
        outputs = client.generate(request("long", max_tokens=8000))
        await anext(outputs)
        assert client.load is not None and client.load.num_running == 1
        await outputs.aclose()  # type: ignore[attr-defined]
        await until(lambda: client.load is not None and client.load.num_running == 0, "the engine to be idle")
        assert client.load.num_free_blocks == client.load.num_blocks and client.load.generated_tokens < 8000
        with pytest.raises(RequestRejected, match="token ids"):
            await tokens_of(client, request("bad", prompt=[99999]))

    with_client(config_of(checkpoint), body)


def test_every_stream_learns_that_the_engine_is_lost(checkpoint: Path) -> None:
    async def body(client: EngineClient) -> None:
        streams = [client.generate(request(f"r{i}", max_tokens=8000)) for i in range(3)]
        for stream in streams:
            await anext(stream)
        os.kill(client.pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineLost, match="status -9"):
                async for _ in stream:
                    pass
        with pytest.raises(EngineLost):
            await tokens_of(client, request("late"))

    with_client(config_of(checkpoint), body)


def test_a_stopped_engine_dies_with_its_parent_too(checkpoint: Path) -> None:
    """It cannot notice the end of its standard input while it is stopped: the kernel must end it."""
    with running(checkpoint) as server:
        os.kill(server.engine_pid, signal.SIGSTOP)
        wait_until(lambda: state_of(server.engine_pid) == "T", "the engine to stop")
        server.process.kill()
        server.process.wait()
        wait_until(lambda: not alive(server.engine_pid), "the engine to die with its parent")


def test_the_grammar_compiler_dies_with_its_parent(checkpoint: Path) -> None:
    with running(checkpoint) as server:
        body = {"prompt": "a", "max_tokens": 2, "guided_regex": "a+"}
        assert server.client.post("/v1/completions", json=body).status_code == 200
        children = children_of(server.process.pid)
        assert len(children) == 2 and all(map(alive, children)), "control: engine and compiler live"
        server.process.kill()
        server.process.wait()
        wait_until(lambda: not any(map(alive, children)), "both to die with their parent")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# --- a worker that fails --------------------------------------------------------------------------------------------


class FailingOnce(InProcExecutor):
    """The real executor, but the first of its kind loses its state at the third step."""

    made: list[FailingOnce]

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.config = config
        self.made.append(self)
        self._steps = 0

    def poll(self, timeout: float | None = None) -> StepResult | WorkerFailure | None:
        self._steps += 1
        if self is self.made[0] and self._steps == 3:
            plan: StepPlan = self._plans.popleft()
            return WorkerFailure(plan.plan_id, "the device fell off")
        return super().poll(timeout)


@pytest.fixture
def engine_socket(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[zmq.Socket[bytes]]:
    """The front's end of an EngineLoop that runs on a thread of this process."""
    monkeypatch.setattr(FailingOnce, "made", [], raising=False)
    monkeypatch.setattr("shoal.serve.engine_process.open_executor", FailingOnce)
    context = zmq.Context()
    front, back = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    front.bind("inproc://engine")
    back.connect("inproc://engine")
    thread = threading.Thread(
        target=lambda: EngineLoop(config_of(checkpoint, max_sequences=1, kv_cache_bytes=None), back, None).run()
    )
    thread.start()
    yield front
    front.send(encode(Stop()))
    thread.join(PATIENCE)
    assert not thread.is_alive()
    front.close(0)
    back.close(0)
    context.term()


def test_a_failed_step_ends_what_ran_and_what_waits_goes_on(
    engine_socket: zmq.Socket[bytes], expected: list[int]
) -> None:
    finals: dict[str, Output] = {}
    tokens: dict[str, list[int]] = {"runs": [], "waits": []}
    started = False
    while len(finals) < 2:
        assert engine_socket.poll(60_000), "the engine says nothing"
        message = from_engine.decode(engine_socket.recv())
        if isinstance(message, Started):
            started = True
            engine_socket.send(encode(Add(request("runs"))))
            engine_socket.send(encode(Add(request("waits"))))
        elif isinstance(message, Step):
            for output in message.outputs:
                tokens[output.request_id] += output.token_ids
                if output.finish is not None:
                    finals[output.request_id] = output
    assert started and len(FailingOnce.made) == 2
    assert finals["runs"].finish == "lost" and finals["runs"].error == "the device fell off"
    assert finals["waits"].finish == "length" and tokens["waits"] == expected
    first, second = FailingOnce.made
    assert first.config.kv_cache_bytes is None and second.config.kv_cache_bytes, "sized as the scheduler knows it"


def test_a_worker_that_cannot_be_replaced_ends_the_engine(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller cache than the scheduler reckons with would be written beyond its end."""

    class Smaller(FailingOnce):
        def start(self, progress: Progress | None = None) -> WorkerInfo:
            info = super().start(progress)
            return info if self is self.made[0] else msgspec.structs.replace(info, num_blocks=info.num_blocks - 1)

    monkeypatch.setattr(FailingOnce, "made", [], raising=False)
    monkeypatch.setattr("shoal.serve.engine_process.open_executor", Smaller)
    with zmq.Context() as context, context.socket(zmq.PAIR) as front, context.socket(zmq.PAIR) as back:
        front.bind("inproc://engine")
        back.connect("inproc://engine")
        loop = EngineLoop(config_of(checkpoint), back, None)
        front.send(encode(Add(request("runs"))))
        with pytest.raises(WorkerLost, match="KV blocks"):
            loop.run()
        ends = []
        while front.poll(0):
            message = from_engine.decode(front.recv())
            ends += [o.finish for o in message.outputs if o.finish] if isinstance(message, Step) else []
        assert ends == ["lost"], "the client was told before"
