"""Mixtures of experts against transformers' own blocks, and what a row's result must not depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch
from torch import Tensor

from shoal.checkpoint.resolve import load_spec
from shoal.core.layout import Layout
from shoal.core.model_spec import ModelSpec, MoESpec
from shoal.core.quantization import QuantScheme
from shoal.core.sharding import shard_of
from shoal.engine.moe import DenseMLP, MoEBlock, Router, load_mlp
from shoal.engine.native import unavailable_reason
from shoal.engine.native_ops import NativeOps
from shoal.engine.ops import TorchOps
from shoal.engine.weight_reader import WeightReader
from shoal.engine.weights import open_weights
from tests.checkpoints import make_checkpoint

CPU = torch.device("cpu")
MOE_FAMILIES = ["mixtral", "qwen3_moe", "qwen3_moe_plain_weights", "deepseek_v3", "deepseek_v3_plain"]
LAYER = 1
"""The first layer of DeepSeek's is dense."""


@pytest.fixture(scope="module", params=MOE_FAMILIES)
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
    return load_spec(path)


def load(
    path: Path,
    ops: Any,
    precision: Any = "float32",
    layout: Layout | None = None,
    rank: int = 0,
    number: int = LAYER,
    quantize: QuantScheme | None = None,
) -> MoEBlock:
    layout, spec = layout or Layout(), spec_of(path)
    source = open_weights(path)
    reader = WeightReader(
        source, ops, precision, device=CPU, dtype=torch.float32, stored=spec.quantization, quantize=quantize
    )
    block = load_mlp(reader, spec, number, shard_of(spec, layout, rank))
    source.close()
    return cast("MoEBlock", block)


def reference_of(path: Path) -> Any:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.model.layers[LAYER].mlp


def tokens(count: int, seed: int = 5) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


def by_number(ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """transformers does not order a token's experts in all families."""
    ids, order = ids_TK.sort(dim=1)
    return ids, weights_TK.gather(1, order)


def test_experts_weights_and_results_are_those_of_transformers(checkpoint: Path, ops: Any) -> None:
    block, reference = load(checkpoint, ops), reference_of(checkpoint)
    x_TH = tokens(150)
    with torch.inference_mode():
        _, weights, ids = reference.gate(x_TH)
        expected_TH = reference(x_TH[None])[0]
    ids_TK, weights_TK = block.router.route(x_TH)
    assert ids_TK.dtype == torch.int64 and weights_TK.dtype == torch.float32
    for got, expected in zip(by_number(ids_TK, weights_TK), by_number(ids, weights), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(block.forward(x_TH), expected_TH, atol=1e-5, rtol=1e-5)


def test_equal_scores_are_resolved_as_in_transformers(checkpoint: Path) -> None:
    """Of several experts with the same weights some are chosen and some are not, for every token."""
    spec, reference, ops = spec_of(checkpoint).moe, reference_of(checkpoint), TorchOps(CPU)
    assert spec is not None
    gate, k = reference.gate, spec.num_experts_per_token
    copies = 3 if k % 2 == 0 else 2
    original_E = torch.arange(spec.num_experts) // copies * copies
    correction_E = None
    with torch.inference_mode():
        gate.weight.copy_(gate.weight[original_E])
        if spec.router_bias:
            correction_E = gate.e_score_correction_bias.copy_(gate.e_score_correction_bias[original_E])
        # A whole number of vectors: torch.sigmoid, which transformers uses, is another function behind the last.
        x_TH = tokens(320)
        _, _, expected = gate(x_TH)
        ids_TK, _ = Router(ops, spec, ops.pack(gate.weight, None, "float32"), correction_E).route(x_TH)
    assert torch.equal(ids_TK.sort(dim=1).values, expected.sort(dim=1).values)
    taken_TE = torch.zeros(320, spec.num_experts).scatter_(1, ids_TK, 1.0)
    is_split_T = (taken_TE != taken_TE[:, original_E]).any(dim=1)
    assert bool(is_split_T.any())


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_rows_bits_do_not_depend_on_the_batch(checkpoint: Path, precision: str) -> None:
    """Of a mixture as of a dense layer on the native kernels. Counts of rows leave every kind of vector tail."""
    if (reason := unavailable_reason()) is not None:
        pytest.skip(reason)
    block = load(checkpoint, NativeOps(threads=2), precision)
    x_TH = tokens(75)
    expected_TH = block.forward(x_TH)
    ids_TK, weights_TK = block.router.route(x_TH)
    for size in (1, 2, 7, 31):
        parts = [x_TH[at : at + size] for at in range(0, len(x_TH), size)]
        assert torch.equal(torch.cat([block.forward(part) for part in parts]), expected_TH)
        routed = [block.router.route(part) for part in parts]
        assert torch.equal(torch.cat([ids for ids, _ in routed]), ids_TK)
        assert torch.equal(torch.cat([weights for _, weights in routed]), weights_TK)
    shuffled = torch.randperm(75, generator=torch.Generator().manual_seed(1))
    assert torch.equal(block.forward(x_TH[shuffled]), expected_TH[shuffled])


def test_lower_precisions_choose_the_same_experts_and_compute_nearly_the_same(checkpoint: Path, ops: Any) -> None:
    x_TH = tokens(60)
    exact = load(checkpoint, ops)
    expected_TH = exact.forward(x_TH)
    for precision, bound in (("bfloat16", 0.02), ("int8", 0.04)):
        block = load(checkpoint, ops, precision)
        for got, expected in zip(block.router.route(x_TH), exact.router.route(x_TH), strict=True):
            assert torch.equal(got, expected)
        error = (block.forward(x_TH) - expected_TH).norm() / expected_TH.norm()
        assert 0 < error < bound


def test_routing_is_done_in_float32_whatever_activations_are(checkpoint: Path) -> None:
    ops = TorchOps(CPU, torch.bfloat16)
    block, x_TH = load(checkpoint, ops), tokens(40).bfloat16()
    exact = load(checkpoint, TorchOps(CPU))
    for got, expected in zip(block.router.route(x_TH), exact.router.route(x_TH.float()), strict=True):
        assert torch.equal(got, expected)
    y_TH = block.forward(x_TH)
    assert y_TH.dtype == torch.bfloat16
    error = (y_TH.float() - exact.forward(x_TH.float())).norm() / y_TH.float().norm()
    assert error < 0.02


def test_rows_that_each_expert_computed_are_counted(checkpoint: Path, ops: Any) -> None:
    block = load(checkpoint, ops)
    num_experts = len(block.experts.load_E)
    assert block.experts.load_E.tolist() == [0] * num_experts
    chosen = []
    for count in (1, 33):
        x_TH = tokens(count, seed=count)
        chosen += block.router.route(x_TH)[0].flatten().tolist()
        block.forward(x_TH)
    assert block.experts.load_E.tolist() == [chosen.count(number) for number in range(num_experts)]
    assert block.experts.load_E.dtype == torch.int64
    assert block.experts.rows() == block.experts.load_E.tolist()
    block.experts.start_counting()
    assert not any(block.experts.rows())


@pytest.mark.parametrize(
    "layout", [Layout(ep=2), Layout(tp=2), Layout(tp=3), Layout(tp=2, ep=2)], ids=lambda layout: str(layout)
)
def test_what_ranks_contribute_adds_up_to_the_whole(checkpoint: Path, layout: Layout) -> None:
    """Experts split over one axis, features of each over the other, features of shared ones over both."""
    ops, x_TH = TorchOps(CPU), tokens(50)
    whole = load(checkpoint, ops)
    blocks = [load(checkpoint, ops, layout=layout, rank=rank) for rank in range(layout.ranks)]
    parts = [block.forward(x_TH) for block in blocks]
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), whole.forward(x_TH), atol=1e-5, rtol=1e-5)
    assert not any(torch.equal(part, parts[0]) for part in parts[1:])
    # Each of the tp ranks of an expert computes all of its rows.
    loads = torch.stack([block.experts.load_E for block in blocks]).sum(dim=0)
    assert torch.equal(loads, layout.tp * whole.experts.load_E)


