"""The native kernels against torch, and against themselves: a row never depends on what is computed beside it."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.core.config import WeightPrecision
from shoal.core.model_spec import RopeSpec
from shoal.engine import native
from shoal.engine.native import unavailable_reason, variants
from shoal.engine.native_ops import NativeOps
from shoal.engine.ops import Activation, TorchOps
from shoal.engine.rope import cos_sin_table

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

PRECISIONS: list[WeightPrecision] = ["float32", "bfloat16", "int8"]
REFERENCE = TorchOps(torch.device("cpu"))


@pytest.fixture(params=variants())
def ops(request: pytest.FixtureRequest) -> Iterator[NativeOps]:
    made = NativeOps(threads=2, variant=request.param)
    yield made
    made.close()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root-mean-square error over root-mean-square value."""
    return float((found - expected).double().norm() / expected.double().norm())


# --- linear ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(960, 576), (576, 1536), (33, 64), (7, 100), (1, 1), (130, 2050)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_float32(ops: NativeOps, n: int, k: int, with_bias: bool) -> None:
    weight, bias = random(n, k, seed=1), random(n, seed=2) if with_bias else None
    packed = ops.pack(weight, bias, "float32")
    for rows in (0, 1, 2, 3, 5, 13, 31):
        x = random(rows, k, seed=rows)
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        found = ops.linear(x, packed)
        assert found.shape == (rows, n)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5 * k**0.5)


def test_linear_bfloat16_is_exact_but_for_the_weights(ops: NativeOps) -> None:
    """Weights are rounded once, to nearest even as torch rounds; everything else is float32."""
    weight, x = random(200, 300, seed=1), random(9, 300)
    found = ops.linear(x, ops.pack(weight, None, "bfloat16"))
    expected = ops.linear(x, ops.pack(weight.bfloat16().float(), None, "float32"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("k", [64, 100, 576, 1536])
def test_linear_int8(ops: NativeOps, k: int) -> None:
    weight, bias, x = random(150, k, seed=1), random(150, seed=2), random(17, k)
    expected = torch.nn.functional.linear(x, weight, bias)
    found = ops.linear(x, ops.pack(weight, bias, "int8"))
    # A normal weight row's peak is some 3.3 deviations: a step of 1/38 deviation errs by 1/38/sqrt(12), less than 0.8%,
    # and the activations, by groups of 64, by less than that again.
    assert relative_error(found, expected) < 0.012


def test_int8_outlier_costs_only_its_group(ops: NativeOps) -> None:
    weight, x = random(96, 256, seed=1), random(4, 256)
    x[2, 70] = 500.0
    found, expected = ops.linear(x, ops.pack(weight, None, "int8")), torch.nn.functional.linear(x, weight)
    assert relative_error(found[[0, 1, 3]], expected[[0, 1, 3]]) < 0.012
    kept = torch.cat([x[2:3, :64], x[2:3, 128:]], dim=1)
    weight_kept = torch.cat([weight[:, :64], weight[:, 128:]], dim=1)
    weight_in_outlier = weight.clone()
    weight_in_outlier[:, :64] = weight_in_outlier[:, 128:] = 0
    rest = found[2:3] - ops.linear(x[2:3], ops.pack(weight_in_outlier, None, "int8"))
    # Weight steps of the outlier's column remain, 500 * 1/38 / sqrt(12) at most; the other groups err as before.
    direct = ops.linear(kept, ops.pack(weight_kept, None, "int8"))
    assert relative_error(direct, torch.nn.functional.linear(kept, weight_kept)) < 0.012
    assert float((rest - direct).abs().max()) < 500 / 38


def test_int8_extremes_do_not_saturate(ops: NativeOps) -> None:
    """All products at their largest and of one sign: sums of pairs pass 16 bits."""
    for sign_w in (1.0, -1.0):
        for sign_x in (1.0, -1.0):
            weight, x = torch.full((40, 1024), sign_w), torch.full((5, 1024), sign_x)
            found = ops.linear(x, ops.pack(weight, None, "int8"))
            torch.testing.assert_close(found, torch.full((5, 40), sign_w * sign_x * 1024), rtol=1e-5, atol=0)


def test_int8_zero_rows(ops: NativeOps) -> None:
    weight = random(32, 128)
    weight[3] = 0
    x = torch.zeros(3, 128)
    x[1] = 1e-42  # denormal: its inverse overflows
    found = ops.linear(x, ops.pack(weight, None, "int8"))
    assert torch.equal(found[[0, 2]], torch.zeros(2, 32))
    assert bool(found.isfinite().all()) and bool((found[:, 3] == 0).all())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(ops: NativeOps, precision: WeightPrecision, activation: Activation) -> None:
    gate, up, x = random(70, 128, seed=1), random(70, 128, seed=2), random(15, 128)
    x[0] *= 20  # saturates the activations
    packed = ops.pack_gated(gate, up, precision)
    assert packed.out_features == 70
    found = ops.gated(x, packed, activation)
    expected = REFERENCE.gated(x, REFERENCE.pack_gated(gate, up, "float32"), activation)
    bound = {"float32": 1e-6, "bfloat16": 5e-3, "int8": 0.03}[precision]
    assert relative_error(found, expected) < bound


def test_activations_are_accurate_everywhere(ops: NativeOps) -> None:
    """Through a gate of 1 x and an up of the constant 1, one activation a row."""
    x = torch.cat([torch.linspace(-110, 110, 4001), torch.logspace(-30, 1, 500), -torch.logspace(-30, 1, 500)])
    inputs = torch.stack([x, torch.ones_like(x)], dim=1)
    packed = ops.pack_gated(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), "float32")
    for activation in ("silu", "gelu_tanh"):
        found = ops.gated(inputs, packed, activation)[:, 0].double()
        wide = x.double()
        if activation == "silu":
            expected = wide * torch.sigmoid(wide)
        else:
            # sigmoid form: 1 + tanh cancels for negative x, in torch too
            expected = wide * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))
        torch.testing.assert_close(found, expected, rtol=6e-6, atol=1e-30)


