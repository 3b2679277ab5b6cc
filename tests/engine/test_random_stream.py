"""Philox against its published answers; the stream as a pure function with the right distribution."""

import math

import numpy as np
import pytest
import torch

from shoal.engine.random_stream import as_words, exponentials, philox4x32

CPU = torch.device("cpu")
# From the known-answer file of Random123, the authors' own library (philox4x32, 10 rounds).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def numbers(seed, index, position, vocab_size=8):
    return exponentials(as_words([seed]), as_words([index]), as_words([position]), vocab_size, CPU)[0].tolist()


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), tuple(torch.tensor([word]) for word in key))
    assert tuple(int(word[0]) for word in words) == expected


def test_known_answers():
    """Fixed for good: another machine that continues a sequence must draw the same."""
    expected = [-math.log1p(-(word + 0.5) / 2**32) for word in KNOWN_ANSWERS[0][2]]
    assert numbers(0, 0, 0)[:4] == pytest.approx(expected, rel=1e-12)
    words = philox4x32(tuple(map(torch.tensor, (5, 0, 1, 0))), tuple(map(torch.tensor, (0xFFFFFFFF, 0xFFFFFFFF))))
    assert numbers(-1, 0, 5)[4:] == pytest.approx([-math.log1p(-(int(w) + 0.5) / 2**32) for w in words], rel=1e-12)


def test_seed_index_position_and_token_each_matter():
    base = numbers(1, 2, 3)
    assert len(set(base)) == 8
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1 + (1 << 32), 2, 3), (1 + (1 << 60), 2, 3)):
        assert not set(base) & set(numbers(*other))
    assert numbers(5, 0, 0) == numbers(5 + (1 << 64), 0, 0), "seeds are taken modulo 2^64"


def test_rows_equal_single_rows_in_any_order_and_any_vocabulary():
    seeds, indices, positions = as_words([7, -3, 2**63]), as_words([0, 1, 2]), as_words([10, 20, 30])
    together = exponentials(seeds, indices, positions, 8, CPU).tolist()
    assert together == [numbers(s, i, p) for s, i, p in zip([7, -3, 2**63], [0, 1, 2], [10, 20, 30], strict=True)]
    assert exponentials(seeds[::-1], indices[::-1], positions[::-1], 8, CPU).tolist() == together[::-1]
    assert exponentials(seeds, indices, positions, 5, CPU).tolist() == [row[:5] for row in together]


def test_exponential_over_positions_tokens_and_neighbouring_seeds():
    """Chi-square of 64 cells of equal probability; 63 degrees of freedom, 103.4 is the 0.1% point."""
    count = 20_000
    along, fixed = np.arange(count, dtype=np.uint64), np.full(count, 11, dtype=np.uint64)
    one = np.full(1, 11, dtype=np.uint64)
    for values in (
        exponentials(fixed, fixed, along, 1, CPU)[:, 0],
        exponentials(along, fixed, fixed, 1, CPU)[:, 0],
        exponentials(fixed, along, fixed, 3, CPU)[:, 2],
        exponentials(one, one, one, count, CPU)[0],
    ):
        assert values.min() > 0
        uniform = -np.expm1(-values.numpy())
        observed = np.bincount((uniform * 64).astype(int), minlength=64)
        assert ((observed - count / 64) ** 2 / (count / 64)).sum() < 103.4
        # Neighbours are not correlated: 4 standard deviations of 1 / sqrt(count).
        assert abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 4 / np.sqrt(count)
