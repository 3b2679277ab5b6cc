"""Ranks on a Ray cluster: the tokens of one rank, what is lost is placed anew, and nothing is left behind."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.core.config import EngineConfig, LaunchConfig
from shoal.core.layout import Layout
from shoal.core.types import WorkerFailure
from shoal.engine.executor import open_executor
from shoal.engine.parallel_executor import ParallelExecutor
from shoal.engine.rendezvous import LaunchError
from tests.checkpoints import VOCAB, make_checkpoint
from tests.parallel.engines import first_plan, requests, run_layout
from tests.serve.running import alive, wait_until

CPUS = 4
SILENCE = 30.0
"""Seconds: no rank hangs here, and none may be taken for lost because the machine is busy."""
WORK = requests(VOCAB, count=4, max_tokens=16)
LAUNCH = LaunchConfig(launcher="ray", silence_seconds=SILENCE)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster of this test's own, on loopback."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_AUTH_MODE", "disabled")
        yield from _cluster()


def _cluster() -> Iterator[Any]:
    module = pytest.importorskip("ray", reason="Ray is an extra")
    module.init(
        address="local",
        num_cpus=CPUS,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=80 << 20,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
    )
    yield module
    module.shutdown()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def test_tensor_and_pipeline_parallel(ray: Any, checkpoint: Path) -> None:
    expected = run_layout(checkpoint, Layout(), WORK)
    assert run_layout(checkpoint, Layout(tp=2, pp=2), WORK, launch=LAUNCH) == expected


def test_expert_parallel(ray: Any, tmp_path: Path) -> None:
    path = make_checkpoint("qwen3_moe", tmp_path)
    assert run_layout(path, Layout(ep=2), WORK, launch=LAUNCH) == run_layout(path, Layout(), WORK)


def start(checkpoint: Path, layout: Layout, **launch: Any) -> ParallelExecutor:
    config = EngineConfig(
        model=str(checkpoint),
        layout=layout,
        kv_cache_bytes=16 << 20,
        max_len=512,
        launch=LaunchConfig(launcher="ray", silence_seconds=SILENCE, **launch),
    )
    executor = open_executor(config)
    assert isinstance(executor, ParallelExecutor)
    return executor


def kill_process(ray: Any, executor: ParallelExecutor) -> None:
    os.kill(executor._members[1].pid, signal.SIGKILL)


def kill_actor(ray: Any, executor: ParallelExecutor) -> None:
    ray.kill(executor._launcher._actors[1], no_restart=True)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kill", [kill_process, kill_actor])
def test_what_is_lost_is_noticed_and_placed_anew(
    ray: Any, checkpoint: Path, kill: Callable[[Any, ParallelExecutor], None]
) -> None:
    executor = start(checkpoint, Layout(tp=2))
    try:
        executor.start()
        pids = [member.pid for member in executor._members]
        executor.submit(first_plan(1))
        assert not isinstance(executor.poll(60), WorkerFailure | None), "the control: it ran before"
        kill(ray, executor)
        for number in itertools.count(2):  # an actor's death takes its time
            executor.submit(first_plan(number))
            result = executor.poll(60)
            if isinstance(result, WorkerFailure):
                break
        assert "rank" in result.message
    finally:
        executor.stop()
    wait_until(lambda: not any(map(alive, pids)), "the ranks to be gone")
    again = start(checkpoint, Layout(tp=2))
    try:
        again.start()
        assert not {member.pid for member in again._members} & set(pids)
        again.submit(first_plan(1))
        assert not isinstance(again.poll(60), WorkerFailure | None)
    finally:
        again.stop()


def test_nothing_is_left_in_the_cluster(ray: Any, checkpoint: Path) -> None:
    executor = start(checkpoint, Layout(tp=2))
    executor.start()
    pids = [member.pid for member in executor._members]
    assert ray.available_resources().get("CPU", 0) <= CPUS - 2, "the control: they were reserved"
    executor.stop()
    wait_until(lambda: ray.available_resources().get("CPU") == CPUS, "the reservations to be gone")
    wait_until(lambda: not any(map(alive, pids)), "the ranks to be gone")


def test_ranks_that_cannot_be_placed_are_an_error_that_says_what_there_is(ray: Any, checkpoint: Path) -> None:
    executor = start(checkpoint, Layout(tp=2, pp=3), join_seconds=1.0)
    with pytest.raises(LaunchError, match=r"3 groups of 2 on one node each, with 1 CPU a rank; .* free of 4"):
        executor.start()
    wait_until(lambda: ray.available_resources().get("CPU") == CPUS, "the reservations to be gone")


def test_without_ray_it_says_how_to_get_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LaunchError, match=r"pip install 'shoal\[ray\]'"):
        start(checkpoint, Layout(tp=2))
