"""The engine on a CUDA device against the same engine on the CPU. Run by `pytest -m gpu`, and where there is one.

What takes two devices is skipped where there is one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal.bench.profile.trace import read_profile
from shoal.core.config import EngineConfig, LaunchConfig
from shoal.core.layout import Layout
from shoal.core.types import Row, Sampling, SlotAssignment, StepPlan, StepResult
from shoal.engine.comm.base import Comm
from shoal.engine.comm.process_group import ProcessGroupComm
from shoal.engine.devices import CudaMemory
from shoal.engine.graphs import CudaCapturer
from shoal.engine.profiling import ProfiledExecutor
from shoal.engine.sizing import largest_step, measure
from shoal.engine.worker import Worker
from tests.checkpoints import VOCAB, make_checkpoint
from tests.engine.comm.ranks import Ranks, nccl
from tests.parallel.engines import requests, run_layout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]

two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two CUDA devices")

PROMPT = list(range(3, 60))


def executor_on(device: str, path: Path, dtype: str) -> ProfiledExecutor:
    executor = ProfiledExecutor(
        EngineConfig(model=str(path), device=device, dtype=dtype, kv_cache_bytes=1 << 22, max_len=128, max_sequences=4)
    )
    executor.start()
    return executor


def greedy(executor: ProfiledExecutor, count: int) -> list[int]:
    """A prompt in two chunks, then a token a step."""
    blocks = list(range(8))
    assignment = SlotAssignment(0, "r", 0, PROMPT, len(PROMPT), blocks, Sampling(temperature=0.0), 0, [])
    plans = [StepPlan(1, [], [assignment], [Row(0, 0, 30, False, [])])]
    plans += [StepPlan(2, [], [], [Row(0, 30, len(PROMPT) - 30, True, [])])]
    plans += [StepPlan(3 + n, [], [], [Row(0, len(PROMPT) + n, 1, True, [])]) for n in range(count - 1)]
    tokens = []
    for plan in plans:
        executor.submit(plan)
        result = executor.poll()
        assert isinstance(result, StepResult), result
        tokens += [drawn.token_id for drawn in result.sampled]
    return tokens


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "qwen3_moe", "deepseek_v3"])
def test_the_same_tokens_as_on_the_cpu(family: str, tmp_path: Path) -> None:
    path = make_checkpoint(family, tmp_path)
    on_cpu, on_gpu = executor_on("cpu", path, "float32"), executor_on("cuda", path, "float32")
    assert greedy(on_gpu, 40) == greedy(on_cpu, 40)
    on_cpu.stop()
    on_gpu.stop()


def test_bfloat16_draws_nearly_the_same(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path)
    on_cpu, on_gpu = executor_on("cpu", path, "float32"), executor_on("cuda", path, "bfloat16")
    # After a first token that differs all later ones may: only the beginning says something.
    assert greedy(on_gpu, 4)[0] == greedy(on_cpu, 4)[0]
    on_cpu.stop()
    on_gpu.stop()


def test_a_profile_is_of_kernels(tmp_path: Path) -> None:
    executor = executor_on("cuda", make_checkpoint("llama", tmp_path / "model"), "bfloat16")
    greedy(executor, 4)
    with executor.traced(tmp_path / "trace.json"):
        greedy(executor, 6)
    executor.stop()
    profile = read_profile(tmp_path / "trace.json")
    assert profile.on_device and profile.steps == 7
    assert {"linear", "attention", "norms", "head"} <= {part.name for part in profile.parts}
    busy = sum(part.seconds for part in profile.parts)
    assert busy > 0 and all(part.calls > 0 for part in profile.parts)


# --- graphs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3"])
def test_decodes_and_chunks_are_replayed(family: str, tmp_path: Path) -> None:
    """Twice over, so that the second time all of it is."""
    path = make_checkpoint(family, tmp_path)
    on_cpu, on_gpu = executor_on("cpu", path, "float32"), executor_on("cuda", path, "float32")
    expected = greedy(on_cpu, 20)
    book = on_gpu._worker.graphs
    assert book is not None, "the worker captures nothing"
    for _ in range(2):
        assert greedy(on_gpu, 20) == expected
    assert not book.refused
    assert {(size.rows, size.tokens) for size in book.captured} == {(1, None), (4, 64)}
    assert book.used_bytes <= book.limit_bytes
    on_cpu.stop()
    on_gpu.stop()


# --- memory ---------------------------------------------------------------------------------------------------------


def test_a_measured_peak_is_what_was_allocated() -> None:
    memory = CudaMemory(torch.device("cuda", 0))

    def step() -> None:
        first = torch.empty(64 << 20, dtype=torch.uint8, device="cuda:0")
        torch.empty(32 << 20, dtype=torch.uint8, device="cuda:0")
        del first

    free = memory.free()
    measured = measure(memory, step)
    assert measured.step == 96 << 20
    assert 0 < measured.free <= memory.total == torch.cuda.get_device_properties(0).total_memory
    assert measured.free >= free - (96 << 20), "what the step had was given back"


def test_the_largest_step_runs_beside_the_cache_that_was_sized_for_it(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path)
    config = EngineConfig(model=str(path), device="cuda", dtype="bfloat16", max_sequences=256, max_batch_tokens=2048)
    worker = Worker(config)
    info = worker.start()
    plan = largest_step(config, info.max_len)
    assert isinstance(worker.step(plan), StepResult)
    assert "measure" in [phase.name for phase in info.start.phases]
    worker.close()


# --- two devices ----------------------------------------------------------------------------------------------------


def summed(comm: Comm, lengths: list[int], dtype: torch.dtype) -> list[list[float]]:
    """Of each length: how far the sum is from that of all ranks' parts, at most, and a digest of its bits."""
    found = []
    for length in lengths:
        parts = [torch.randn(length, generator=torch.Generator().manual_seed(7 * r + length)) for r in range(comm.size)]
        x = parts[comm.rank].to(dtype).cuda()
        comm.all_reduce_(x)
        expected = sum(part.to(dtype).float() for part in parts)
        bits = x.view(torch.uint8).long().cpu()
        digest = (bits * torch.arange(1, len(bits) + 1)).sum()
        found.append([float((x.float().cpu() - expected).abs().max()), float(digest)])
    return found