def test_a_rank_none_of_whose_experts_is_chosen_contributes_only_its_shared_part(tmp_path: Path) -> None:
    path, ops, x_TH = make_checkpoint("qwen3_moe", tmp_path), TorchOps(CPU), tokens(1)
    blocks = [load(path, ops, layout=Layout(ep=4), rank=rank) for rank in range(4)]
    chosen = {number // 2 for number in blocks[0].router.route(x_TH)[0].flatten().tolist()}
    assert len(chosen) < 4
    for rank, block in enumerate(blocks):
        assert bool(block.forward(x_TH).any()) == (rank in chosen)


def test_experts_are_of_the_best_groups(tmp_path: Path) -> None:
    path = make_checkpoint("deepseek_v3", tmp_path)
    block, spec, x_TH = load(path, TorchOps(CPU)), spec_of(path).moe, tokens(200)
    assert spec is not None

    def groups_of(router: Router) -> list[int]:
        ids_TK, _ = router.route(x_TH)
        return [len(set(row)) for row in (ids_TK // (spec.num_experts // spec.num_groups)).tolist()]

    assert max(groups_of(block.router)) == spec.num_groups_per_token == 2
    free = msgspec.structs.replace(spec, num_groups=1, num_groups_per_token=1)
    unbound = Router(TorchOps(CPU), free, block.router._weight, block.router._correction_E)
    assert max(groups_of(unbound)) == 3


def test_sigmoids_that_are_all_zero_give_no_weight_and_no_nan() -> None:
    ops = TorchOps(CPU)
    spec = MoESpec(num_experts=4, num_experts_per_token=2, expert_intermediate_size=8, scoring="sigmoid")
    router = Router(ops, spec, ops.pack(torch.full((4, 64), -1e3), None, "float32"))
    _, weights_TK = router.route(torch.ones(3, 64))
    assert torch.equal(weights_TK, torch.zeros(3, 2))


def test_layers_before_the_first_with_experts_are_dense(tmp_path: Path) -> None:
    path = make_checkpoint("deepseek_v3", tmp_path)
    assert isinstance(load(path, TorchOps(CPU), number=0), DenseMLP)
    assert isinstance(load(path, TorchOps(CPU), number=1), MoEBlock)
