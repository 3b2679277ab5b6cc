"""Tokens drawn of logits without the host: penalties, temperature, min_p, top_k, top_p, and an exponential race.

Rows are cut into chunks of the vocabulary, one program each, so that a single row keeps a whole device busy; what
chunks found is put together in their order. A row's result depends on that row alone. The steps, each a kernel:

    prepare  penalties, in place; the largest logit of each chunk
    weigh    logits become exp((logit - largest) / temperature), in place: what is drawn in proportion to
    floor    one program a row: the least weight that passes min_p, top_k and top_p, found by bisection of float32's
             bits, which are in the order of the weights: no sort. Equals stay or go together
    race     the largest weight / E of each chunk, E from Philox as in `shoal.engine.random_stream`
    finish   the row's token; greedy rows take their largest logit, the lowest id among equals

Shapes: S rows, V vocabulary, C chunks, P penalised sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096
_BISECTION_BLOCK = 8192
FLOATS = ("temperature", "top_p", "min_p", "repetition", "frequency", "presence")
"""Columns of the settings that are float32."""
WORDS = ("seed", "index", "top_k", "penalty_row")
"""Columns of those that are int64; top_k 0 is off, penalty_row -1 is none."""
IN_PROMPT = 1 << 30
"""Added to a token's count where the prompt has it, for the repetition penalty."""

_TEMPERATURE: tl.constexpr = tl.constexpr(0)
_TOP_P: tl.constexpr = tl.constexpr(1)
_MIN_P: tl.constexpr = tl.constexpr(2)
_REPETITION: tl.constexpr = tl.constexpr(3)
_FREQUENCY: tl.constexpr = tl.constexpr(4)
_PRESENCE: tl.constexpr = tl.constexpr(5)
_NUM_FLOATS: tl.constexpr = tl.constexpr(6)
_SEED: tl.constexpr = tl.constexpr(0)
_INDEX: tl.constexpr = tl.constexpr(1)
_TOP_K: tl.constexpr = tl.constexpr(2)
_PENALTY_ROW: tl.constexpr = tl.constexpr(3)
_NUM_WORDS: tl.constexpr = tl.constexpr(4)
_COUNT_MASK: tl.constexpr = tl.constexpr(IN_PROMPT - 1)
_GREEDY_BELOW: tl.constexpr = tl.constexpr(1e-5)
_ONE: tl.constexpr = tl.constexpr(0x3F800000)
"""The bits of 1.0, which is the largest weight."""


@dataclass(frozen=True)
class Settings:
    """Of all slots, on the device, in the columns above; and how often sequences generated each token."""

    floats: Tensor
    words: Tensor
    counts_PV: Tensor | None
    """int32, with IN_PROMPT added; None where nobody is penalised."""


@dataclass(frozen=True)
class Needs:
    """What any slot in use asks for. Kernels that nobody needs are not launched."""

    draws: bool
    filters: bool
    """top_k or top_p."""


@triton.jit
def _penalised(x, counts_ptr, tokens, inside, repetition, frequency, presence):
    counts = tl.load(counts_ptr + tokens, mask=inside, other=0)
    generated = (counts & _COUNT_MASK).to(tl.float32)
    occurs = counts != 0
    repeated = tl.where(x > 0, x / repetition, x * repetition)
    x = tl.where(occurs, repeated, x)
    # A token that only the prompt has was generated 0 times: frequency and presence leave it alone.
    return x - generated * frequency - tl.where(generated > 0, presence, 0.0)


@triton.jit
def _prepare_kernel(
    logits_ptr, slots_ptr, floats_ptr, words_ptr, counts_ptr, peaks_ptr, peak_ids_ptr,
    logits_stride, vocab_size, num_chunks,
    PENALISES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_ptr + row)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = tokens < vocab_size
    place = logits_ptr + row * logits_stride + tokens
    x = tl.load(place, mask=inside, other=-float("inf"))
    if PENALISES:
        penalty_row = tl.load(words_ptr + slot * _NUM_WORDS + _PENALTY_ROW)
        if penalty_row >= 0:
            settings = floats_ptr + slot * _NUM_FLOATS
            x = _penalised(
                x, counts_ptr + penalty_row * vocab_size, tokens, inside,
                tl.load(settings + _REPETITION), tl.load(settings + _FREQUENCY), tl.load(settings + _PRESENCE),
            )  # fmt: skip
            tl.store(place, x, mask=inside)
    # NaN is never equal to the largest: a chunk with one says NaN, as its row must not be drawn.
    peak = tl.max(x, axis=0)
    is_broken = tl.max((x != x).to(tl.int32), axis=0) > 0
    first = tl.min(tl.where(x == peak, tokens, vocab_size), axis=0)
    tl.store(peaks_ptr + row * num_chunks + chunk, tl.where(is_broken, float("nan"), peak))
    tl.store(peak_ids_ptr + row * num_chunks + chunk, first)


