"""Warm spares: ranks that were loaded before a fault take over, and others are started in their place."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from shoal.core.config import EngineConfig, LaunchConfig
from shoal.core.layout import Layout
from shoal.serve.engine_client import EngineClient, EngineStartError
from shoal.serve.warm_spares import require_possible_spares
from tests.checkpoints import make_checkpoint
from tests.parallel.test_faults import config_of, outputs_of, request, tokens, with_engine
from tests.serve.running import ENDLESS, LONG_CONTEXT, alive, until, wait_until


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("checkpoint"), max_position_embeddings=LONG_CONTEXT)


def rank_processes(engine_pid: int) -> list[int]:
    """Of all threads of an engine, oldest first."""
    pids = []
    for task in Path(f"/proc/{engine_pid}/task").iterdir():
        children = map(int, (task / "children").read_text().split())
        pids += [pid for pid in children if b"rank_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return sorted(pids)


@pytest.mark.parametrize("num_spares", [0, 1])
def test_a_spare_takes_over_and_another_is_started(checkpoint: Path, num_spares: int) -> None:
    """And without one, which is the control, ranks that were not there before."""
    seen: list[int] = []

    async def body(client: EngineClient) -> None:
        expected = tokens(await outputs_of(client, request("first")))
        await until(lambda: client.num_spares == num_spares, "the spare")
        before = rank_processes(client.pid)
        first, spare = before[:2], before[2:]
        assert len(spare) == 2 * num_spares
        running = asyncio.create_task(outputs_of(client, request("runs", 5, ENDLESS)))
        await until(lambda: client.load is not None and client.load.num_running == 1, "it to run")
        waiting = asyncio.create_task(outputs_of(client, request("waits")))
        await until(lambda: client.load is not None and client.load.num_waiting == 1, "the other one to wait")
        assert not running.done(), "the control: it runs until the fault"
        os.kill(first[1], signal.SIGKILL)
        assert (await running)[-1].finish == "lost"
        assert tokens(await waiting) == expected
        after = rank_processes(client.pid)
        seen.extend(before + after)
        assert not set(first) & set(after)
        if num_spares == 0:
            assert len(after) == 2 and not set(before) & set(after)
            return
        assert set(spare) <= set(after)
        await until(lambda: client.num_spares == 1 and len(rank_processes(client.pid)) == 4, "another spare")
        next_spare = set(rank_processes(client.pid)) - set(spare)
        seen.extend(next_spare)
        # What took over is watched and replaced as the first was.
        os.kill(spare[0], signal.SIGKILL)
        await until(lambda: client.load is not None and client.load.failures == 2, "the loss of a rank that idles")
        outputs = await outputs_of(client, request("after the second"))
        assert tokens(outputs) == expected, outputs
        assert next_spare <= set(rank_processes(client.pid))

    with_engine(config_of(checkpoint, Layout(tp=2), warm_spares=num_spares), body)
    wait_until(lambda: not any(map(alive, seen)), "the ranks to be gone")


def test_a_spare_that_dies_while_it_waits_is_replaced(checkpoint: Path) -> None:
    async def body(client: EngineClient) -> None:
        await until(lambda: client.num_spares == 1, "the spare")
        before = rank_processes(client.pid)
        os.kill(before[2], signal.SIGKILL)
        await until(lambda: client.num_spares == 0, "its loss")
        await until(lambda: client.num_spares == 1, "another spare")
        after = rank_processes(client.pid)
        assert len(after) == 4 and set(before) & set(after) == set(before[:2])
        assert client.load is not None and client.load.failures == 0
        assert len(tokens(await outputs_of(client, request("goes on")))) == 8

    with_engine(config_of(checkpoint, Layout(pp=2), warm_spares=1), body)


def test_an_engine_that_stops_while_a_spare_starts_leaves_nothing(checkpoint: Path) -> None:
    pids: list[int] = []

    async def body(client: EngineClient) -> None:
        await until(lambda: len(rank_processes(client.pid)) == 4, "the spare's ranks")
        pids.extend([client.pid, *rank_processes(client.pid)])
        assert any("/dev/shm/shoal-" in Path(f"/proc/{pid}/maps").read_text() for pid in pids), "the control"

    with_engine(config_of(checkpoint, Layout(tp=2), warm_spares=1), body)
    wait_until(lambda: not any(map(alive, pids)), "the ranks to be gone")
    assert not shared_files(pids[0])


def shared_files(engine_pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"shoal-{engine_pid}-*"))


def test_an_engine_of_one_rank_can_have_none(checkpoint: Path) -> None:
    async def run() -> None:
        with pytest.raises(EngineStartError, match="warm spares need ranks in processes of their own"):
            await EngineClient.start(config_of(checkpoint, Layout(), warm_spares=1))

    asyncio.run(run())


def test_ranks_that_others_start_can_have_none() -> None:
    env = LaunchConfig(launcher="env")
    with pytest.raises(ValueError, match="only the local launcher"):
        require_possible_spares(EngineConfig(model="m", layout=Layout(tp=2), launch=env, warm_spares=2))
    require_possible_spares(EngineConfig(model="m", layout=Layout(tp=2), launch=env))
    require_possible_spares(EngineConfig(model="m", layout=Layout(tp=2), warm_spares=2))
