"""Which experts each token visits, and the order that puts the rows of one expert side by side: all on the device.

Shapes: T tokens, E experts of the model, K experts that a token visits, R = T K rows, each a token on its way to one
expert, L experts that are here, G groups of experts, J experts of a group, B rows of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.core.model_spec import MoESpec

_NEVER: tl.constexpr = tl.constexpr(-3.0e38)
"""Rank of an expert that cannot be chosen, above that of one that was."""
_SCAN = 1024


@triton.jit
def _largest(x, places, LAST: tl.constexpr):
    """The largest of a tile [G, J], and the least of `places` that has it."""
    value = tl.max(tl.max(x, axis=1), axis=0)
    return value, tl.min(tl.min(tl.where(x == value, places, LAST), axis=1), axis=0)


@triton.jit
def _of_best_groups(
    ranked, groups, members, NUM_GROUPS: tl.constexpr, BEST: tl.constexpr, G: tl.constexpr, J: tl.constexpr
):
    """The same with _NEVER outside the best groups, each as good as its two best members together."""
    first = tl.max(ranked, axis=1)
    first_at = tl.min(tl.where(ranked == first[:, None], members[None, :], J), axis=1)
    second = tl.max(tl.where(members[None, :] == first_at[:, None], -float("inf"), ranked), axis=1)
    worth = tl.where(groups < NUM_GROUPS, first + second, -float("inf"))
    taken = groups < 0
    for _ in tl.static_range(BEST):
        left = tl.where(taken, -float("inf"), worth)
        best = tl.min(tl.where((left == tl.max(left, axis=0)) & (taken == 0), groups, G), axis=0)
        taken = taken | (groups == best)
    return tl.where(taken[:, None], ranked, tl.where(ranked == -float("inf"), ranked, _NEVER))


@triton.jit
def _route_kernel(
    logits_ptr, correction_ptr, ids_ptr, weights_ptr, logits_stride, scaling,
    NUM_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, BEST_GROUPS: tl.constexpr, VISITS: tl.constexpr,
    IS_SIGMOID: tl.constexpr, HAS_CORRECTION: tl.constexpr, IS_NORMALISED: tl.constexpr,
    G: tl.constexpr, J: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One token. Experts are a tile of groups, padded with -inf to powers of two."""
    token = tl.program_id(0).to(tl.int64)
    groups, members = tl.arange(0, G), tl.arange(0, J)
    inside = (groups < NUM_GROUPS)[:, None] & (members < GROUP_SIZE)[None, :]
    experts = groups[:, None] * GROUP_SIZE + members[None, :]
    logits = tl.load(logits_ptr + token * logits_stride + experts, mask=inside, other=-float("inf")).to(tl.float32)
    if IS_SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        scores = tl.exp(logits - tl.max(tl.max(logits, axis=1), axis=0))
        scores = scores / tl.sum(tl.sum(scores, axis=1), axis=0)
    ranked = scores
    if HAS_CORRECTION:
        ranked = scores + tl.load(correction_ptr + experts, mask=inside, other=0.0)
    ranked = tl.where(inside, ranked, -float("inf"))
    if NUM_GROUPS > 1:
        ranked = _of_best_groups(ranked, groups, members, NUM_GROUPS, BEST_GROUPS, G, J)

    visits = tl.arange(0, K)
    chosen = tl.zeros([K], tl.int32)
    weights = tl.zeros([K], tl.float32)
    total = tl.sum(weights, axis=0)
    for visit in tl.static_range(VISITS):
        _, best = _largest(ranked, experts, NUM_GROUPS * GROUP_SIZE)
        # A row of NaN has no largest: any expert will do.
        best = tl.minimum(best, NUM_GROUPS * GROUP_SIZE - 1)
        weight = tl.sum(tl.sum(tl.where(experts == best, tl.where(inside, scores, 0.0), 0.0), axis=1), axis=0)
        ranked = tl.where(experts == best, -float("inf"), ranked)
        chosen = tl.where(visits == visit, best, chosen)
        weights = tl.where(visits == visit, weight, weights)
        total += weight
    if IS_NORMALISED:
        weights = weights / (total + 1e-20)  # sigmoids may all be 0
    place = token * VISITS + visits
    tl.store(ids_ptr + place, chosen.to(tl.int64), mask=visits < VISITS)
    tl.store(weights_ptr + place, weights * scaling, mask=visits < VISITS)


