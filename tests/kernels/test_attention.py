"""Triton attention against the portable one: random shapes, lengths and tables, over caches and outputs full of NaN.

Shapes: T tokens, N query heads, M key/value heads, D head size, K blocks of the cache, P tokens a block, L numbers of
a latent row.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the package triton is not installed: its kernels cannot run, nor be interpreted")

from shoal.checkpoint.resolve import load_spec
from shoal.engine.attention.base import AttentionBatch, HeadSharing
from shoal.engine.attention.latent_cache import LatentCache
from shoal.engine.attention.portable import PortableAttention, PortableCache
from shoal.engine.attention.triton_backend import TritonAttention, TritonCache
from shoal.engine.attention.triton_decode import MAX_PARTS, num_parts
from shoal.engine.attention.triton_latent import TritonLatentAttention
from shoal.engine.model import Decoder
from shoal.engine.ops import TorchOps
from shoal.engine.weights import open_weights
from tests.checkpoints import make_checkpoint
from tests.engine.paged import PagedRun

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOAT8, INT8 = torch.float8_e4m3fn, torch.int8
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Of the queries' dtype, which weights and outputs are rounded to."""


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels are to fill is NaN before: a row that was forgotten does not look like a result."""
    empty = torch.empty

    def poison(*args: Any, **options: Any) -> Tensor:
        made = empty(*args, **options)
        return made.fill_(float("nan")) if made.is_floating_point() and made.element_size() > 1 else made

    monkeypatch.setattr(torch, "empty", poison)


def int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Step:
    """Sequences of (context, queries), whose blocks are scattered over a cache; tables hold rubbish behind them."""

    def __init__(self, lens: list[tuple[int, int]], block_size: int, seed: int = 0) -> None:
        draw = random.Random(seed)
        counts = [-(-context // block_size) for context, _ in lens]
        self.num_blocks, self.block_size, self.lens = sum(counts) + 3, block_size, lens
        blocks = list(range(self.num_blocks))
        draw.shuffle(blocks)
        self.tables = [[blocks.pop() for _ in range(count)] for count in counts]
        widest = max(counts) + draw.randrange(3)
        self.starts = [0, *itertools.accumulate(queries for _, queries in lens)]
        slots = [
            table[at // block_size] * block_size + at % block_size
            for table, (context, queries) in zip(self.tables, lens, strict=True)
            for at in range(context - queries, context)
        ]
        self.batch = AttentionBatch.causal(
            query_starts_S1=int32(self.starts),
            context_lens_S=int32([context for context, _ in lens]),
            block_tables_SB=int32(
                [table + [draw.randrange(-9, 9999)] * (widest - len(table)) for table in self.tables]
            ),
            slot_mapping_T=int32(slots),
        )

    def written(self) -> Tensor:
        """(K, P): which places of the cache hold a token of these sequences."""
        mask = torch.zeros(self.num_blocks, self.block_size, dtype=torch.bool)
        for table, (context, _) in zip(self.tables, self.lens, strict=True):
            for at in range(context):
                mask[table[at // self.block_size], at % self.block_size] = True
        return mask.to(DEVICE)


def filled(step: Step, heads: int, head_dim: int, dtype: torch.dtype, seed: int) -> tuple[TritonCache, PortableCache]:
    """Equal caches: ours, with NaN or the like where no token is, and what it means in float32, with zeros there."""
    generator = torch.Generator().manual_seed(seed)
    ours = TritonAttention(1).allocate(2, step.num_blocks, step.block_size, heads, head_dim, dtype, DEVICE)
    theirs = PortableAttention().allocate(2, step.num_blocks, step.block_size, heads, head_dim, torch.float32, DEVICE)
    nowhere = ~step.written()
    if dtype == FLOAT8:
        keys, values = (torch.rand(heads, generator=generator).to(DEVICE) + 0.25 for _ in range(2))
        ours.set_scales(1, keys, values)
    paged = ours.paged(1)
    for stored, scale, meant in (
        (paged.keys_KPMD, paged.key_scale, theirs.keys_KPMD[1]),
        (paged.values_KPMD, paged.value_scale, theirs.values_KPMD[1]),
    ):
        x = torch.randn(stored.shape, generator=generator).to(DEVICE)
        if dtype == INT8:
            assert scale is not None
            scale.copy_(torch.rand(scale.shape, generator=generator).to(DEVICE) * 0.02 + 0.01)
            x = (x * 40).round().clamp(-127, 127)
        x = x.to(dtype)
        meant.copy_(x.float() if scale is None else x.float() * (scale[..., None]))
        meant[nowhere] = 0.0
        stored.copy_(x)
        if dtype == INT8 and scale is not None:
            scale[nowhere] = float("nan")
        else:
            bits = stored.view(torch.uint8) if dtype == FLOAT8 else stored
            bits[nowhere] = 0x7F if dtype == FLOAT8 else float("nan")
    return ours, theirs


def assert_agrees(
    step: Step,
    dtype: torch.dtype,
    query_dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    parts: int | None = None,
    sharing: HeadSharing | None = None,
    seed: int = 0,
    **options: Any,
) -> None:
    ours, theirs = filled(step, kv_heads, head_dim, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    # Queries of a fused projection, so with a stride of their own.
    fused = torch.randn(step.starts[-1], heads + 2, head_dim, generator=generator).to(query_dtype).to(DEVICE)
    q = fused[:, :heads]
    options["scale"] = head_dim**-0.5
    expected, expected_lse = PortableAttention(sharing).forward(
        theirs, 1, q.float(), step.batch, need_lse=True, **options
    )
    backend = TritonAttention(2, sharing, parts)
    found, lse = backend.forward(ours, 1, q, step.batch, need_lse=True, **options)
    by = TOLERANCE[query_dtype]
    assert found.dtype == query_dtype and lse is not None
    torch.testing.assert_close(found.float(), expected, atol=by, rtol=by)
    torch.testing.assert_close(lse, expected_lse, atol=3e-5, rtol=3e-6)


def random_lens(draw: random.Random, most: int) -> list[tuple[int, int]]:
    """Decodes, whole prompts, chunks behind what is cached, all mixed."""
    lens = []
    for _ in range(draw.randint(1, 5)):
        context = draw.randint(1, most)
        lens.append((context, draw.choice([1, 1, context, draw.randint(1, context)])))
    return lens


@pytest.mark.parametrize("seed", range(14))
def test_random_steps(seed: int) -> None:
    draw = random.Random(seed)
    group, kv_heads = draw.choice([1, 2, 3, 7]), draw.choice([1, 2])
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16, FLOAT8, INT8])
    query_dtype = torch.float32 if dtype in (FLOAT8, INT8) else dtype
    assert_agrees(
        Step(random_lens(draw, 90), draw.choice([16, 32]), seed),
        dtype,
        query_dtype,
        group * kv_heads,
        kv_heads,
        draw.choice([16, 64, 80, 128]),
        parts=draw.choice([None, 1, 2, 5]),
        seed=seed,
        window=draw.choice([None, None, 1, 17, 60]),
        soft_cap=draw.choice([None, None, 1.5]),
    )


MIXED = [(40, 1), (70, 9), (33, 33), (5, 1), (16, 16)]


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_head_sizes(head_dim: int) -> None:
    assert_agrees(Step([(40, 1), (37, 5)], 16), torch.float32, torch.float32, 4, 2, head_dim)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8, INT8])
@pytest.mark.parametrize("options", [{}, {"window": 20, "soft_cap": 2.0}], ids=["plain", "window and cap"])
def test_low_precision_in_bfloat16(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """As it runs on a GPU: quantised numbers become bfloat16, scales are applied to scores and outputs."""
    assert_agrees(Step(MIXED, 32), dtype, torch.bfloat16, 6, 2, 64, **options)


@pytest.mark.parametrize("parts", [2, 7, 40])
@pytest.mark.parametrize("window", [None, 33])
def test_contexts_in_more_parts_than_tiles(parts: int, window: int | None) -> None:
    assert_agrees(
        Step([(300, 1), (1, 1), (65, 1)], 16), torch.float32, torch.float32, 4, 1, 64, parts=parts, window=window
    )


@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_a_ranks_heads_may_begin_and_end_within_groups(skipped: int) -> None:
    step = Step([(40, 1), (21, 8)], 16)
    assert_agrees(step, torch.float32, torch.float32, 5, 3 if skipped == 2 else 2, 64, sharing=HeadSharing(3, skipped))


@pytest.mark.parametrize("parts", [1, 3])
def test_ranks_that_share_a_context(parts: int) -> None:
    """Tokens see what is kept here: perhaps nothing, or as much as the token before."""
    step = Step([(60, 1), (20, 6), (30, 1)], 16)
    seen = [0, 3, 3, 4, 5, 5, 20, 30]
    before = [0, 3, 3, 3, 3, 4, 5, 12]

    def kept_before(window: int) -> Tensor:
        return int32(before)

    step.batch = replace(step.batch, seen_T=int32(seen), kept_before=kept_before)
    for options in ({}, {"window": 9}):
        assert_agrees(step, torch.float32, torch.float32, 2, 1, 64, parts=parts, **options)


def test_rows_without_queries_are_passed_over() -> None:
    """As the padding of a captured graph may be."""
    assert_agrees(Step([(20, 1), (16, 0), (17, 3), (9, 0)], 16), torch.float32, torch.float32, 2, 1, 64)
    assert_agrees(Step([(20, 1), (16, 0), (17, 1)], 16), torch.float32, torch.float32, 2, 1, 64, parts=2)


def test_log_sum_exp_only_if_asked() -> None:
    step = Step(MIXED, 16)
    cache, _ = filled(step, 1, 64, torch.float32, 0)
    q = torch.randn(step.starts[-1], 2, 64, device=DEVICE)
    out, lse = TritonAttention(1).forward(cache, 1, q, step.batch, scale=1.0)
    assert lse is None and out.isfinite().all()


def test_wrong_shapes_are_refused() -> None:
    step = Step([(20, 4)], 16)
    cache, _ = filled(step, 2, 64, torch.float32, 0)
    q = torch.randn(4, 3, 64, device=DEVICE)
    with pytest.raises(ValueError, match="the cache holds 2 heads of 64, got queries"):
        TritonAttention(1).forward(cache, 1, q, step.batch, scale=1.0)
    with pytest.raises(ValueError, match="the cache holds 2 heads of 64, got keys"):
        TritonAttention(1).write(cache, 1, q, q, step.batch)
    with pytest.raises(ValueError, match="heads of a token must be contiguous"):
        wide = torch.randn(4, 2, 128, device=DEVICE)[..., ::2]
        TritonAttention(1).write(cache, 1, wide, wide, step.batch)
    with pytest.raises(ValueError, match="only a float8 cache has scales"):
        cache.set_scales(0, torch.ones(2), torch.ones(2))


# --- writing ----------------------------------------------------------------------------------------------------------


def as_stored(x_TMD: Tensor, dtype: torch.dtype, scale_M: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What the cache keeps of keys or values in float32, and the scales it finds."""
    if dtype == FLOAT8:
        assert scale_M is not None
        return (x_TMD / scale_M[:, None]).clamp(-448, 448).to(FLOAT8), None
    if dtype == INT8:
        scale_TM = (x_TMD.abs().amax(-1) / 127).clamp(min=1e-20)
        return (x_TMD / scale_TM[..., None] + 0.5).floor().to(INT8), scale_TM
    return x_TMD.to(dtype), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, FLOAT8, INT8])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(2, 64), (3, 80)])
