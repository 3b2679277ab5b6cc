"""Shares of a step's tokens: what is split and gathered is what was there, and sums are the same bits either way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from shoal.engine.comm.base import Comm, NullComm
from shoal.engine.native import unavailable_reason
from shoal.engine.token_split import Replicated, Split, token_split
from tests.engine.comm.threads import together

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 64, 65]
HIDDEN = 24


def part(rank: int, num_tokens: int) -> Tensor:
    """What a rank contributes."""
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(100 * num_tokens + rank))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_of_own_tokens_are_those_of_all_and_gathering_brings_all_back(tmp_path: Path, size: int) -> None:
    def body(comm: Comm) -> list[tuple[int, Tensor, Tensor, Tensor]]:
        results, split, replicated = [], Split(comm), Replicated(comm)
        for length in LENGTHS:
            num_own = split.begin(length)
            assert replicated.begin(length) == length
            own_OH = split.sum(part(comm.rank, length))
            all_TH = replicated.sum(part(comm.rank, length))
            assert replicated.gather(all_TH) is all_TH
            results.append((num_own, own_OH, all_TH, split.gather(own_OH)))
        return results

    by_rank = together(tmp_path, size, body)
    for at, length in enumerate(LENGTHS):
        own = [results[at][0] for results in by_rank]
        assert sum(own) == length and max(own) == -(-length // size)
        expected_TH = by_rank[0][at][2]
        assert torch.equal(torch.cat([results[at][1] for results in by_rank]), expected_TH)
        for num_own, own_OH, all_TH, gathered_TH in (results[at] for results in by_rank):
            assert own_OH.shape == (num_own, HIDDEN) and own_OH.is_contiguous()
            assert torch.equal(all_TH, expected_TH) and torch.equal(gathered_TH, expected_TH)
            assert gathered_TH.is_contiguous()


def test_the_dispatch_says_whether_tokens_are_split() -> None:
    assert isinstance(token_split("replicate", NullComm()), Replicated)
    assert isinstance(token_split("all_gather", NullComm()), Split)
    assert isinstance(token_split("all_to_all", NullComm()), Split)
