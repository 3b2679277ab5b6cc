"""Who keeps which token, and that parts of attention merge to the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.engine.attention.base import AttentionBatch
from shoal.engine.comm.base import NullComm
from shoal.engine.context_parallel import kept_tokens, merge


@given(st.integers(0, 500), st.sampled_from([16, 32]), st.integers(1, 5))
def test_every_token_is_kept_by_one_rank_and_blocks_fill_in_turn(num_tokens: int, block_size: int, size: int) -> None:
    kept = [int(kept_tokens(np.array([num_tokens]), block_size, rank, size)[0]) for rank in range(size)]
    assert sum(kept) == num_tokens
    assert max(kept) - min(kept) <= block_size and kept == sorted(kept, reverse=True)
    for position in range(num_tokens):
        owner = position % (block_size * size) // block_size
        more = [int(kept_tokens(np.array([position + 1]), block_size, rank, size)[0]) for rank in range(size)]
        less = [int(kept_tokens(np.array([position]), block_size, rank, size)[0]) for rank in range(size)]
        assert [a - b for a, b in zip(more, less, strict=True)] == [int(rank == owner) for rank in range(size)]


class Together(NullComm):
    """A group whose other ranks' tensors are known beforehand, in the order in which they are gathered."""

    def __init__(self, others: list[Tensor]) -> None:
        self._others = others

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack([x, self._others.pop(0)])


def attend(q_TND: Tensor, k_LND: Tensor, v_LND: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("tnd,lnd->tnl", q_TND, k_LND)
    return torch.einsum("tnl,lnd->tnd", scores.softmax(-1), v_LND), scores.logsumexp(-1)


@pytest.mark.parametrize("blind", [False, True])
def test_two_parts_of_attention_merge_to_the_whole(blind: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 3, 8, generator=generator) for n in (2, 20, 20))
    here, there = attend(q, k[:7], v[:7]), attend(q, k[7:], v[7:])
    expected, _ = attend(q, k, v)
    batch = AttentionBatch(*[torch.empty(0)] * 4, 1, 1)  # type: ignore[arg-type]
    if blind:  # token 0 sees nothing here, and what was computed for it is anything at all
        expected[0] = there[0][0]
        here[0][0] = float("nan")
        batch = AttentionBatch(*[torch.empty(0)] * 4, 1, 1, blind_T=torch.tensor([0]))  # type: ignore[arg-type]
    merged = merge(*here, batch, Together([there[1], there[0]]))
    torch.testing.assert_close(merged, expected, atol=1e-6, rtol=1e-5)