def has_one_shot(comm: ProcessGroupComm) -> bool:
    return comm._small is not None


def replayed(comm: Comm, length: int) -> list[float]:
    """A sum in a graph, with other values each time."""
    device = torch.device("cuda", comm.rank)
    x, total = torch.zeros(length, device=device), torch.zeros(length, device=device)

    def run() -> torch.Tensor:
        return comm.all_reduce_(total.copy_(x))

    run()
    graph, result = CudaCapturer(device).capture(run)
    found = []
    for value in (1.0, 2.0, 5.0):
        x.fill_(value * (comm.rank + 1))
        graph.replay()
        assert result is not None
        found += [float(result.min()), float(result.max())]
    return found


@two_devices
@pytest.mark.parametrize("one_shot_bytes", [0, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_through_nccl_and_in_one_shot(one_shot_bytes: int | None, dtype: torch.dtype, tmp_path: Path) -> None:
    with Ranks(nccl(tmp_path / "store", 2, one_shot_bytes=one_shot_bytes), 2) as ranks:
        assert set(ranks.opened.values()) == {None}
        assert ranks.run(has_one_shot) == [one_shot_bytes is None] * 2
        lengths = [8, 4096, 5, 65_536, 262_144, 1 << 20, 4096]
        first, second = ranks.run(summed, lengths, dtype)
        assert first == second, "all ranks have the same bits"
        assert max(error for error, _ in first) < (0.1 if dtype == torch.bfloat16 else 1e-5)


@two_devices
@pytest.mark.parametrize("one_shot_bytes", [0, None])
def test_sums_are_captured(one_shot_bytes: int | None, tmp_path: Path) -> None:
    with Ranks(nccl(tmp_path / "store", 2, one_shot_bytes=one_shot_bytes), 2) as ranks:
        for length in (1024, 1 << 20):
            assert ranks.run(replayed, length) == [[3.0, 3.0, 6.0, 6.0, 15.0, 15.0]] * 2


@two_devices
@pytest.mark.parametrize("one_shot_bytes", [0, None])
@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_two_ranks_draw_the_tokens_of_one_on_the_cpu(device: str, one_shot_bytes: int | None, tmp_path: Path) -> None:
    path, work = make_checkpoint("llama", tmp_path), requests(VOCAB, 6, 24)
    # One rank alone may measure for long: kernels are compiled in it.
    launch = LaunchConfig(silence_seconds=30.0, collective_seconds=60.0, one_shot_bytes=one_shot_bytes)
    expected = run_layout(path, Layout(), work, device="cpu")
    assert run_layout(path, Layout(tp=2), work, device=device, launch=launch) == expected
