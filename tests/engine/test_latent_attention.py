"""Latent attention against transformers' own module, its cache, and its heads over several ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.core.config import EngineConfig
from shoal.core.layout import Layout
from shoal.core.model_config import spec_from_config
from shoal.core.model_spec import ModelSpec
from shoal.core.sharding import shard_of
from shoal.core.types import Row, Sampling, SlotAssignment, StepPlan, StepResult
from shoal.engine.attention.base import AttentionBatch
from shoal.engine.attention.latent_cache import LatentCache
from shoal.engine.attention.native import NativeAttention
from shoal.engine.attention.portable import PortableAttention
from shoal.engine.comm.base import NullComm
from shoal.engine.context_parallel import TokenShares
from shoal.engine.latent_attention import LatentAttention
from shoal.engine.model import Decoder
from shoal.engine.native import unavailable_reason
from shoal.engine.native_ops import NativeOps
from shoal.engine.ops import TorchOps
from shoal.engine.rope import cos_sin_table
from shoal.engine.weight_reader import WeightReader
from shoal.engine.weights import open_weights
from shoal.engine.worker import Worker
from tests.checkpoints import make_checkpoint

CPU = torch.device("cpu")
LENGTH, BLOCK = 90, 16
TABLE = [7, 2, 9, 0, 5, 3]
"""Blocks of the one sequence, in no order."""


@pytest.fixture(scope="module", params=["deepseek_v3", "deepseek_v3_plain"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(params=["torch", "native"])
def ops(request: pytest.FixtureRequest) -> Any:
    if request.param == "torch":
        return TorchOps(CPU)
    if (reason := unavailable_reason()) is not None:
        pytest.skip(reason)
    return NativeOps(threads=2)


def spec_of(path: Path) -> ModelSpec:
    return spec_from_config(json.loads((path / "config.json").read_text()))


def load(
    path: Path, ops: Any, layout: Layout | None = None, rank: int = 0, dtype: torch.dtype = torch.float32
) -> LatentAttention:
    spec, source = spec_of(path), open_weights(path)
    assert spec.mla is not None
    reader = WeightReader(source, ops, "float32", device=CPU, dtype=dtype)
    shard = shard_of(spec, layout or Layout(), rank)
    table = cos_sin_table(spec.rope, spec.rope_dim, spec.max_len)
    attention = LatentAttention(reader, spec, spec.mla, 1, shard, PortableAttention(), table)
    source.close()
    return attention


def new_cache(path: Path, dtype: torch.dtype = torch.float32) -> LatentCache:
    mla = spec_of(path).mla
    assert mla is not None
    return LatentCache(2, 10, BLOCK, mla.kv_lora_rank, mla.qk_rope_head_dim, dtype, CPU)


def run(attention: LatentAttention, x_TH: Tensor, cache: LatentCache, sizes: list[int]) -> Tensor:
    """The tokens of one sequence in steps of `sizes`, in the cache's layer 1."""
    parts, start = [], 0
    for size in sizes:
        end = start + size
        at = torch.arange(start, end)
        batch = AttentionBatch.causal(
            query_starts_S1=torch.tensor([0, size], dtype=torch.int32),
            context_lens_S=torch.tensor([end], dtype=torch.int32),
            block_tables_SB=torch.tensor([TABLE], dtype=torch.int32),
            slot_mapping_T=(torch.tensor(TABLE)[at // BLOCK] * BLOCK + at % BLOCK).int(),
        )
        with torch.inference_mode():
            parts.append(attention.forward(x_TH[start:end], at, TokenShares(size, NullComm()), batch, cache, 1))
        start = end
    return torch.cat(parts)


def inputs() -> Tensor:
    return torch.randn(LENGTH, 64, generator=torch.Generator().manual_seed(4))


def reference_output(path: Path, x_TH: Tensor) -> Tensor:
    """transformers' module, which expands keys and values of every token."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    mask = torch.full((len(x_TH), len(x_TH)), float("-inf")).triu(1)[None, None]
    with torch.inference_mode():
        angles = model.model.rotary_emb(x_TH[None], torch.arange(len(x_TH))[None])
        return model.model.layers[1].self_attn(x_TH[None], position_embeddings=angles, attention_mask=mask)[0][0]


@pytest.mark.parametrize("sizes", [[LENGTH], [1, 40, 7, 41, 1], [16] * 5 + [10]], ids=str)
def test_equals_transformers_however_the_tokens_are_cut(checkpoint: Path, ops: Any, sizes: list[int]) -> None:
    x_TH = inputs()
    out_TH = run(load(checkpoint, ops), x_TH, new_cache(checkpoint), sizes)
    torch.testing.assert_close(out_TH, reference_output(checkpoint, x_TH), atol=1e-5, rtol=1e-5)


def test_the_cache_holds_one_latent_a_token_and_nothing_else(checkpoint: Path) -> None:
    spec, cache = spec_of(checkpoint), new_cache(checkpoint)
    run(load(checkpoint, TorchOps(CPU)), inputs(), cache, [LENGTH])
    assert (cache.num_blocks, cache.block_size) == (10, BLOCK)
    assert cache.nbytes == 10 * BLOCK * 2 * spec.kv_bytes_per_token(4) // spec.num_layers
    assert not cache.gather(0, torch.arange(10))[0].any()
    rows = cache.gather(1, torch.arange(10))[0].flatten(0, 2)
    used = {TABLE[at // BLOCK] * BLOCK + at % BLOCK for at in range(LENGTH)}
    assert {at for at, row in enumerate(rows) if row.any()} == used


def test_lower_precisions_stay_close(checkpoint: Path) -> None:
    x_TH, exact = inputs(), load(checkpoint, TorchOps(CPU))
    expected_TH = run(exact, x_TH, new_cache(checkpoint), [50, 40])
    halved_TH = run(exact, x_TH, new_cache(checkpoint, torch.bfloat16), [50, 40])
    assert 0 < (halved_TH - expected_TH).norm() / expected_TH.norm() < 0.01
    half = load(checkpoint, TorchOps(CPU, torch.bfloat16), dtype=torch.bfloat16)
    out_TH = run(half, x_TH.bfloat16(), new_cache(checkpoint, torch.bfloat16), [50, 40])
    assert out_TH.dtype == torch.bfloat16
    assert 0 < (out_TH.float() - expected_TH).norm() / expected_TH.norm() < 0.03


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_what_ranks_contribute_adds_up_to_the_whole(checkpoint: Path, ranks: int) -> None:
    """Heads are split, and a bias behind them is added by one rank; each keeps all latents."""
    x_TH, ops = inputs(), TorchOps(CPU)
    whole_cache = new_cache(checkpoint)
    expected_TH = run(load(checkpoint, ops), x_TH, whole_cache, [LENGTH])
    parts = []
    for rank in range(ranks):
        cache = new_cache(checkpoint)
        parts.append(run(load(checkpoint, ops, Layout(tp=ranks), rank), x_TH, cache, [LENGTH]))
        blocks = torch.arange(10)
        torch.testing.assert_close(cache.gather(1, blocks)[0], whole_cache.gather(1, blocks)[0])
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), expected_TH, atol=1e-5, rtol=1e-5)


def test_attention_that_keeps_keys_and_values_is_refused(checkpoint: Path) -> None:
    if (reason := unavailable_reason()) is not None:
        pytest.skip(reason)
    ops = NativeOps()
    with pytest.raises(ValueError, match="portable or triton attention, not by native"):
        Decoder(spec_of(checkpoint), ops, NativeAttention(ops), "float32", device=CPU)


@pytest.mark.parametrize("name", ["torch", "native"])
def test_a_worker_pairs_its_arithmetic_with_attention_to_latents(checkpoint: Path, name: str) -> None:
    if name == "native" and (reason := unavailable_reason()) is not None:
        pytest.skip(reason)
    spec, before = spec_of(checkpoint), torch.get_num_threads()
    worker = Worker(EngineConfig(model=str(checkpoint), device="cpu", ops=name, kv_cache_bytes=10**6))
    try:
        info = worker.start()
        assert (info.ops, info.attention) == (name, "portable")
        assert info.num_blocks == 10**6 // (16 * spec.kv_bytes_per_token(4))
        assert info.kv_bytes == info.num_blocks * 16 * spec.kv_bytes_per_token(4)
        tokens = list(range(20, 60))
        assignment = SlotAssignment(0, "r", 0, tokens, 40, [4, 1, 2], Sampling(temperature=0.0), 0, [])
        result = worker.step(StepPlan(7, [], [assignment], [Row(0, 0, 40, True, [])]))
        assert isinstance(result, StepResult) and len(result.sampled) == 1
    finally:
        worker.close()
        torch.set_num_threads(before)