def route(logits_TE: Tensor, spec: MoESpec, correction_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """Experts' numbers (T, K), int64, best first, the lowest among equals, and their weights (T, K), float32.

    `correction_E`, float32, is added to scores while experts are chosen.
    """
    num_tokens, visits = len(logits_TE), spec.num_experts_per_token
    if logits_TE.shape[1] != spec.num_experts or logits_TE.stride(1) != 1:
        raise ValueError(f"there are {spec.num_experts} experts, and logits are {tuple(logits_TE.shape)}")
    if correction_E is not None and (correction_E.shape != (spec.num_experts,) or correction_E.dtype != torch.float32):
        raise ValueError(f"corrections must be {spec.num_experts} float32, got {tuple(correction_E.shape)}")
    ids_TK = torch.empty((num_tokens, visits), dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty((num_tokens, visits), dtype=torch.float32, device=logits_TE.device)
    group_size = spec.num_experts // spec.num_groups
    groups, members = triton.next_power_of_2(spec.num_groups), triton.next_power_of_2(group_size)
    if num_tokens:
        _route_kernel[(num_tokens,)](
            logits_TE, correction_E, ids_TK, weights_TK, logits_TE.stride(0), spec.scaling,
            NUM_GROUPS=spec.num_groups, GROUP_SIZE=group_size, BEST_GROUPS=spec.num_groups_per_token, VISITS=visits,
            IS_SIGMOID=spec.scoring == "sigmoid", HAS_CORRECTION=correction_E is not None,
            IS_NORMALISED=spec.normalised, G=groups, J=members, K=triton.next_power_of_2(visits),
            num_warps=1 if groups * members <= 256 else 4,
        )  # fmt: skip
    return ids_TK, weights_TK


# --- the order of rows --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Rows by expert, and tiles of them. What is behind the last tile has expert -1."""

    order_R: Tensor
    """int32: rows of the first expert, in their order, then of the second; undefined behind the last expert's."""
    starts_L1: Tensor
    """int32: where each expert's rows begin in `order_R`, and where the last one's end."""
    tile_experts: Tensor
    tile_starts: Tensor
    """int32: each tile's expert, and where in `order_R` it begins. As many as there can be for so many rows."""


@triton.jit
def _order_kernel(local_ptr, order_ptr, starts_ptr, num_rows, num_experts, SCAN: tl.constexpr):
    """One expert: counts the rows of those before it, then puts its own behind them, in their order."""
    expert = tl.program_id(0)
    before = tl.zeros([SCAN], tl.int32)
    start = 0
    while start < num_rows:
        rows = start + tl.arange(0, SCAN)
        local = tl.load(local_ptr + rows, mask=rows < num_rows, other=-1)
        before += ((local >= 0) & (local < expert)).to(tl.int32)
        start += SCAN
    next_place = tl.sum(before, axis=0)
    tl.store(starts_ptr + expert, next_place)
    start = 0
    while start < num_rows:
        rows = start + tl.arange(0, SCAN)
        is_own = tl.load(local_ptr + rows, mask=rows < num_rows, other=-1) == expert
        rank = tl.cumsum(is_own.to(tl.int32), axis=0)
        tl.store(order_ptr + next_place + rank - 1, rows, mask=is_own)
        next_place += tl.sum(is_own.to(tl.int32), axis=0)
        start += SCAN
    if expert == num_experts - 1:
        tl.store(starts_ptr + num_experts, next_place)


@triton.jit
def _tiles_kernel(
    starts_ptr, tile_experts_ptr, tile_starts_ptr, num_experts, num_tiles,
    TILE: tl.constexpr, EXPERTS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """One expert: its tiles, behind those of the experts before it. The last one also marks the tiles left over."""
    expert = tl.program_id(0)
    others = tl.arange(0, EXPERTS)
    is_before = others < expert
    counts = tl.load(starts_ptr + others + 1, mask=is_before, other=0) - tl.load(
        starts_ptr + others, mask=is_before, other=0
    )
    first = tl.sum((counts + TILE - 1) // TILE, axis=0)
    start = tl.load(starts_ptr + expert)
    own = (tl.load(starts_ptr + expert + 1) - start + TILE - 1) // TILE
    done = first * 0
    while done < own:
        tiles = done + tl.arange(0, SCAN)
        tl.store(tile_experts_ptr + first + tiles, tiles * 0 + expert, mask=tiles < own)
        tl.store(tile_starts_ptr + first + tiles, start + tiles * TILE, mask=tiles < own)
        done += SCAN
    if expert == num_experts - 1:
        done = first + own
        while done < num_tiles:
            tiles = done + tl.arange(0, SCAN)
            tl.store(tile_experts_ptr + tiles, tiles * 0 - 1, mask=tiles < num_tiles)
            done += SCAN


def schedule(local_R: Tensor, num_experts: int, tile: int) -> Schedule:
    """Sort rows by their local experts (int64 or int32; below 0 is none) into tiles of so many rows."""
    num_rows, device = local_R.numel(), local_R.device
    # Every tile but each expert's last is full, and an expert without rows has none.
    num_tiles = num_rows // tile + min(num_experts, num_rows)
    order_R = torch.empty(num_rows, dtype=torch.int32, device=device)
    starts_L1 = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    tile_experts = torch.empty(num_tiles, dtype=torch.int32, device=device)
    tile_starts = torch.empty(num_tiles, dtype=torch.int32, device=device)
    scan = min(_SCAN, max(32, triton.next_power_of_2(num_rows)))
    _order_kernel[(num_experts,)](local_R, order_R, starts_L1, num_rows, num_experts, SCAN=scan, num_warps=4)
    _tiles_kernel[(num_experts,)](
        starts_L1, tile_experts, tile_starts, num_experts, num_tiles,
        TILE=tile, EXPERTS=triton.next_power_of_2(num_experts), SCAN=64, num_warps=2,
    )  # fmt: skip
    return Schedule(order_R, starts_L1, tile_experts, tile_starts)
