"""Experts on the device against the portable ones: routing, the order of rows, grouped products, whole layers.

Shapes: T tokens, E experts, K experts that a token visits, R = T K rows, H hidden, N features of an expert.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor

from shoal.core.layout import Layout
from shoal.core.model_spec import MoESpec
from shoal.engine.kernels import unavailable_reason
from shoal.engine.moe import Router
from shoal.engine.ops import TorchOps
from tests.checkpoints import make_checkpoint
from tests.engine.test_moe import load, tokens
from tests.kernels.fuzz import DEVICE, Fuzz, assert_near

if (reason := unavailable_reason(DEVICE)) is not None:
    pytest.skip(reason, allow_module_level=True)

from shoal.engine.kernels.moe_experts import ExpertWeights, combine, run_experts  # noqa: E402
from shoal.engine.kernels.moe_routing import route, schedule  # noqa: E402
from shoal.engine.triton_ops import TritonOps  # noqa: E402

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


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_scaled_weights_are_widened_in_the_kernel(stored: torch.dtype) -> None:
    fuzz = Fuzz(5)
    gate_up, down = fuzz.ids(-90, 91, 3, 48, 40).float().to(stored), fuzz.ids(-90, 91, 3, 40, 24).float().to(stored)
    scales = fuzz.floats(3, 48).abs() / 300 + 1e-3, fuzz.floats(3, 40).abs() / 300 + 1e-3
    x_TH, local_R = fuzz.floats(20, 40), fuzz.ids(0, 3, 20)
    y_RH, _ = run_experts(x_TH, local_R, ExpertWeights(gate_up, down, *scales), "silu")
    wide = [weight.double() * scale.double()[:, :, None] for weight, scale in zip((gate_up, down), scales, strict=True)]
    assert_near(y_RH, expected_rows(x_TH, local_R, *wide, "silu", 1), torch.float32, factor=8)


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
