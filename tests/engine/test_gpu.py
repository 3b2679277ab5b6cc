"""The engine on a CUDA device against the same engine on the CPU. Run by `pytest -m gpu`, and where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal.bench.profile.trace import read_profile
from shoal.core.config import EngineConfig
from shoal.core.types import Row, Sampling, SlotAssignment, StepPlan, StepResult
from shoal.engine.profiling import ProfiledExecutor
from tests.checkpoints import make_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]

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