# --- batch invariance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("n", "k"), [(960, 576), (576, 1536), (100, 2050)])
def test_a_row_is_bitwise_the_same_in_any_batch(ops: NativeOps, precision: WeightPrecision, n: int, k: int) -> None:
    weight, up = random(n, k, seed=1), random(n, k, seed=2)
    linear, gated = ops.pack(weight, random(n, seed=3), precision), ops.pack_gated(weight, up, precision)
    x = random(250, k)
    alone = torch.cat([ops.linear(row, linear) for row in x[:30].split(1)])
    alone_gated = torch.cat([ops.gated(row, gated, "silu") for row in x[:30].split(1)])
    for rows in (2, 3, 4, 5, 6, 7, 11, 12, 13, 25, 30, 64, 241, 250):
        assert torch.equal(ops.linear(x[:rows], linear)[:30], alone[:rows])
        assert torch.equal(ops.gated(x[:rows], gated, "silu")[:30], alone_gated[:rows])
    # At another place of the batch, too.
    assert torch.equal(ops.linear(x.flip(0), linear).flip(0)[:30], alone)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_threads_do_not_change_a_bit(ops: NativeOps, precision: WeightPrecision) -> None:
    weight, x, norm = random(500, 576, seed=1), random(70, 576), random(576, seed=2)
    one = NativeOps(threads=1, variant=ops.variant)
    five = NativeOps(threads=5, variant=ops.variant)
    results = []
    for each in (one, ops, five):
        y = each.linear(each.rms_norm(x, norm, 1e-5), each.pack(weight, None, precision))
        results.append(torch.cat([y, y.max(dim=1).values[:, None], each.argmax(y)[:, None].float()], dim=1))
        residual = x.clone()
        results[-1] = torch.cat([results[-1], each.add_rms_norm_(x, residual, norm, 1e-5)], dim=1)
    one.close()
    five.close()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# --- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_pack_takes_any_float_and_any_stride(ops: NativeOps, precision: WeightPrecision, dtype: torch.dtype) -> None:
    whole = random(120, 200).to(dtype)
    view = whole[::2, 10:90]
    x = random(3, 80, seed=5)
    found = ops.linear(x, ops.pack(view, None, precision))
    assert torch.equal(found, ops.linear(x, ops.pack(view.float().contiguous(), None, precision)))
    assert relative_error(found, x @ view.float().T) < 0.02


@pytest.mark.parametrize("precision", PRECISIONS)
def test_embedding_reads_rows_back(ops: NativeOps, precision: WeightPrecision) -> None:
    weight = random(75, 70)
    packed = ops.pack(weight, None, precision)
    ids = torch.tensor([74, 0, 31, 32, 0, 3])
    found = ops.embedding(ids, packed)
    expected = {
        "float32": weight,
        "bfloat16": weight.bfloat16().float(),
        "int8": REFERENCE.embedding(torch.arange(75), REFERENCE.pack(weight, None, "int8")),
    }[precision][ids]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_packed_size_is_what_the_precision_says(ops: NativeOps) -> None:
    """And so no float copy is kept beside the packed form."""
    for precision, each in (("float32", 4), ("bfloat16", 2), ("int8", 1)):
        packed = ops.pack(random(960, 576), None, precision)  # type: ignore[arg-type]
        assert packed.nbytes == 960 * 576 * each + (960 * 4 if precision == "int8" else 0)


