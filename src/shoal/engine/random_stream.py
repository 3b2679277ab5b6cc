"""Random numbers as a pure function of (seed, index, position): the same on every machine, in any order, in any batch.

Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as
1, 2, 3" (SC 2011). The key is the seed; the counter is (position, index). A sequence that is preempted, chunked
otherwise, or continued on another machine asks for the same positions and gets the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

UInt64Array = NDArray[np.uint64]

_MASK_32 = np.uint64(0xFFFF_FFFF)
_SHIFT_32 = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD251_1F53), np.uint64(0xCD9E_8D57))
# The key is bumped by these after every round: the golden ratio and sqrt(3) - 1, in 32 bits.
_WEYL = (np.uint64(0x9E37_79B9), np.uint64(0xBB67_AE85))
_ROUNDS = 10


def philox4x32(
    counter: tuple[UInt64Array, UInt64Array, UInt64Array, UInt64Array], key: tuple[UInt64Array, UInt64Array]
) -> tuple[UInt64Array, UInt64Array, UInt64Array, UInt64Array]:
    """Four 32-bit words for each counter of four and key of two 32-bit words.

    Every array holds 32-bit values in uint64, so that a product of two fits; all have one shape.
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0 = x0 * _MULTIPLIERS[0]
        product_1 = x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            (product_1 >> _SHIFT_32) ^ x1 ^ k0,
            product_1 & _MASK_32,
            (product_0 >> _SHIFT_32) ^ x3 ^ k1,
            product_0 & _MASK_32,
        )
        k0 = (k0 + _WEYL[0]) & _MASK_32
        k1 = (k1 + _WEYL[1]) & _MASK_32
    return x0, x1, x2, x3


def uniform_array(seeds: UInt64Array, indices: UInt64Array, positions: UInt64Array) -> NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits for each (seed, index, position). The arrays have one shape."""
    x0, x1, _, _ = philox4x32(
        (positions & _MASK_32, positions >> _SHIFT_32, indices & _MASK_32, indices >> _SHIFT_32),
        (seeds & _MASK_32, seeds >> _SHIFT_32),
    )
    # The upper 27 bits of one word and the upper 26 of the other make the 53 bits of a double's significand.
    mantissa = ((x0 >> np.uint64(5)) << np.uint64(26)) | (x1 >> np.uint64(6))
    return mantissa.astype(np.float64) * 2.0**-53


def as_words(values: Sequence[int]) -> UInt64Array:
    """Python ints of any sign and size, modulo 2^64: seeds come from clients, and -1 is a fine one."""
    return np.array([value & 0xFFFF_FFFF_FFFF_FFFF for value in values], dtype=np.uint64)


def uniform(seed: int, index: int, position: int) -> float:
    """The number in [0, 1) with which sequence `index` of a request draws its token at `position`."""
    return float(uniform_array(as_words([seed]), as_words([index]), as_words([position]))[0])