def test_writes(dtype: torch.dtype, kv_heads: int, head_dim: int) -> None:
    step = Step([(20, 7), (33, 1)], 16)
    backend = TritonAttention(1)
    cache = backend.allocate(2, step.num_blocks, 16, kv_heads, head_dim, dtype, DEVICE)
    for page in cache.pages:
        for stored in (page.keys_KMPD, page.values_KMPD):
            (stored.view(torch.uint8) if stored.element_size() == 1 else stored).fill_(99)
    scales = torch.rand(2, kv_heads, device=DEVICE) * 0.01 + 0.001  # so small that some values are cut off at 448
    if dtype == FLOAT8:
        cache.set_scales(1, scales[0], scales[1])
    fused = torch.randn(8, 2 * kv_heads + 1, head_dim, device=DEVICE)
    fused[3] = 0.0
    keys, values = fused[:, 1 : 1 + kv_heads], fused[:, 1 + kv_heads :]
    slots = step.batch.slot_mapping_T.clone()
    slots[5] = -1
    backend.write(cache, 1, keys, values, replace(step.batch, slot_mapping_T=slots))

    kept = slots >= 0
    at = slots[kept].long()
    paged = cache.paged(1)
    for x, stored, found, given in (
        (keys, paged.keys_KPMD, paged.key_scale, scales[0]),
        (values, paged.values_KPMD, paged.value_scale, scales[1]),
    ):
        rows = stored.reshape(-1, kv_heads, head_dim)
        expected, expected_scale = as_stored(x[kept], dtype, given)
        assert torch.equal(rows[at].float(), expected.float())
        if expected_scale is not None and found is not None:
            torch.testing.assert_close(found.reshape(-1, kv_heads)[at], expected_scale, rtol=1e-6, atol=0)
        others = torch.ones(len(rows), dtype=torch.bool, device=DEVICE)
        others[at] = False
        untouched = rows[others]
        assert ((untouched.view(torch.uint8) if untouched.element_size() == 1 else untouched) == 99).all()
    first = cache.pages[0].keys_KMPD
    assert ((first.view(torch.uint8) if first.element_size() == 1 else first) == 99).all()


