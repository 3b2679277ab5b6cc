"""Weights from nowhere: a configuration alone is enough for an engine, and a rank's slices are slices of the whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from shoal.checkpoint.resolve import load_spec
from shoal.core.config import EngineConfig
from shoal.core.sharding import Span
from shoal.core.types import Row, Sampling, SlotAssignment, StepPlan, StepResult
from shoal.engine.random_weights import DEVIATION, RandomWeights
from shoal.engine.worker import Worker
from tests.checkpoints import make_checkpoint


def configuration(family: str, tmp_path: Path) -> Path:
    """A directory with config.json and nothing else."""
    path = tmp_path / "config-only"
    path.mkdir()
    shutil.copy(make_checkpoint(family, tmp_path / "whole") / "config.json", path)
    return path


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe", "deepseek_v3"])
def test_an_engine_starts_on_a_configuration_alone(family: str, tmp_path: Path) -> None:
    path = configuration(family, tmp_path)
    before = torch.get_num_threads()
    tokens = []
    for _ in range(2):
        worker = Worker(
            EngineConfig(
                model=str(path), load_format="random", device="cpu", ops="torch", kv_cache_bytes=1 << 20, max_len=64
            )
        )
        info = worker.start()
        assert info.weight_bytes == pytest.approx(4 * info.spec.num_parameters(), rel=0.05)
        assignment = SlotAssignment(0, "r", 0, [5, 6, 7], 3, [0], Sampling(temperature=0.0), 0, [])
        result = worker.step(StepPlan(1, [], [assignment], [Row(0, 0, 3, True, [])]))
        assert isinstance(result, StepResult), result
        tokens.append(result.sampled[0].token_id)
        worker.close()
    torch.set_num_threads(before)
    assert tokens[0] == tokens[1]


def test_slices_are_of_the_whole(tmp_path: Path) -> None:
    path = configuration("llama", tmp_path)
    source = RandomWeights(path, load_spec(path), torch.device("cpu"), torch.bfloat16)
    name = "model.layers.0.mlp.gate_proj.weight"
    whole = source.tensor(name)
    assert whole.shape == source.shape(name) and whole.dtype == torch.bfloat16
    assert torch.equal(source.tensor(name, Span(32, 64), Span(8, 16)), whole[32:64, 8:16])
    assert not torch.equal(whole, source.tensor("model.layers.1.mlp.gate_proj.weight"))
    assert float(whole.float().std()) == pytest.approx(DEVIATION, rel=0.1)
    norm = source.tensor("model.norm.weight")
    assert norm.dtype == torch.float32 and float(norm.mean()) == pytest.approx(1.0, abs=0.02)


def test_a_checkpoint_is_wanted_unless_it_is_said_otherwise(tmp_path: Path) -> None:
    worker = Worker(EngineConfig(model=str(configuration("llama", tmp_path)), device="cpu"))
    with pytest.raises(Exception, match="holds neither"):
        worker.start()
