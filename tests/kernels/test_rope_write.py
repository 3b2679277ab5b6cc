"""Rotation and the KV write against the portable ones, over random heads, pages and slots.

Shapes: T tokens, N query heads, M key/value heads, D head size, K blocks, P tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from shoal.core.model_spec import RopeSpec
from shoal.engine.attention.base import PagedKV
from shoal.engine.kernels import unavailable_reason
from shoal.engine.ops import TorchOps
from shoal.engine.rope import cos_sin_table
from tests.kernels.fuzz import DEVICE, DTYPES, Fuzz, assert_near

if (reason := unavailable_reason(DEVICE)) is not None:
    pytest.skip(reason, allow_module_level=True)

from shoal.engine.kernels.rope import rope_  # noqa: E402

MAX_LEN = 64


@dataclass
class Case:
    heads: int
    kv_heads: int
    head_dim: int
    qkv_TA: Tensor
    positions_T: Tensor
    table: Tensor
    norms: tuple[Tensor | None, Tensor | None]

    @classmethod
    def of(cls, fuzz: Fuzz, dtype: torch.dtype) -> Case:
        kv_heads = fuzz.number(1, 5)
        heads, head_dim, tokens = kv_heads * fuzz.one_of(1, 2, 7), fuzz.one_of(16, 64, 80, 96, 128), fuzz.number(1, 6)
        norms = (fuzz.floats(head_dim), fuzz.floats(head_dim)) if fuzz.number(0, 1) else (None, None)
        return cls(
            heads,
            kv_heads,
            head_dim,
            fuzz.floats(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, padding=fuzz.one_of(0, 8)),
            fuzz.ids(0, MAX_LEN, tokens),
            cos_sin_table(RopeSpec(theta=1e4), head_dim, MAX_LEN).to(DEVICE),
            norms,
        )

    def turned(self) -> Tensor:
        """(T, N + 2 M, D) by the portable ops."""
        expected = self.qkv_TA.clone()
        TorchOps(DEVICE).rope_(
            expected, self.positions_T, self.table, self.heads, self.kv_heads, self.head_dim, *self.norms, 1e-6
        )
        return expected.view(len(expected), -1, self.head_dim)

    def run(self, pages: PagedKV | None = None, slots_T: Tensor | None = None) -> Tensor:
        got = torch.empty_strided(self.qkv_TA.shape, self.qkv_TA.stride(), dtype=self.qkv_TA.dtype, device=DEVICE)
        got.copy_(self.qkv_TA)
        sizes = self.heads, self.kv_heads, self.head_dim
        rope_(got, self.positions_T, self.table, *sizes, *self.norms, 1e-6, pages, slots_T)
        return got.reshape(len(got), -1, self.head_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(6))
def test_rotation_in_place(seed: int, dtype: torch.dtype) -> None:
    case = Case.of(Fuzz(seed), dtype)
    got, expected = case.run(), case.turned()
    assert_near(got, expected, dtype, factor=2)
    assert torch.equal(got[:, case.heads + case.kv_heads :], expected[:, case.heads + case.kv_heads :])


def pages_of(fuzz: Fuzz, case: Case, dtype: torch.dtype, scales: str, by_head: bool) -> PagedKV:
    """Poisoned, in either order of a block's tokens and heads."""
    blocks, size = 7, fuzz.one_of(16, 32)
    shape = (blocks, case.kv_heads, size, case.head_dim) if by_head else (blocks, size, case.kv_heads, case.head_dim)

    def poisoned() -> Tensor:
        filled = torch.full(shape, 99 if dtype == torch.int8 else float("nan"), device=DEVICE).to(dtype)
        return filled.transpose(1, 2) if by_head else filled

    def scale() -> Tensor | None:
        if scales == "given":
            return fuzz.floats(case.kv_heads).abs() * 0.02 + 0.02
        if scales == "found":
            filled = torch.full(shape[:3], float("nan"), device=DEVICE)
            return filled.transpose(1, 2) if by_head else filled
        return None

    return PagedKV(poisoned(), poisoned(), scale(), scale())