def test_what_is_written_is_what_is_read() -> None:
    """Quantised and back: within a step of the quantisation of the same in float32."""
    step = Step([(30, 30), (9, 9)], 16)
    q, k, v = (torch.randn(39, heads, 64, device=DEVICE) for heads in (4, 2, 2))
    outputs = {}
    for dtype in (torch.float32, FLOAT8, INT8):
        backend = TritonAttention(1)
        cache = backend.allocate(1, step.num_blocks, 16, 2, 64, dtype, DEVICE)
        backend.write(cache, 0, k, v, step.batch)
        outputs[dtype] = backend.forward(cache, 0, q, step.batch, scale=0.125)[0]
    assert (outputs[INT8] - outputs[torch.float32]).abs().max() < 0.03
    assert (outputs[FLOAT8] - outputs[torch.float32]).abs().max() < 0.15


def test_a_cache_counts_its_bytes() -> None:
    sizes = {
        dtype: TritonAttention(1).allocate(3, 5, 16, 2, 64, dtype, DEVICE).nbytes
        for dtype in (torch.bfloat16, FLOAT8, INT8)
    }
    numbers = 3 * 2 * 5 * 16 * 2 * 64
    assert sizes[torch.bfloat16] == 2 * numbers
    assert sizes[FLOAT8] == numbers + 3 * 2 * 2 * 4
    assert sizes[INT8] == numbers + 3 * 2 * 5 * 16 * 2 * 4


