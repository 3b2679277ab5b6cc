"""Philox against its published answers; the stream as a pure function with the right distribution."""

import numpy as np
import pytest

from shoal.engine.random_stream import as_words, philox4x32, uniform, uniform_array

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


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    words = philox4x32(
        tuple(np.array([word], dtype=np.uint64) for word in counter),
        tuple(np.array([word], dtype=np.uint64) for word in key),
    )
    assert tuple(int(word[0]) for word in words) == expected


def test_uniform_known_answers():
    """Fixed for good: another machine that continues a sequence must draw the same."""
    assert uniform(0, 0, 0) == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53
    assert uniform(-1, 0, 5) == 0.4311373818027474
    assert uniform(42, 1, 100) == 0.5066584693999376


def test_seed_index_and_position_each_matter_beyond_32_bits():
    base = (1, 2, 3)
    for axis in range(3):
        for change in (1, 1 << 32, 1 << 60):
            other = list(base)
            other[axis] += change
            assert uniform(*base) != uniform(*other)
    assert uniform(5, 0, 0) == uniform(5 + (1 << 64), 0, 0), "seeds are taken modulo 2^64"


def test_array_equals_single_calls_in_any_order():
    seeds, indices, positions = as_words([7, -3, 2**63]), as_words([0, 1, 2]), as_words([10, 20, 30])
    together = uniform_array(seeds, indices, positions)
    single = [uniform(s, i, p) for s, i, p in zip([7, -3, 2**63], [0, 1, 2], [10, 20, 30], strict=True)]
    assert together.tolist() == single
    assert uniform_array(seeds[::-1], indices[::-1], positions[::-1]).tolist() == single[::-1]


def test_uniform_over_positions_and_over_neighbouring_seeds():
    """Chi-square of 64 cells; 63 degrees of freedom, 103.4 is the 0.1% point."""
    count = 20_000
    along = np.arange(count, dtype=np.uint64)
    fixed = np.full(count, 11, dtype=np.uint64)
    for values in (
        uniform_array(fixed, fixed, along),
        uniform_array(along, fixed, fixed),
        uniform_array(fixed, along, fixed),
    ):
        assert values.min() >= 0 and values.max() < 1
        observed = np.bincount((values * 64).astype(int), minlength=64)
        assert ((observed - count / 64) ** 2 / (count / 64)).sum() < 103.4
        # Neighbours are not correlated: 4 standard deviations of 1 / sqrt(count).
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / np.sqrt(count)
