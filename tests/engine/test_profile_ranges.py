"""Ranges around the parts of a step: they change nothing, do not nest, and are gone afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shoal.core.config import EngineConfig
from shoal.core.layout import Layout
from shoal.core.types import Row, Sampling, SlotAssignment, StepPlan, StepResult
from shoal.engine.profile_ranges import PREFIX, STEP
from shoal.engine.profiling import ProfiledExecutor
from tests.checkpoints import make_checkpoint

PARTS = {"linear", "attention", "cache", "norms", "embedding", "head", "sampling"}


@pytest.fixture(autouse=True)
def same_torch_threads() -> Iterator[None]:
    """A worker sets torch's threads for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def prompt_plan(plan_id: int = 1) -> StepPlan:
    tokens = list(range(3, 23))
    assignment = SlotAssignment(0, "r", 0, tokens, len(tokens), [0, 1], Sampling(temperature=0.0), 0, [])
    return StepPlan(plan_id, [], [assignment], [Row(0, 0, len(tokens), True, [])])


def run(executor: ProfiledExecutor, plan: StepPlan) -> int:
    executor.submit(plan)
    result = executor.poll()
    assert isinstance(result, StepResult), result
    return result.sampled[0].token_id


@pytest.mark.parametrize("ops", ["torch", "native"])
@pytest.mark.parametrize(
    ("family", "more"), [("llama", {"rope"}), ("qwen3_moe", {"rope", "experts"}), ("deepseek_v3", {"experts"})]
)
def test_every_part_has_a_range(family: str, more: set[str], ops: str, tmp_path: Path) -> None:
    if ops == "native" and family == "deepseek_v3":
        pytest.skip("there are no native kernels for latent attention")
    path = make_checkpoint(family, tmp_path / "model")
    executor = ProfiledExecutor(
        EngineConfig(model=str(path), device="cpu", ops=ops, kv_cache_bytes=1 << 20, max_len=64, max_sequences=2)
    )
    try:
        executor.start()
        before = run(executor, prompt_plan())
        decoder = executor._worker.decoder
        assert decoder is not None
        attributes = {name: dict(vars(part)) for name, part in (("ops", decoder.ops), ("attention", decoder.attention))}
        with executor.traced(tmp_path / "trace.json"):
            traced = run(executor, prompt_plan(2))
        assert traced == before == run(executor, prompt_plan(3))
        for name, part in (("ops", decoder.ops), ("attention", decoder.attention)):
            assert vars(part).keys() == attributes[name].keys(), "what was wrapped is as it was"
    finally:
        executor.stop()
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    ranges = [event for event in events if event.get("ph") == "X" and event["name"].startswith(PREFIX)]
    (step,) = [event for event in ranges if event["name"] == STEP]
    parts = sorted((event for event in ranges if event is not step), key=lambda event: event["ts"])
    assert {event["name"].removeprefix(PREFIX) for event in parts} == PARTS | more
    ends = [event["ts"] + event["dur"] for event in parts]
    assert all(event["ts"] >= end for event, end in zip(parts[1:], ends, strict=False)), "ranges do not nest"
    assert step["ts"] <= parts[0]["ts"] and ends[-1] <= step["ts"] + step["dur"]


def test_ranges_are_gone_after_an_error(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path / "model")
    executor = ProfiledExecutor(EngineConfig(model=str(path), device="cpu", kv_cache_bytes=1 << 20, max_len=64))
    with pytest.raises(RuntimeError, match="nothing to profile"), executor.traced(tmp_path / "trace.json"):
        pass
    executor.start()
    worker = executor._worker
    assert worker.decoder is not None
    with pytest.raises(ValueError, match="of the test"), worker.in_ranges():
        assert "linear" in vars(worker.decoder.ops)
        raise ValueError("of the test")
    assert "linear" not in vars(worker.decoder.ops)
    executor.stop()


def test_a_profile_is_of_one_rank() -> None:
    with pytest.raises(ValueError, match="one rank"):
        ProfiledExecutor(EngineConfig(model="any", layout=Layout(tp=2)))