# --- how contexts are split -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processors", [1, 20, 132])
def test_parts_use_the_processors_and_are_no_more_than_that_takes(processors: int) -> None:
    for programs, longest in itertools.product([1, 8, 64, 100, 4000], [1, 64, 1000, 32768, 200_000]):
        parts = num_parts(programs, longest, 64, processors)
        assert 1 <= parts <= min(MAX_PARTS, max(1, -(-longest // 64)))
        if programs >= 12 * processors or longest <= 64:
            assert parts == 1
    assert num_parts(8, 32768, 64, 132) * 8 >= 2 * 132
    assert num_parts(1, 200_000, 64, 132) > 64


# --- latents ----------------------------------------------------------------------------------------------------------


LATENTS = [
    (5, 48, 16, 16, None, torch.float32, torch.float32),
    (20, 64, 8, 32, 3, torch.float32, FLOAT8),
    (16, 128, 64, 16, 2, torch.bfloat16, torch.bfloat16),
    (16, 128, 64, 16, 2, torch.bfloat16, FLOAT8),
    (6, 48, 32, 16, None, torch.bfloat16, INT8),
    (70, 32, 16, 16, 1, torch.float32, torch.float32),
    (70, 48, 16, 32, 1, torch.float32, INT8),
]
"""Heads, latent, rotated key, tokens of a block, parts of a context, dtype of queries and of the cache."""


def latent_caches(step: Step, latent_dim: int, rotated_dim: int, dtype: torch.dtype) -> tuple[LatentCache, LatentCache]:
    """Equal ones: NaN or the like where no token is, and what is meant in float32, with zeros there."""
    sizes = 2, step.num_blocks, step.block_size, latent_dim, rotated_dim
    ours, theirs = LatentCache(*sizes, dtype, DEVICE), LatentCache(*sizes, torch.float32, DEVICE)
    generator, written = torch.Generator().manual_seed(3), step.written()
    rows = torch.randn(*written.shape, latent_dim + rotated_dim, generator=generator).to(DEVICE)
    rows *= torch.rand(*written.shape, 1, generator=generator).to(DEVICE) + 0.5  # no two scales are alike
    slots = torch.arange(written.numel(), device=DEVICE)
    values, blocks = rows.flatten(0, 1)[:, None], torch.arange(step.num_blocks, device=DEVICE)
    ours.store(1, values, values[..., :latent_dim], slots)
    meant = ours.gather(1, blocks)[0].squeeze(-2).float()
    assert (meant - rows).abs().max() <= meant.abs().max() * (2**-4 if dtype == FLOAT8 else 2**-7)
    meant[~written] = 0.0
    values = meant.flatten(0, 1)[:, None]
    theirs.store(1, values, values[..., :latent_dim], slots)
    latents, rotated, scales = ours.pages[1]
    rotated[~written] = float("nan")
    bits = latents.view(torch.uint8) if dtype == FLOAT8 else latents
    bits[~written] = {FLOAT8: 0x7F, INT8: 99}.get(dtype, float("nan"))
    if scales is not None:
        scales[~written] = float("nan")
    return ours, theirs


@pytest.mark.parametrize(("heads", "latent_dim", "rotated", "block_size", "parts", "dtype", "kv_dtype"), LATENTS)
def test_latents(
    heads: int,
    latent_dim: int,
    rotated: int,
    block_size: int,
    parts: int | None,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
) -> None:
    step = Step([(40, 3), (9, 1), (0, 0), (70, 1), (12, 2)], block_size)
    ours, theirs = latent_caches(step, latent_dim, rotated, kv_dtype)
    q = torch.randn(step.starts[-1], heads, latent_dim + rotated, generator=torch.Generator().manual_seed(4))
    q = q.to(dtype).to(DEVICE)
    expected, expected_lse = PortableAttention().forward(theirs, 1, q.float(), step.batch, scale=0.1, need_lse=True)
    backend = TritonLatentAttention(latent_dim, 2, parts)
    found, lse = backend.forward(ours, 1, q, step.batch, scale=0.1, need_lse=True)
    torch.testing.assert_close(found.float(), expected[..., :latent_dim], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, expected_lse, atol=3e-5, rtol=3e-6)
    if dtype == torch.float32 and parts == 3:
        again, _ = PortableAttention().forward(ours, 1, q, step.batch, scale=0.1)
        torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, FLOAT8, INT8])
def test_latents_are_written_as_the_portable_backend_writes_them(kv_dtype: torch.dtype) -> None:
    step = Step([(20, 7), (33, 1)], 16)
    sizes = 2, step.num_blocks, 16, 40, 8, kv_dtype, DEVICE
    ours, theirs = LatentCache(*sizes), LatentCache(*sizes)
    for part in (*ours.pages[1], *theirs.pages[1]):
        if part is not None:
            (part.view(torch.uint8) if part.element_size() == 1 else part).fill_(99)
    rows = torch.randn(8, 3, 48, generator=torch.Generator().manual_seed(1)).to(DEVICE)[:, :1]
    rows[3] = 0.0
    slots = step.batch.slot_mapping_T.clone()
    slots[5] = -1
    batch = replace(step.batch, slot_mapping_T=slots)
    TritonLatentAttention(40, 2).write(ours, 1, rows, rows[..., :40], batch)
    kept = slots >= 0
    PortableAttention().write(theirs, 1, rows[kept], rows[kept][..., :40], replace(batch, slot_mapping_T=slots[kept]))
    for found, expected in zip(ours.pages[1], theirs.pages[1], strict=True):
        if found is not None and expected is not None:
            torch.testing.assert_close(found.float(), expected.float(), atol=0, rtol=1e-6)
    assert not any(part.float().any() for part in ours.pages[0] if part is not None)


# --- in a model -------------------------------------------------------------------------------------------------------


def logits(path: Path, make: Callable[[Any], Any], kv_dtype: torch.dtype | None = None) -> list[Tensor]:
    spec = load_spec(path)
    decoder = Decoder(spec, TorchOps(DEVICE), make(spec), "float32", device=DEVICE, kv_dtype=kv_dtype)
    source = open_weights(path)
    decoder.load(source)
    source.close()
    run = PagedRun(decoder, 2, num_blocks=16)
    steps = [{0: [3, 1, 4, 1, 5, 9, 2, 6], 1: [5, 3]}, {0: [5], 1: [8, 9, 7]}, {0: [9], 1: [3]}]
    return [out for step in steps for out in run.extend(step).values()]


@pytest.mark.parametrize(("family", "kv_dtype"), [("qwen3", None), ("deepseek_v3", None), ("deepseek_v3", FLOAT8)])
def test_a_model_computes_the_same(family: str, kv_dtype: torch.dtype | None, tmp_path: Path) -> None:
    path = make_checkpoint(family, tmp_path)

    def triton_attention(spec: Any) -> Any:
        return TritonAttention(2) if spec.mla is None else TritonLatentAttention(spec.mla.kv_lora_rank, 2)

    expected = logits(path, lambda spec: PortableAttention(), kv_dtype)
    for found, wanted in zip(logits(path, triton_attention, kv_dtype), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    if kv_dtype is not None:
        exact = torch.cat(logits(path, lambda spec: PortableAttention()))
        assert 1e-5 < float((torch.cat(expected) - exact).norm() / exact.norm()) < 0.15  # choices of experts may turn


def test_a_checkpoints_scales_reach_an_fp8_cache(tmp_path: Path) -> None:
    """Values many times as large as FP8 holds are cut off without them."""
    from safetensors.torch import load_file, save_file

    path = make_checkpoint("llama2", tmp_path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("v_proj.weight")]:
        tensors[name] *= 40_000.0
        tensors[name.replace("v_proj", "o_proj")] /= 40_000.0
    save_file(tensors, file)
    expected = logits(path, lambda spec: PortableAttention())
    plain = logits(path, lambda spec: TritonAttention(2), FLOAT8)
    scales = {
        name.replace("v_proj.weight", f"{which}_scale"): torch.tensor(scale)
        for name in tensors
        if name.endswith("v_proj.weight")
        for which, scale in (("k", 0.05), ("v", 1000.0))
    }
    save_file(tensors | scales, file)
    scaled = logits(path, lambda spec: TritonAttention(2), FLOAT8)

    def error(found: list[Tensor]) -> float:
        return float((torch.cat(found) - torch.cat(expected)).norm() / torch.cat(expected).norm())

    assert error(scaled) < 0.05 < error(plain)