# Of what a kind can tell apart: in FP8 numbers beside each other, in INT8 the whole range.
RESOLUTION = {torch.float8_e4m3fn: 2**-4, torch.int8: 0.5 / 127}


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize(
    ("stored", "scales"),
    [
        (torch.float32, "none"),
        (torch.bfloat16, "none"),
        (torch.float16, "none"),
        (torch.float8_e4m3fn, "given"),
        (torch.float8_e4m3fn, "found"),
        (torch.int8, "given"),
        (torch.int8, "found"),
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_keys_and_values_reach_their_slots(seed: int, stored: torch.dtype, scales: str, by_head: bool) -> None:
    fuzz = Fuzz(seed + 50)
    case = Case.of(fuzz, torch.bfloat16)
    pages = pages_of(fuzz, case, stored, scales, by_head)
    blocks, size = pages.keys_KPMD.shape[:2]
    slots_T = fuzz.permutation(blocks * size)[: len(case.qkv_TA)].int()
    slots_T[0] = -1  # of a row that pads the batch
    original = pages.keys_KPMD.clone()
    got, expected = case.run(pages, slots_T), case.turned()
    n, m = case.heads, case.kv_heads
    assert_near(got[:, :n], expected[:, :n], torch.bfloat16, factor=2)
    assert torch.equal(got[:, n:], case.qkv_TA.reshape(len(got), -1, case.head_dim)[:, n:]), "not written back"

    written, at = slots_T[1:] >= 0, slots_T[1:].long()
    assert bool(written.all())
    for kept, scale, wanted in (
        (pages.keys_KPMD, pages.key_scale, expected[1:, n : n + m].float()),
        (pages.values_KPMD, pages.value_scale, expected[1:, n + m :].float()),
    ):
        rows = kept.float()[at // size, at % size]
        if scale is None:
            assert_near(rows, wanted, torch.bfloat16 if stored == torch.float32 else stored, factor=2)
            continue
        factor = scale[at // size, at % size][:, :, None] if scales == "found" else scale[None, :, None]
        largest = 448.0 if stored == torch.float8_e4m3fn else 127.0
        clipped = wanted.clamp(-largest * factor, largest * factor)
        reach = clipped.abs() if stored == torch.float8_e4m3fn else largest * factor
        # Half a step, beside a rounding to bfloat16 of what is stored.
        bound = RESOLUTION[stored] * reach + 2**-6 * clipped.abs() + factor * 2**-9
        assert bool(((rows * factor - clipped).abs() <= bound).all())
        if scales == "found":
            torch.testing.assert_close(
                factor[..., 0], wanted.abs().amax(dim=2) / largest, rtol=2**-6, atol=1e-9, check_dtype=False
            )
    untouched = torch.ones(blocks, size, dtype=torch.bool, device=DEVICE)
    untouched[at // size, at % size] = False
    same = (pages.keys_KPMD.float() == original.float()) | original.float().isnan() & pages.keys_KPMD.float().isnan()
    assert bool(same[untouched].all()), "no other slot is written"


def test_a_head_of_zeros_is_zero_again() -> None:
    qkv = torch.zeros(1, 3 * 16, device=DEVICE)
    kept = torch.full((1, 16, 1, 16), 7, dtype=torch.int8, device=DEVICE)
    scale = torch.full((1, 16, 1), float("nan"), device=DEVICE)
    pages = PagedKV(kept, kept.clone(), scale, scale.clone())
    table = cos_sin_table(RopeSpec(theta=1e4), 16, 4).to(DEVICE)
    at = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    rope_(qkv, at, table, 1, 1, 16, None, None, 1e-6, pages, at.int())
    assert kept[0, 0].tolist() == [[0] * 16] and scale[0, 0, 0] > 0


def test_what_does_not_fit_is_refused() -> None:
    case = Case.of(Fuzz(1), torch.bfloat16)
    slots = torch.zeros(len(case.qkv_TA), dtype=torch.int32, device=DEVICE)
    fp8 = pages_of(Fuzz(1), case, torch.float8_e4m3fn, "none", False)
    with pytest.raises(ValueError, match="has scales"):
        case.run(fp8, slots)
    plain = pages_of(Fuzz(1), case, torch.bfloat16, "none", False)
    with pytest.raises(ValueError, match="a slot is needed for each"):
        case.run(plain, slots[:0])
    case.kv_heads += 1
    with pytest.raises(ValueError, match="adjacent features"):
        case.run(plain, slots)
