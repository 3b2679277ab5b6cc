"""A whole Decoder over several ranks, each a thread: every way to reach experts gives the logits of one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.core.config import ExpertDispatchKind
from shoal.core.layout import Layout
from shoal.core.model_config import spec_from_config
from shoal.core.sharding import shard_of
from shoal.engine.attention.native import NativeAttention
from shoal.engine.attention.portable import PortableAttention
from shoal.engine.comm.base import Comm
from shoal.engine.model import Decoder
from shoal.engine.native import unavailable_reason
from shoal.engine.native_ops import NativeOps
from shoal.engine.weights import open_weights
from tests.checkpoints import VOCAB, make_checkpoint
from tests.engine.comm.threads import together
from tests.engine.paged import PagedRun

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))
LAYOUTS = [Layout(ep=2), Layout(ep=4), Layout(tp=2, ep=2)]
STEPS = [(20, 1), (7, 64), (1, 0), (0, 1), (2, 1)]
"""Tokens of two sequences: prompts, chunks beside decodes, and steps with fewer tokens than ranks."""


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "deepseek_v3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"num_local_experts": 8} if request.param == "mixtral" else {}
    return make_checkpoint(request.param, tmp_path_factory.mktemp(request.param), **changes)


def logits(
    path: Path,
    layout: Layout,
    dispatch: ExpertDispatchKind = "replicate",
    comm: Comm | None = None,
    precision: Any = "float32",
) -> tuple[Tensor, Tensor]:
    """Logits, on the rank that draws, and hidden states."""
    spec = spec_from_config(json.loads((path / "config.json").read_text()))
    ops: Any = NativeOps()
    attention: Any = NativeAttention(ops) if spec.mla is None else PortableAttention()
    shard = shard_of(spec, layout, 0 if comm is None else comm.rank, dispatch)
    decoder = Decoder(spec, ops, attention, precision, device=torch.device("cpu"), shard=shard, tensor=comm)
    source = open_weights(path)
    decoder.load(source)
    source.close()
    run, generator = PagedRun(decoder, 2), torch.Generator().manual_seed(4)
    parts: list[Tensor] = []
    for sizes in STEPS:
        fed = {i: torch.randint(5, VOCAB, (n,), generator=generator).tolist() for i, n in enumerate(sizes) if n}
        parts += run.extend(fed).values()
    return torch.cat(parts) if parts else torch.empty(0), torch.cat(run.hidden)


def of_ranks(directory: Path, path: Path, layout: Layout, dispatch: ExpertDispatchKind, precision: str) -> Tensor:
    found = together(directory, layout.ranks, lambda comm: logits(path, layout, dispatch, comm, precision))
    assert all(torch.equal(hidden, found[0][1]) for _, hidden in found), "every rank has the same bits"
    assert not any(len(logits) for logits, _ in found[1:]), "the first of them draws"
    return found[0][0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_logits_are_those_of_one_rank_however_tokens_reach_experts(
    checkpoint: Path, layout: Layout, tmp_path: Path
) -> None:
    expected, _ = logits(checkpoint, Layout())
    replicated = of_ranks(tmp_path, checkpoint, layout, "replicate", "float32")
    torch.testing.assert_close(replicated, expected, atol=1e-4, rtol=0)
    # The same sums in the same order, of fewer tokens each.
    assert torch.equal(of_ranks(tmp_path, checkpoint, layout, "all_gather", "float32"), replicated)
    sent = of_ranks(tmp_path, checkpoint, layout, "all_to_all", "float32")
    torch.testing.assert_close(sent, expected, atol=1e-4, rtol=0)


def test_with_int8_weights(checkpoint: Path, tmp_path: Path) -> None:
    expected, _ = logits(checkpoint, Layout(), precision="int8")
    replicated = of_ranks(tmp_path, checkpoint, Layout(ep=2), "replicate", "int8")
    assert torch.equal(of_ranks(tmp_path, checkpoint, Layout(ep=2), "all_gather", "int8"), replicated)
    sent = of_ranks(tmp_path, checkpoint, Layout(ep=2), "all_to_all", "int8")
    # Attention's output is quantised by rank, so no layout has the numbers of another: the bound is int8's own.
    for found in (replicated, sent):
        assert (found - expected).norm() / expected.norm() < 0.08