@triton.jit
def _peak(peaks_ptr, row, num_chunks, CHUNKS: tl.constexpr):
    """The row's largest logit, NaN where a chunk has one, and its chunk."""
    chunks = tl.arange(0, CHUNKS)
    peaks = tl.load(peaks_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=-float("inf"))
    is_broken = tl.max((peaks != peaks).to(tl.int32), axis=0) > 0
    peak = tl.max(tl.where(peaks != peaks, -float("inf"), peaks), axis=0)
    first = tl.min(tl.where(peaks == peak, chunks, CHUNKS), axis=0)
    return tl.where(is_broken, float("nan"), peak), tl.minimum(first, num_chunks - 1)


@triton.jit
def _weigh_kernel(
    logits_ptr, slots_ptr, floats_ptr, peaks_ptr, logits_stride, vocab_size, num_chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_ptr + row)
    temperature = tl.load(floats_ptr + slot * _NUM_FLOATS + _TEMPERATURE)
    if temperature >= _GREEDY_BELOW:
        peak, _ = _peak(peaks_ptr, row, num_chunks, CHUNKS)
        tokens = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = tokens < vocab_size
        place = logits_ptr + row * logits_stride + tokens
        x = tl.load(place, mask=inside, other=-float("inf"))
        # The peak is subtracted first, so that a small temperature gives -inf beside 0 and never inf.
        tl.store(place, tl.exp((x - peak) / temperature), mask=inside)


