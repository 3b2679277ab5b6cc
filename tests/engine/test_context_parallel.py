"""Who keeps which token, what windows leave of that, and that shares of a step's attention merge to the whole."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.engine.comm.base import Comm, NullComm
from shoal.engine.comm.shared_memory import SharedMemoryComm
from shoal.engine.context_parallel import KeptTokens, TokenShares
from shoal.engine.native import unavailable_reason


class Place(NullComm):
    """A rank's, for what asks for nothing else."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


@given(st.integers(0, 500), st.sampled_from([16, 32]), st.integers(1, 5))
def test_every_token_is_kept_by_one_rank_and_blocks_fill_in_turn(num_tokens: int, block_size: int, size: int) -> None:
    ranks = [KeptTokens(block_size, Place(rank, size)) for rank in range(size)]
    counts = [int(rank.count(np.array([num_tokens]))[0]) for rank in ranks]
    assert sum(counts) == num_tokens
    assert max(counts) - min(counts) <= block_size and counts == sorted(counts, reverse=True)
    positions = np.arange(num_tokens)
    grown = np.stack([rank.count(positions + 1) - rank.count(positions) for rank in ranks])
    assert (grown == np.stack([rank.has(positions) for rank in ranks])).all()
    assert (grown.sum(axis=0) == 1).all()


def on_ranks(size: int, directory: Path, work: Callable[[Comm], Tensor]) -> list[Tensor]:
    """What each rank of a group, a thread each, makes of `work`."""
    path = str(directory / secrets.token_hex(4))
    SharedMemoryComm.create(path, size, 1 << 20)
    results: dict[int, Tensor] = {}

    def run(rank: int) -> None:
        comm = SharedMemoryComm(path, rank, size, timeout=20)
        results[rank] = work(comm)
        comm.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(size)]


needs_native = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))


@needs_native
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 2), (7, 2), (8, 2), (2, 3), (10, 4)])
def test_shares_are_equal_and_all_of_them_are_everything(num_tokens: int, size: int, tmp_path: Path) -> None:
    x = torch.randn(num_tokens, 5)

    def work(comm: Comm) -> Tensor:
        shares = TokenShares(num_tokens, comm)
        own = shares.own(x)
        assert len(own) == shares.size == -(-num_tokens // size)
        return shares.all(own)

    assert all(torch.equal(result, x) for result in on_ranks(size, tmp_path, work))


def attend(q_TND: Tensor, k_LND: Tensor, v_LND: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("tnd,lnd->tnl", q_TND, k_LND)
    return torch.einsum("tnl,lnd->tnd", scores.softmax(-1), v_LND), scores.logsumexp(-1)


@needs_native
@pytest.mark.parametrize("size", [2, 3])
def test_parts_of_attention_merge_to_the_whole_on_the_rank_whose_share_it_is(size: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 3, 8, generator=generator) for n in (5, 20, 20))
    expected, _ = attend(q, k, v)
    expected[0] = attend(q[:1], k[7:], v[7:])[0][0]
    cuts = [0, 7, 13, 20] if size == 3 else [0, 7, 20]

    def work(comm: Comm) -> Tensor:
        shares, part = TokenShares(len(q), comm), slice(cuts[comm.rank], cuts[comm.rank + 1])
        out, lse = attend(q, k[part], v[part])
        if comm.rank == 0:  # token 0 sees nothing there
            out[0], lse[0] = 0.0, float("-inf")
        return shares.all(shares.merge(out, lse))

    results = on_ranks(size, tmp_path, work)
    for result in results:
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(result, results[0])


def test_a_group_of_one_moves_nothing() -> None:
    shares, x = TokenShares(3, NullComm()), torch.randn(3, 4)
    assert shares.size == 3 and shares.own(x) is x and shares.all(x) is x and shares.merge(x, None) is x
