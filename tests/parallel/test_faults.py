"""Ranks that die or hang while they compute: what ran ends with an error, what waits goes on, nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from shoal.core.config import EngineConfig, LaunchConfig
from shoal.core.layout import Layout
from shoal.core.types import Output, Request, Sampling
from shoal.serve.engine_client import EngineClient, EngineStartError
from tests.checkpoints import make_checkpoint
from tests.serve.running import ENDLESS, LONG_CONTEXT, PATIENCE, ROOM, alive, until, wait_until


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("checkpoint"), max_position_embeddings=LONG_CONTEXT)


def config_of(checkpoint: Path, layout: Layout, **changes: object) -> EngineConfig:
    values = {"max_sequences": 1, "max_batch_tokens": 16, "threads": 1, "launch": LAUNCH} | ROOM
    return EngineConfig(model=str(checkpoint), layout=layout, **(values | changes))  # type: ignore[arg-type]


LAUNCH = LaunchConfig(silence_seconds=5.0)
"""Longer than a machine stands still by chance: only what is stopped or dead may be taken for lost."""


def request(name: str, prompt_len: int = 5, max_tokens: int = 8) -> Request:
    prompt = [7 + i % 400 for i in range(prompt_len)]
    return Request(id=name, prompt=prompt, max_tokens=max_tokens, sampling=Sampling(temperature=0.0))


def rank_processes(engine_pid: int) -> list[int]:
    """Of an engine, in the order of their ranks: they are started in it."""
    children = Path(f"/proc/{engine_pid}/task/{engine_pid}/children").read_text().split()
    return [int(pid) for pid in children if b"rank_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def with_engine(config: EngineConfig, body: Callable[[EngineClient], Awaitable[None]]) -> None:
    async def run() -> None:
        client = await EngineClient.start(config)
        try:
            await body(client)
        finally:
            await client.stop()

    asyncio.run(run())


async def outputs_of(client: EngineClient, wanted: Request) -> list[Output]:
    return [output async for output in client.generate(wanted)]


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


TP2, PP2 = Layout(tp=2), Layout(pp=2)


@pytest.mark.parametrize(
    ("layout", "phase", "rank", "number"),
    [
        # Every rank, phase and signal, and every pair of them with each layout.
        (TP2, "prefill", 0, signal.SIGKILL),
        (TP2, "prefill", 1, signal.SIGSTOP),
        (TP2, "decode", 0, signal.SIGSTOP),
        (TP2, "decode", 1, signal.SIGKILL),
        (PP2, "prefill", 0, signal.SIGSTOP),
        (PP2, "prefill", 1, signal.SIGKILL),
        (PP2, "decode", 0, signal.SIGKILL),
        (PP2, "decode", 1, signal.SIGSTOP),
    ],
)
def test_a_lost_rank_ends_what_runs_and_what_waits_goes_on(
    checkpoint: Path, layout: Layout, phase: str, rank: int, number: signal.Signals
) -> None:
    # Thousands of steps, of chunks of the prompt or of tokens: it runs until the fault.
    long = request("runs", ENDLESS, 8) if phase == "prefill" else request("runs", 5, ENDLESS)
    before: list[int] = []

    async def body(client: EngineClient) -> None:
        expected = tokens(await outputs_of(client, request("first")))
        before.extend(rank_processes(client.pid))
        assert len(before) == 2
        running = asyncio.create_task(outputs_of(client, long))
        await until(lambda: client.load is not None and client.load.num_running == 1, "it to run")
        waiting = asyncio.create_task(outputs_of(client, request("waits")))
        await until(lambda: client.load is not None and client.load.num_waiting == 1, "the other one to wait")
        assert not running.done(), "the control: it runs until the fault"
        os.kill(before[rank], number)
        async with asyncio.timeout(PATIENCE):
            ended = (await running)[-1]
        assert ended.finish == "lost" and f"rank {rank}" in (ended.error or ""), ended
        assert tokens(await waiting) == expected
        after = rank_processes(client.pid)
        assert len(after) == 2 and not set(after) & set(before)
        assert client.load is not None and client.load.failures == 1

    with_engine(config_of(checkpoint, layout), body)
    wait_until(lambda: not any(map(alive, before)), "the ranks to be gone")


def test_a_rank_that_dies_while_nothing_runs_is_replaced_before_it_is_missed(checkpoint: Path) -> None:
    async def body(client: EngineClient) -> None:
        expected = tokens(await outputs_of(client, request("first")))
        before = rank_processes(client.pid)
        os.kill(before[1], signal.SIGKILL)
        await until(lambda: len(set(rank_processes(client.pid)) - set(before[1:])) == 2, "another in its place")
        outputs = await outputs_of(client, request("second"))
        assert tokens(outputs) == expected and outputs[-1].finish == "length"

    with_engine(config_of(checkpoint, Layout(tp=2)), body)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_no_rank_outlives_its_driver(checkpoint: Path, number: signal.Signals) -> None:
    ranks: list[int] = []

    async def run() -> None:
        client = await EngineClient.start(config_of(checkpoint, Layout(tp=2)))
        ranks.extend(rank_processes(client.pid))
        assert len(ranks) == 2 and all(map(alive, ranks))
        os.kill(ranks[0], number)  # whatever state they are in
        os.kill(client.pid, signal.SIGKILL)
        await client.stop()
        assert not list(Path("/dev/shm").glob(f"shoal-{client.pid}-*")), "memory that nobody would give back"

    asyncio.run(run())
    wait_until(lambda: not any(map(alive, ranks)), "the ranks to be gone")


def test_two_engines_on_one_host_do_not_meet(checkpoint: Path) -> None:
    async def run() -> None:
        config = config_of(checkpoint, Layout(tp=2))
        first, second = await asyncio.gather(EngineClient.start(config), EngineClient.start(config))
        try:
            answers = await asyncio.gather(*(outputs_of(client, request("r")) for client in (first, second)))
            assert tokens(answers[0]) == tokens(answers[1]) and len(tokens(answers[0])) == 8
        finally:
            await asyncio.gather(first.stop(), second.stop())

    asyncio.run(run())


def test_what_a_rank_cannot_load_is_said_and_nothing_stays(checkpoint: Path, tmp_path: Path) -> None:
    broken = make_checkpoint("llama", tmp_path)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    async def run() -> None:
        with pytest.raises(EngineStartError, match="model.safetensors"):
            await EngineClient.start(config_of(broken, Layout(tp=2)))

    asyncio.run(run())
