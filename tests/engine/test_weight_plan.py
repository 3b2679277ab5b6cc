"""What a decoder will ask for is known before it asks, for every family and every shard."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shoal.checkpoint.errors import CheckpointError
from shoal.checkpoint.resolve import load_spec
from shoal.core.layout import Layout
from shoal.core.sharding import Shard, shard_of, whole
from shoal.engine.attention.portable import PortableAttention
from shoal.engine.checkpoint_shapes import expected_shapes
from shoal.engine.comm.base import NullComm
from shoal.engine.model import Decoder
from shoal.engine.ops import TorchOps
from shoal.engine.read_ahead import Extent
from shoal.engine.weights import Part, SafetensorsWeights
from tests.checkpoints import make_checkpoint

CPU = torch.device("cpu")


class Noting(SafetensorsWeights):
    """Which extents are asked for, and which parts are made of bytes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.planned: list[Part] = []
        self.decodes: list[Part] = []

    def extent(self, part: Part) -> Extent:
        self.planned.append(part)
        return super().extent(part)

    def decoded(self, part: Part, data: torch.Tensor) -> torch.Tensor:
        self.decodes.append(part)
        return super().decoded(part, data)


class OneOf(NullComm):
    """Of a group of several, as far as loading goes."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def load(path: Path, shard: Shard, tensor: NullComm | None = None) -> tuple[Decoder, Noting]:
    spec, source = load_spec(path), Noting(path)
    decoder = Decoder(
        spec, TorchOps(CPU), PortableAttention(), "float32", device=CPU, shard=shard, tensor=tensor or NullComm()
    )
    decoder.load(source)
    source.close()
    return decoder, source


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "mixtral", "deepseek_v3", "deepseek_v3_plain"])
def test_everything_is_planned_once_and_taken_as_planned(family: str, tmp_path: Path) -> None:
    path = make_checkpoint(family, tmp_path)
    decoder, source = load(path, whole(load_spec(path)))
    assert source.planned == source.decodes
    assert sorted(part.name for part in source.planned) == sorted(expected_shapes(decoder.spec))
    assert all(part.rows is None and part.columns is None for part in source.planned)
    assert decoder.num_weight_bytes == 4 * decoder.spec.num_parameters()


def test_a_rank_reads_its_rows_and_whole_rows_of_what_is_cut_by_columns(tmp_path: Path) -> None:
    path = make_checkpoint("llama2", tmp_path)  # 4 heads of 16 over 64, 96 features, a vocabulary of 512
    spec = load_spec(path)
    sizes = []
    for rank in (0, 1):
        shard = shard_of(spec, Layout(tp=2), rank)
        assert 0 < len(shard.mlp) < 96, "it is cut"
        _, source = load(path, shard, OneOf(rank, 2))
        assert source.planned == source.decodes
        lengths = {part.name: SafetensorsWeights.extent(source, part).length for part in source.planned}
        layer = "model.layers.1."
        assert lengths[layer + "self_attn.q_proj.weight"] == 4 * 32 * 64
        assert lengths[layer + "mlp.up_proj.weight"] == 4 * len(shard.mlp) * 64
        assert lengths[layer + "self_attn.o_proj.weight"] == 4 * 64 * 64
        assert lengths[layer + "mlp.down_proj.weight"] == 4 * 64 * 96
        sizes.append(sum(lengths.values()))
    assert sum(sizes) < 1.5 * 4 * spec.num_parameters()


def test_a_file_cut_while_it_is_loaded_is_named(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path)
    weights = path / "model.safetensors"
    source = SafetensorsWeights(path)
    weights.write_bytes(weights.read_bytes()[:-100_000])  # the same file, opened already
    spec = load_spec(path)
    decoder = Decoder(spec, TorchOps(CPU), PortableAttention(), "float32", device=CPU)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is truncated"):
        decoder.load(source)
    source.close()


def test_planning_brings_no_heavy_module(tmp_path: Path) -> None:
    """In a fresh interpreter: some operations of torch on tensors without data import its compiler, for a second."""
    path = make_checkpoint("qwen2", tmp_path)
    program = (
        "import sys\n"
        "from shoal.core.config import EngineConfig\n"
        "from shoal.engine.worker import Worker\n"
        "before = set(sys.modules)\n"
        f"Worker(EngineConfig(model={str(path)!r}, ops='torch', device='cpu', kv_cache_bytes=1 << 20)).load()\n"
        "print(len(set(sys.modules) - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100