@triton.jit
def _above(weights_ptr, a, b, c, least, IS_MASS: tl.constexpr, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Of a row's weights whose bits are at least `least`: how many, or how much, have bits above a, b and c."""
    above_a = tl.zeros([BLOCK], tl.float32)
    above_b = tl.zeros([BLOCK], tl.float32)
    above_c = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCAB_SIZE, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        weights = tl.load(weights_ptr + tokens, mask=tokens < VOCAB_SIZE, other=-1.0)
        bits = weights.to(tl.int32, bitcast=True)
        amount = tl.where(bits >= least, weights, 0.0)
        if not IS_MASS:
            amount = tl.where(bits >= least, 1.0, 0.0)
        above_a += tl.where(bits > a, amount, 0.0)
        above_b += tl.where(bits > b, amount, 0.0)
        above_c += tl.where(bits > c, amount, 0.0)
    return tl.sum(above_a, axis=0), tl.sum(above_b, axis=0), tl.sum(above_c, axis=0)


@triton.jit
def _least_with(weights_ptr, low, limit, least, IS_MASS: tl.constexpr, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The least bits above `low` such that less than `limit` of the weights have higher ones; 1.0's if there are none.

    Three pivots a pass: a pass costs what reading the row does, and it is 15 of them instead of 30.
    """
    low = low.to(tl.int64)
    high = low * 0 + _ONE
    while high - low > 1:
        quarter = high - low
        a, b, c = low + quarter // 4, low + quarter // 2, low + quarter * 3 // 4
        above_a, above_b, above_c = _above(
            weights_ptr, a.to(tl.int32), b.to(tl.int32), c.to(tl.int32), least, IS_MASS, VOCAB_SIZE, BLOCK
        )
        # Written so that NaN passes nowhere: a comparison that is neither would never end.
        new_high = tl.where(above_a < limit, a, tl.where(above_b < limit, b, tl.where(above_c < limit, c, high)))
        new_low = tl.where(above_b < limit, tl.where(above_a < limit, low, a), tl.where(above_c < limit, b, c))
        # `low` itself is known not to pass: with less than four left a is low.
        low, high = new_low, tl.maximum(new_high, new_low + 1)
    return high


@triton.jit
def _floor_kernel(
    weights_ptr, slots_ptr, floats_ptr, words_ptr, floors_ptr, weights_stride,
    VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    settings = floats_ptr + slot * _NUM_FLOATS
    temperature, top_p = tl.load(settings + _TEMPERATURE), tl.load(settings + _TOP_P)
    floor = tl.load(settings + _MIN_P)
    if temperature >= _GREEDY_BELOW:
        start = weights_ptr + row * weights_stride
        top_k = tl.load(words_ptr + slot * _NUM_WORDS + _TOP_K)
        none = floor.to(tl.int32, bitcast=True) * 0
        if top_k > 0:
            # The k-th largest: less than k are larger.
            kth = _least_with(start, none - 1, top_k.to(tl.float32), none, False, VOCAB_SIZE, BLOCK)
            floor = tl.maximum(floor, kth.to(tl.int32).to(tl.float32, bitcast=True))
        if top_p < 1:
            least = floor.to(tl.int32, bitcast=True)
            total, _, _ = _above(start, least - 1, least, least, least, True, VOCAB_SIZE, BLOCK)
            nucleus = _least_with(start, least - 1, top_p * total, least, True, VOCAB_SIZE, BLOCK)
            floor = tl.maximum(floor, nucleus.to(tl.int32).to(tl.float32, bitcast=True))
    tl.store(floors_ptr + row, floor)


@triton.jit
def _exponentials(seed, index, position, first_quarter, QUARTERS: tl.constexpr):
    """float64, of the tokens of some quarters: -log(1 - (word + 1/2) / 2^32). The difference is exact."""
    quarters = first_quarter + tl.arange(0, QUARTERS)
    zeros = quarters * 0
    a, b, c, d = tl.philox(seed, position.to(tl.int32) + zeros, index.to(tl.int32) + zeros, quarters, zeros)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    uniform = (words.to(tl.uint32).to(tl.float64) + 0.5) * (1.0 / 4294967296.0)
    return -tl.log(1.0 - uniform)


@triton.jit
def _race_kernel(
    weights_ptr, slots_ptr, positions_ptr, floats_ptr, words_ptr, floors_ptr, ratios_ptr, ids_ptr,
    weights_stride, vocab_size, num_chunks,
    FILTERS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_ptr + row)
    if tl.load(floats_ptr + slot * _NUM_FLOATS + _TEMPERATURE) >= _GREEDY_BELOW:
        tokens = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = tokens < vocab_size
        weights = tl.load(weights_ptr + row * weights_stride + tokens, mask=inside, other=0.0)
        if FILTERS:
            floor = tl.load(floors_ptr + row)
        else:
            floor = tl.load(floats_ptr + slot * _NUM_FLOATS + _MIN_P)
        weights = tl.where(weights >= floor, weights, 0.0)
        seed = tl.load(words_ptr + slot * _NUM_WORDS + _SEED)
        index = tl.load(words_ptr + slot * _NUM_WORDS + _INDEX)
        race = _exponentials(seed, index, tl.load(positions_ptr + row), chunk * (CHUNK // 4), CHUNK // 4)
        ratios = tl.where(inside, weights.to(tl.float64) / race, -1.0)
        best = tl.max(ratios, axis=0)
        tl.store(ratios_ptr + row * num_chunks + chunk, best)
        tl.store(ids_ptr + row * num_chunks + chunk, tl.min(tl.where(ratios == best, tokens, vocab_size), axis=0))


@triton.jit
def _finish_kernel(
    slots_ptr, floats_ptr, words_ptr, counts_ptr, peaks_ptr, peak_ids_ptr, ratios_ptr, ids_ptr,
    tokens_ptr, row_peaks_ptr, vocab_size, num_chunks,
    DRAWS: tl.constexpr, PENALISES: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    peak, chunk = _peak(peaks_ptr, row, num_chunks, CHUNKS)
    token = tl.load(peak_ids_ptr + row * num_chunks + chunk)
    if DRAWS:
        temperature = tl.load(floats_ptr + slot * _NUM_FLOATS + _TEMPERATURE)
        if temperature >= _GREEDY_BELOW:
            chunks = tl.arange(0, CHUNKS)
            ratios = tl.load(ratios_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=-2.0)
            best = tl.max(ratios, axis=0)
            winner = tl.min(tl.where(ratios == best, chunks, CHUNKS), axis=0)
            token = tl.load(ids_ptr + row * num_chunks + tl.minimum(winner, num_chunks - 1))
    # A row of NaN has no largest; its token is reported as failed, but it must be one.
    token = tl.minimum(token, vocab_size - 1)
    if PENALISES:
        penalty_row = tl.load(words_ptr + slot * _NUM_WORDS + _PENALTY_ROW)
        if penalty_row >= 0:
            place = counts_ptr + penalty_row * vocab_size + token
            tl.store(place, tl.load(place) + 1)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(row_peaks_ptr + row, peak)


def sample(
    logits_SV: Tensor, slots_S: Tensor, positions_S: Tensor, settings: Settings, needs: Needs
) -> tuple[Tensor, Tensor]:
    """Tokens (S), int64, and the largest penalised logit of each row (S), float32: not finite where none can be drawn.

    Logits are float32 and are overwritten; slots and positions int64, all on one device. Penalised sequences have the
    token counted, and may occur but once.
    """
    rows, vocab_size = logits_SV.shape
    if logits_SV.dtype != torch.float32 or logits_SV.stride(1) != 1:
        raise ValueError(f"logits must be float32 with adjacent tokens, got {logits_SV.dtype}")
    device = logits_SV.device
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    chunks = triton.next_power_of_2(num_chunks)
    grid = (rows, num_chunks)
    stride, floats, words, counts = logits_SV.stride(0), settings.floats, settings.words, settings.counts_PV
    penalises = counts is not None
    peaks_SC = torch.empty(grid, dtype=torch.float32, device=device)
    peak_ids_SC = torch.empty(grid, dtype=torch.int32, device=device)
    ratios_SC = torch.empty(grid if needs.draws else (0,), dtype=torch.float64, device=device)
    ids_SC = torch.empty(grid if needs.draws else (0,), dtype=torch.int32, device=device)
    tokens_S = torch.empty(rows, dtype=torch.int64, device=device)
    row_peaks_S = torch.empty(rows, dtype=torch.float32, device=device)
    if not rows:
        return tokens_S, row_peaks_S
    _prepare_kernel[grid](
        logits_SV, slots_S, floats, words, counts, peaks_SC, peak_ids_SC, stride, vocab_size, num_chunks,
        PENALISES=penalises, CHUNK=CHUNK, num_warps=8,
    )  # fmt: skip
    if needs.draws:
        _weigh_kernel[grid](
            logits_SV, slots_S, floats, peaks_SC, stride, vocab_size, num_chunks,
            CHUNK=CHUNK, CHUNKS=chunks, num_warps=8,
        )  # fmt: skip
        floors_S = torch.empty(rows, dtype=torch.float32, device=device)
        if needs.filters:
            _floor_kernel[(rows,)](
                logits_SV, slots_S, floats, words, floors_S, stride,
                VOCAB_SIZE=vocab_size, BLOCK=_BISECTION_BLOCK, num_warps=32,
            )  # fmt: skip
        _race_kernel[grid](
            logits_SV, slots_S, positions_S, floats, words, floors_S, ratios_SC, ids_SC, stride, vocab_size, num_chunks,
            FILTERS=needs.filters, CHUNK=CHUNK, num_warps=8,
        )  # fmt: skip
    _finish_kernel[(rows,)](
        slots_S, floats, words, counts, peaks_SC, peak_ids_SC, ratios_SC, ids_SC,
        tokens_S, row_peaks_S, vocab_size, num_chunks,
        DRAWS=needs.draws, PENALISES=penalises, CHUNKS=chunks, num_warps=1,
    )  # fmt: skip
    return tokens_S, row_peaks_S


def argmax(x_SV: Tensor) -> Tensor:
    """Index of the largest element of each row, the lowest such index, int64 (S)."""
    rows, vocab_size = x_SV.shape
    settings = Settings(x_SV.new_zeros((1, len(FLOATS))), x_SV.new_zeros((1, len(WORDS)), dtype=torch.int64), None)
    slots_S = x_SV.new_zeros(rows, dtype=torch.int64)
    # Greedy and without penalties nothing is written over the logits.
    return sample(x_SV, slots_S, slots_S, settings, Needs(draws=False, filters=False))[0]


def draw(weights_SV: Tensor, seeds_S: Tensor, indices_S: Tensor, positions_S: Tensor) -> Tensor:
    """A token of each row in proportion to its weights, float32 and not negative. The numbers are int64: (S)."""
    rows, vocab_size = weights_SV.shape
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    device = weights_SV.device
    ratios_SC = torch.empty((rows, num_chunks), dtype=torch.float64, device=device)
    ids_SC = torch.empty((rows, num_chunks), dtype=torch.int32, device=device)
    floats = torch.zeros((rows, len(FLOATS)), dtype=torch.float32, device=device)
    floats[:, FLOATS.index("temperature")] = 1.0
    words = torch.zeros((rows, len(WORDS)), dtype=torch.int64, device=device)
    words[:, WORDS.index("seed")], words[:, WORDS.index("index")] = seeds_S, indices_S
    slots_S = torch.arange(rows, device=device)
    if rows:
        _race_kernel[(rows, num_chunks)](
            weights_SV, slots_S, positions_S, floats, words, floats, ratios_SC, ids_SC,
            weights_SV.stride(0), vocab_size, num_chunks, FILTERS=False, CHUNK=CHUNK, num_warps=8,
        )  # fmt: skip
    # Of equal chunks the first.
    best_S1 = (ratios_SC == ratios_SC.amax(dim=1, keepdim=True)).int().argmax(dim=1, keepdim=True)
    return ids_SC.gather(1, best_S1)[:, 0].long()
