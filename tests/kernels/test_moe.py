"""Experts on the device against the portable ones: routing, the order of rows, grouped products, whole layers.

Shapes: T tokens, E experts, K experts that a token visits, R = T K rows, H hidden, N features of an expert.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor

from shoal.core.layout import Layout
from shoal.core.model_spec import MoESpec
from shoal.core.quantization import at_load
from shoal.engine.kernels import unavailable_reason
from shoal.engine.moe import Router
from shoal.engine.ops import TorchOps
from shoal.engine.quantization.weight import KernelWeight
from tests.checkpoints import make_checkpoint
from tests.engine.test_moe import load, tokens
from tests.kernels.fuzz import DEVICE, Fuzz, assert_near
from tests.quantized_checkpoints import make_twins

if (reason := unavailable_reason(DEVICE)) is not None:
    pytest.skip(reason, allow_module_level=True)

from shoal.engine.kernels.moe_experts import ExpertWeights, combine, run_experts  # noqa: E402
from shoal.engine.kernels.moe_routing import route, schedule  # noqa: E402
from shoal.engine.triton_ops import TritonOps  # noqa: E402
from tests.kernels.test_quantized_matmul import error, random_weight, scheme  # noqa: E402

FAMILIES = ["mixtral", "qwen3_moe_plain_weights", "deepseek_v3"]
SPECS = {
    "softmax": MoESpec(num_experts=8, num_experts_per_token=2, expert_intermediate_size=1),
    "odd": MoESpec(num_experts=60, num_experts_per_token=6, expert_intermediate_size=1, normalised=False, scaling=2.5),
    "one": MoESpec(num_experts=5, num_experts_per_token=1, expert_intermediate_size=1),
    "groups": MoESpec(
        num_experts=20,
        num_experts_per_token=4,
        expert_intermediate_size=1,
        scoring="sigmoid",
        router_bias=True,
        num_groups=4,
        num_groups_per_token=2,
        scaling=1.5,
    ),
    "all groups": MoESpec(
        num_experts=24, num_experts_per_token=3, expert_intermediate_size=1, num_groups=3, num_groups_per_token=3
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_routes_are_those_of_the_router(name: str) -> None:
    spec, fuzz = SPECS[name], Fuzz(len(name))
    x_TH, weight_EH = fuzz.floats(9, 16), fuzz.floats(spec.num_experts, 16)
    correction_E = fuzz.floats(spec.num_experts) * 0.3 if spec.router_bias else None
    ops = TorchOps(DEVICE)
    ids_TK, weights_TK = Router(ops, spec, ops.pack(weight_EH, None, "float32"), correction_E).route(x_TH)
    got_ids, got_weights = route(x_TH @ weight_EH.T, spec, correction_E)
    assert got_ids.dtype == torch.int64 and torch.equal(got_ids, ids_TK)
    torch.testing.assert_close(got_weights, weights_TK, rtol=1e-5, atol=1e-7)


def test_equal_scores_go_to_the_lowest_numbers() -> None:
    logits_TE = torch.zeros(2, 8, device=DEVICE)
    logits_TE[1, 5] = 1.0
    ids_TK, weights_TK = route(logits_TE, SPECS["softmax"], None)
    assert ids_TK.tolist() == [[0, 1], [5, 0]]
    torch.testing.assert_close(weights_TK.sum(dim=1).cpu(), torch.ones(2))


def test_sigmoids_that_are_all_zero_weigh_nothing_and_a_nan_chooses_somebody() -> None:
    logits_TE = torch.full((2, 20), -200.0, device=DEVICE)
    logits_TE[1] = float("nan")
    ids_TK, weights_TK = route(logits_TE, SPECS["groups"], torch.zeros(20, device=DEVICE))
    assert weights_TK[0].tolist() == [0.0] * 4
    assert bool(((ids_TK >= 0) & (ids_TK < 20)).all())


@pytest.mark.parametrize("seed", range(8))
def test_rows_by_expert_in_tiles(seed: int) -> None:
    fuzz = Fuzz(seed)
    experts, rows, tile = fuzz.number(1, 9), fuzz.one_of(1, 5, 64, 100, 1500), fuzz.one_of(16, 32)
    local_R = fuzz.ids(-1, experts, rows)
    if seed == 3:
        local_R.fill_(experts - 1)  # all to one: most others have no tile
    got = schedule(local_R, experts, tile)
    local, starts = local_R.tolist(), got.starts_L1.tolist()
    order = [row for expert in range(experts) for row in range(rows) if local[row] == expert]
    assert got.order_R.tolist()[: len(order)] == order
    assert starts == [sum(0 <= number < expert for number in local) for expert in range(experts + 1)]
    tiles = [(expert, start) for expert in range(experts) for start in range(starts[expert], starts[expert + 1], tile)]
    found = list(zip(got.tile_experts.tolist(), got.tile_starts.tolist(), strict=True))
    assert found[: len(tiles)] == tiles and all(expert == -1 for expert, _ in found[len(tiles) :])


def expected_rows(x_TH: Tensor, local_R: Tensor, gate_up: Tensor, down: Tensor, activation: str, visits: int) -> Tensor:
    """(R, H) in float64, NaN where the expert is elsewhere."""
    rows = []
    for row, number in enumerate(local_R.tolist()):
        gate, up = (x_TH[row // visits].double() @ gate_up[number].double().T).chunk(2)
        act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
        between = (act * up).to(x_TH.dtype).double()
        rows.append(between @ down[number].double().T if number >= 0 else torch.full_like(x_TH[0], float("nan")))
    return torch.stack([row.double() for row in rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 40, 150, 280])
def test_grouped_products(rows: int, dtype: torch.dtype) -> None:
    """Every tile shape: 280 rows of two experts are 140 each. Features are no multiple of any tile."""
    fuzz = Fuzz(rows)
    activation: Literal["silu", "gelu_tanh"] = "silu" if rows % 20 else "gelu_tanh"
    visits = 1 if rows == 3 else 2
    experts, hidden, features = 2 if rows == 280 else 3, fuzz.one_of(40, 136), fuzz.one_of(24, 72)
    x_TH = fuzz.floats(rows // visits, hidden, dtype=dtype, padding=fuzz.one_of(0, 8))
    gate_up = fuzz.floats(experts, 2 * features, hidden, dtype=dtype) / 8
    down = fuzz.floats(experts, hidden, features, dtype=dtype) / 8
    local_R = fuzz.ids(-1, experts, rows)
    y_RH, starts = run_experts(x_TH, local_R, ExpertWeights(gate_up, down), activation, visits)
    expected = expected_rows(x_TH, local_R, gate_up, down, activation, visits)
    here = local_R >= 0
    # The row between the products is rounded: its error is a rounding of a sum's terms.
    assert_near(y_RH[here], expected[here], dtype, factor=4)
    assert starts.diff().tolist() == torch.bincount(local_R[here], minlength=experts).tolist()

    weights_TK = fuzz.floats(rows // visits, visits).abs()
    y_RH[~here] = float("nan")  # undefined: the sum must not look at it
    terms = torch.where(here[:, None], y_RH.double(), 0.0).view(rows // visits, visits, hidden)
    summed = (terms * weights_TK.double()[:, :, None]).sum(dim=1)
    assert_near(combine(y_RH, local_R, weights_TK), summed, dtype, factor=2)


KINDS = {
    "int8": ("int8", 1, 0),
    "fp8": ("fp8", 1, 0),
    "fp8 tensor": ("fp8", 0, 0),
    "fp8 blocks": ("fp8", 32, 64),
    "fp8 small blocks": ("fp8", 8, 32),
    "int4": ("int4", 1, 32),
    "int4 long groups": ("int4", 1, 128),
    "int4 channel": ("int4", 1, 0),
}
"""Weights, and output and input features that share a scale: 0 is all."""


def few_bits(fuzz: Fuzz, kind: str, experts: int, n: int, k: int) -> tuple[KernelWeight, Tensor]:
    """Of all experts, as the kernel takes them and in float64."""
    weights, rows, group = KINDS[kind]
    matrices = [
        random_weight(random.Random(fuzz.number(0, 1 << 30)), scheme(weights), n, k, rows or n, group or k)
        for _ in range(experts)
    ]
    packed = KernelWeight.stacked([KernelWeight.of(matrix, DEVICE) for matrix in matrices], experts)
    assert packed is not None
    return packed, torch.stack([matrix.dequantized().double() for matrix in matrices])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_few_bits_are_widened_in_the_kernel(kind: str) -> None:
    """Sizes are no multiple of tiles; groups, which may end behind the last feature, are."""
    fuzz = Fuzz(len(kind))
    rows, hidden, features = fuzz.one_of(5, 56), fuzz.one_of(72, 136, 200), fuzz.one_of(40, 72)
    gate_up, wide_up = few_bits(fuzz, kind, 3, 2 * features, hidden)
    down, wide_down = few_bits(fuzz, kind, 3, hidden, features)
    dtype = torch.float32 if rows == 5 else torch.bfloat16
    x_TH, local_R = fuzz.floats(rows // 2, hidden, dtype=dtype, padding=4), fuzz.ids(-1, 3, rows // 2 * 2)
    y_RH, _ = run_experts(x_TH, local_R, ExpertWeights(gate_up, down), "silu", 2)
    here = local_R >= 0
    assert_near(y_RH[here], expected_rows(x_TH, local_R, wide_up, wide_down, "silu", 2)[here], dtype, factor=8)


def test_a_rows_bits_do_not_depend_on_the_batch() -> None:
    """Within one tile shape, which the number of rows chooses."""
    fuzz = Fuzz(6)
    weights = ExpertWeights(fuzz.floats(4, 48, 40), fuzz.floats(4, 40, 24))
    x_TH, local_R = fuzz.floats(30, 40), fuzz.ids(0, 4, 30)
    together, _ = run_experts(x_TH, local_R, weights, "silu")
    for row in (0, 7, 29):
        alone, _ = run_experts(x_TH[row : row + 1], local_R[row : row + 1], weights, "silu")
        assert torch.equal(alone[0], together[row])


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def test_layers_of_checkpoints(checkpoint: Path) -> None:
    """The whole mixture, and its parts on two ranks, with the loads that they count."""
    x_TH = tokens(12)
    plain = load(checkpoint, TorchOps(torch.device("cpu")))
    expected_TH = plain.forward(x_TH)
    ops: Any = TritonOps(torch.device("cpu"), torch.float32)
    whole = load(checkpoint, ops)
    torch.testing.assert_close(whole.forward(x_TH), expected_TH, atol=1e-5, rtol=1e-4)
    assert whole.experts.rows() == plain.experts.rows()
    parts = [load(checkpoint, ops, layout=Layout(ep=2), rank=rank) for rank in (0, 1)]
    summed_TH = sum(part.forward(x_TH) for part in parts)
    torch.testing.assert_close(summed_TH, expected_TH, atol=1e-5, rtol=1e-4)
    assert [count for part in parts for count in part.experts.rows()] == plain.experts.rows()


def test_int8_experts(checkpoint: Path) -> None:
    x_TH = tokens(6)
    expected_TH = load(checkpoint, TorchOps(torch.device("cpu")), "int8").forward(x_TH)
    ops: Any = TritonOps(torch.device("cpu"), torch.float32)
    torch.testing.assert_close(load(checkpoint, ops, "int8").forward(x_TH), expected_TH, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("weights", "bound"), [("fp8", 0.06), ("int8", 0.02)])
def test_experts_quantised_at_load(weights: Any, bound: float, checkpoint: Path) -> None:
    """Less rounded than the reference, which rounds activations too."""
    x_TH, quantize = tokens(6), at_load(weights)
    expected_TH = load(checkpoint, TorchOps(torch.device("cpu")), quantize=quantize).forward(x_TH)
    ops: Any = TritonOps(torch.device("cpu"), torch.float32)
    block = load(checkpoint, ops, quantize=quantize)
    assert block.experts.weighted(x_TH, torch.zeros(6, dtype=torch.int64), torch.ones(6, 1)) is not None
    assert error(block.forward(x_TH), expected_TH) < bound


@pytest.mark.parametrize("form", ["fp8_block", "awq", "ct_int8"])
def test_experts_of_quantised_checkpoints(form: str, tmp_path: Path) -> None:
    """Against the float checkpoint that the file stands for; on two ranks that cut experts within their groups."""
    plain = make_checkpoint("mixtral", tmp_path / "original", hidden_size=64, intermediate_size=160)
    quantised, floats = make_twins(plain, tmp_path, form)
    x_TH, ops = tokens(6), cast("Any", TritonOps(torch.device("cpu"), torch.float32))
    expected_TH = load(floats, TorchOps(torch.device("cpu"))).forward(x_TH)
    torch.testing.assert_close(load(quantised, ops).forward(x_TH), expected_TH, atol=1e-5, rtol=1e-4)
    parts = [load(quantised, ops, layout=Layout(tp=2), rank=rank) for rank in (0, 1)]
    torch.testing.assert_close(sum(part.forward(x_TH) for part in parts), expected_TH, atol=1e-5, rtol=1e-4)
