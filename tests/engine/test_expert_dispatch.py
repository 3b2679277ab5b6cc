"""Rows sent to the ranks of their experts: the bits of one rank, each row computed once, copies or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from shoal.core.config import ExpertDispatchKind
from shoal.core.expert_load import HeldRows, imbalance, merged
from shoal.core.expert_placement import Placement, balanced
from shoal.core.layout import Layout
from shoal.core.model_config import spec_from_config
from shoal.core.sharding import shard_of
from shoal.engine.comm.base import Comm
from shoal.engine.expert_dispatch import weighted_sum
from shoal.engine.moe import MoEBlock, load_mlp
from shoal.engine.native import unavailable_reason
from shoal.engine.native_ops import NativeOps
from shoal.engine.token_split import Split
from shoal.engine.weight_reader import WeightReader
from shoal.engine.weights import open_weights
from tests.checkpoints import make_checkpoint
from tests.engine.comm.threads import together

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))
CPU = torch.device("cpu")
LAYER = 1
"""The first layer of DeepSeek's is dense."""
LENGTHS = [1, 3, 40, 101]


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "deepseek_v3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"num_local_experts": 8} if request.param == "mixtral" else {}
    return make_checkpoint(request.param, tmp_path_factory.mktemp(request.param), **changes)


def load(
    path: Path,
    layout: Layout,
    comm: Comm | None = None,
    dispatch: ExpertDispatchKind = "replicate",
    placement: Placement | None = None,
    precision: str = "float32",
) -> MoEBlock:
    """The block of a rank, which is that of `comm`."""
    spec = spec_from_config(json.loads((path / "config.json").read_text()))
    source = open_weights(path)
    reader = WeightReader(source, NativeOps(), precision, device=CPU, dtype=torch.float32)  # type: ignore[arg-type]
    placements = None if placement is None else (placement,) * spec.num_layers
    shard = shard_of(spec, layout, 0 if comm is None else comm.rank, dispatch, placements)
    block = load_mlp(reader, spec, LAYER, shard, comm)
    source.close()
    return cast("MoEBlock", block)


def tokens(count: int) -> Tensor:
    """They have much in common, so that some experts are chosen far more often than others."""
    common_H = torch.randn(64, generator=torch.Generator().manual_seed(1))
    return common_H + torch.randn(count, 64, generator=torch.Generator().manual_seed(count))


def by_all_to_all(
    directory: Path, path: Path, layout: Layout, placement: Placement | None = None, precision: str = "float32"
) -> tuple[list[Tensor], list[HeldRows]]:
    """Results for each of LENGTHS, put together from all ranks; and what experts of each place have computed."""

    def body(comm: Comm) -> tuple[list[Tensor], MoEBlock]:
        block = load(path, layout, comm, "all_to_all", placement, precision)
        assert not block.contributes
        split, results = Split(comm), []
        for length in LENGTHS:
            split.begin(length)
            own_TH = split.sum(tokens(length) if comm.rank == 0 else torch.zeros(length, 64))
            results.append(split.gather(block.forward(own_TH)))
        return results, block

    ranks = together(directory, layout.tensor_ranks, body)
    for results, _ in ranks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, ranks[0][0], strict=True))
    blocks = [block for _, block in ranks]
    counts = [
        HeldRows(LAYER, rank // layout.tp, block.experts.held, block.experts.rows())
        for rank, block in enumerate(blocks)
        if rank % layout.tp == 0
    ]
    return ranks[0][0], counts


def chosen(block: MoEBlock) -> list[int]:
    """Rows by expert, as the router says."""
    ids = torch.cat([block.router.route(tokens(length))[0].flatten() for length in LENGTHS])
    return [int(count) for count in torch.bincount(ids, minlength=len(block.experts.load_E))]


@pytest.mark.parametrize("layout", [Layout(ep=2), Layout(ep=4), Layout(tp=2, ep=2)], ids=str)
def test_results_are_those_of_one_rank_and_no_row_is_computed_twice_or_for_padding(
    checkpoint: Path, layout: Layout, tmp_path: Path
) -> None:
    whole = load(checkpoint, Layout())
    results, counts = by_all_to_all(tmp_path, checkpoint, layout)
    for length, result in zip(LENGTHS, results, strict=True):
        expected = whole.forward(tokens(length))
        if layout.tp == 1:
            assert torch.equal(result, expected)
        else:  # an expert's features are summed in parts
            torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert merged(counts, 8, layout.ep).layers[0].experts == chosen(whole)


def test_int8_experts_give_the_bits_of_one_rank_too(checkpoint: Path, tmp_path: Path) -> None:
    whole = load(checkpoint, Layout(), precision="int8")
    results, _ = by_all_to_all(tmp_path, checkpoint, Layout(ep=2), precision="int8")
    for length, result in zip(LENGTHS, results, strict=True):
        assert torch.equal(result, whole.forward(tokens(length)))


@pytest.mark.parametrize("layout", [Layout(ep=2), Layout(tp=2, ep=2)], ids=str)
def test_who_holds_an_expert_and_how_many_do_changes_no_bit(checkpoint: Path, layout: Layout, tmp_path: Path) -> None:
    """Places with different numbers of experts, out of order, some of them copies."""
    before, alone = by_all_to_all(tmp_path, checkpoint, layout)
    placement = Placement(((0, 2, 3, 5, 7), (1, 2, 3, 4, 6, 7)))
    results, counts = by_all_to_all(tmp_path, checkpoint, layout, placement)
    assert all(torch.equal(a, b) for a, b in zip(results, before, strict=True))
    assert merged(counts, 8, 2).layers[0].experts == merged(alone, 8, 2).layers[0].experts
    shares = [dict(zip(held.experts, held.rows, strict=True)) for held in counts]
    assert any(shares[0][expert] and shares[1][expert] for expert in (2, 3, 7)), "copies share rows"


def test_copies_of_busy_experts_spread_the_load(checkpoint: Path, tmp_path: Path) -> None:
    rows = chosen(load(checkpoint, Layout()))
    placement = balanced(rows, 4, 1)
    assert sum(map(len, placement.held)) > 8, "the control: there are copies"
    alone = merged(by_all_to_all(tmp_path, checkpoint, Layout(ep=4))[1], 8, 4)
    spread = merged(by_all_to_all(tmp_path, checkpoint, Layout(ep=4), placement)[1], 8, 4)
    assert spread.layers[0].experts == alone.layers[0].experts == rows
    assert spread.rank_imbalance < alone.rank_imbalance
    # What was planned, up to how evenly copies take turns.
    assert spread.rank_imbalance < imbalance([[round(load) for load in placement.load(rows)]]) + 0.1


def test_contributions_of_experts_in_any_order_add_up_to_the_whole(checkpoint: Path, tmp_path: Path) -> None:
    placement = Placement(((1, 2, 4), (0, 3, 5, 6, 7)))

    def body(comm: Comm) -> Tensor:
        return comm.all_reduce_(load(checkpoint, Layout(ep=2), comm, placement=placement).forward(tokens(40)))

    expected = load(checkpoint, Layout()).forward(tokens(40))
    for result in together(tmp_path, 2, body):
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_weighted_sum() -> None:
    y_TKH, weights_TK = torch.randn(5, 3, 64), torch.rand(5, 3)
    torch.testing.assert_close(weighted_sum(y_TKH, weights_TK), torch.einsum("tkh,tk->th", y_TKH, weights_TK))
    assert weighted_sum(y_TKH.bfloat16(), weights_TK).dtype == torch.bfloat16