# --- norms, rotation, argmax ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [576, 64, 100, 7])
def test_rms_norm(ops: NativeOps, hidden: int) -> None:
    weight = random(hidden, seed=1)
    for rows in (0, 1, 2, 33):
        x = random(rows, hidden + 5)[:, :hidden]  # rows with a stride
        torch.testing.assert_close(
            ops.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5), rtol=2e-6, atol=1e-7
        )
        x, residual = x.contiguous(), random(rows, hidden, seed=2)
        expected_residual = residual.clone()
        expected = REFERENCE.add_rms_norm_(x, expected_residual, weight, 1e-5)
        found = ops.add_rms_norm_(x, residual, weight, 1e-5)
        assert torch.equal(residual, expected_residual)
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256, 8])
@pytest.mark.parametrize("norms", [False, True])
def test_rope(ops: NativeOps, head_dim: int, norms: bool) -> None:
    table = cos_sin_table(RopeSpec(theta=10000.0), head_dim, 300)
    heads, kv_heads, rows = 6, 2, 19
    qkv = random(rows, (heads + 2 * kv_heads) * head_dim)
    positions = torch.randint(0, 300, (rows,), generator=torch.Generator().manual_seed(1))
    q_norm, k_norm = (random(head_dim, seed=2), random(head_dim, seed=3)) if norms else (None, None)
    found, expected = qkv.clone(), qkv.clone()
    REFERENCE.rope_(expected, positions, table, heads, kv_heads, head_dim, q_norm, k_norm, 1e-6)
    ops.rope_(found, positions, table, heads, kv_heads, head_dim, q_norm, k_norm, 1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    values = (heads + kv_heads) * head_dim
    assert torch.equal(found[:, values:], qkv[:, values:])


@pytest.mark.parametrize("width", [1, 5, 64, 1000, 49152])
def test_argmax(ops: NativeOps, width: int) -> None:
    x = random(5, width)
    assert torch.equal(ops.argmax(x), x.argmax(dim=1))
    x[1] = -float("inf")
    x[2, width // 2 :] = float("inf")
    x[3] = 1.0
    assert ops.argmax(x).tolist()[1:4] == [0, width // 2, 0]
    x[4, width // 3] = float("nan")
    assert ops.argmax(x)[4] == width // 3
    assert ops.argmax(x[:, : width - width // 4]).shape == (5,)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 63, 64, 65, 1031, 49152])
def test_draw_is_that_of_torch(ops: NativeOps, width: int) -> None:
    rows = 9
    weights = random(rows, width).mul(4).softmax(dim=1)
    weights[3] *= weights[3] >= weights[3].max()  # all but one of them 0
    words = [np.arange(rows, dtype=np.uint64) * np.uint64(step) for step in (0x9E3779B97F4A7C15, 1, 1000)]
    drawn = ops.draw(weights, *words)
    assert drawn.tolist() == TorchOps(torch.device("cpu")).draw(weights, *words).tolist()
    assert drawn[3] == weights[3].argmax()
    # What another layout's rounding does to probabilities draws no other token.
    assert ops.draw(weights * (1 + 1e-6 * random(rows, width, seed=1)), *words).tolist() == drawn.tolist()


def test_wrong_shapes_and_types_are_refused(ops: NativeOps) -> None:
    packed, norm = ops.pack(random(40, 64), None, "float32"), torch.ones(64)
    with pytest.raises(ValueError, match="63 features"):
        ops.linear(random(2, 63), packed)
    with pytest.raises(ValueError, match="float64"):
        ops.linear(random(2, 64).double(), packed)
    with pytest.raises(ValueError, match="stride"):
        ops.linear(random(64, 2).T, packed)
    with pytest.raises(ValueError, match="gate and up"):
        ops.pack_gated(random(4, 64), random(5, 64), "float32")
    with pytest.raises(ValueError, match="bias"):
        ops.pack(random(4, 64), random(5), "float32")
    for bad in (-1, 40):
        with pytest.raises(ValueError, match=r"token ids must lie in \[0, 40\)"):
            ops.embedding(torch.tensor([0, bad]), packed)
    with pytest.raises(ValueError, match="norm"):
        ops.rms_norm(random(2, 64), norm[:63], 1e-5)
    with pytest.raises(ValueError, match="norm"):
        ops.add_rms_norm_(random(2, 64), random(2, 64), norm[:63], 1e-5)
    with pytest.raises(ValueError, match="one shape"):
        ops.add_rms_norm_(random(2, 64), random(3, 64), norm, 1e-5)
    with pytest.raises(ValueError, match="gated"):
        ops.linear(random(2, 64), ops.pack_gated(random(4, 64), random(4, 64), "float32"))
    with pytest.raises(ValueError, match="gated"):
        ops.gated(random(2, 64), packed, "silu")


def test_rope_refuses_positions_beyond_its_table(ops: NativeOps) -> None:
    table = torch.zeros(10, 64)
    for positions in (torch.tensor([3, 10]), torch.tensor([-1, 2])):
        qkv = random(2, 3 * 64)
        before = qkv.clone()
        with pytest.raises(ValueError, match=r"positions must lie in \[0, 10\)"):
            ops.rope_(qkv, positions, table, 1, 1, 64, None, None, 1e-5)
        assert torch.equal(qkv, before)
    with pytest.raises(ValueError, match="192"):
        ops.rope_(random(2, 191), torch.tensor([0, 1]), table, 1, 1, 64, None, None, 1e-5)
    with pytest.raises(ValueError, match="int64"):
        ops.rope_(random(2, 192), torch.tensor([0, 1], dtype=torch.int32), table, 1, 1, 64, None, None, 1e-5)


# --- the pool -------------------------------------------------------------------------------------------------------


def test_instances_do_not_know_each_other() -> None:
    """Two pools at work at once, in threads of their own: nothing is shared."""
    weight, x = random(300, 256, seed=1), random(40, 256)
    expected: list[Tensor] = []
    failures: list[BaseException] = []

    def use(threads: int) -> None:
        try:
            ops = NativeOps(threads=threads)
            packed = ops.pack(weight, None, "float32")
            for _ in range(200):
                expected.append(ops.linear(x, packed))
            ops.close()
        except BaseException as error:
            failures.append(error)

    users = [threading.Thread(target=use, args=(threads,)) for threads in (1, 2, 3)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert not failures
    assert len(expected) == 600
    assert all(torch.equal(y, expected[0]) for y in expected)


def test_one_instance_may_be_called_from_two_threads() -> None:
    """Calls wait for each other; a pool runs one operation at a time."""
    ops = NativeOps(threads=2)
    weights = [random(300, 256, seed=i) for i in range(2)]
    packed = [ops.pack(weight, None, "int8") for weight in weights]
    x = random(40, 256)
    expected = [ops.linear(x, each) for each in packed]
    wrong: list[int] = []

    def use(i: int) -> None:
        for _ in range(300):
            if not torch.equal(ops.linear(x, packed[i]), expected[i]):
                wrong.append(i)

    users = [threading.Thread(target=use, args=(i,)) for i in range(2)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    ops.close()
    assert wrong == []


def test_a_closed_instance_says_so() -> None:
    ops = NativeOps(threads=2)
    packed = ops.pack(random(4, 64), None, "float32")
    ops.close()
    ops.close()
    with pytest.raises(RuntimeError, match="closed"):
        ops.linear(random(1, 64), packed)
    with pytest.raises(RuntimeError, match="closed"):
        ops.pack(random(4, 64), None, "float32")


def test_close_ends_the_threads() -> None:
    def running() -> set[str]:
        return {entry.name for entry in Path("/proc/self/task").iterdir()}

    before = running()
    ops = NativeOps(threads=6)
    started = running() - before
    assert len(started) == 5
    ops.close()
    for _ in range(500):  # a joined thread leaves /proc a moment later
        if not started & running():
            break
        time.sleep(0.01)
    assert not started & running()


# --- the library ----------------------------------------------------------------------------------------------------


def test_the_best_variant_is_chosen() -> None:
    ops = NativeOps(threads=1)
    assert ops.variant == variants()[0]
    ops.close()


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="sse9"):
        NativeOps(threads=1, variant="sse9")


def test_a_build_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library_path", lambda variant: Path("/nowhere") / variant)
    reason = unavailable_reason()
    assert reason is not None and "compiler" in reason
    with pytest.raises(RuntimeError, match="compiler"):
        NativeOps(threads=1)


def test_structures_are_as_large_as_in_cpp(ops: NativeOps) -> None:
    assert ops.library.shoal_size_of_packed() == ctypes.sizeof(native.Packed)
    assert ops.library.shoal_size_of_attention() == ctypes.sizeof(native.AttentionCall)
