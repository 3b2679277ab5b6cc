"""Random numbers as a pure function of (seed, index, position, token): the same on every machine and in any batch.

Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as
1, 2, 3" (SC 2011). The key is the seed; the counter is the sequence's index, the position and a quarter of the token
id, and the four words of a counter are of four neighbouring tokens. A sequence that is preempted, chunked otherwise, or
continued on another machine asks for the same numbers.

Shapes: S rows, V vocabulary, Q = ceil(V / 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UInt64Array = NDArray[np.uint64]

_MASK_32 = 0xFFFF_FFFF
_MULTIPLIERS = (0xD251_1F53, 0xCD9E_8D57)
# The key is bumped by these after every round: the golden ratio and sqrt(3) - 1, in 32 bits.
_WEYL = (0x9E37_79B9, 0xBB67_AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four 32-bit words for each counter of four and key of two 32-bit words.

    Every tensor is int64 and holds values in [0, 2^32); shapes broadcast.
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # Products wrap around to negative numbers: the shift brings copies of the sign, which the mask takes away.
        product_0, product_1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            ((product_1 >> 32) & _MASK_32) ^ x1 ^ k0,
            product_1 & _MASK_32,
            ((product_0 >> 32) & _MASK_32) ^ x3 ^ k1,
            product_0 & _MASK_32,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK_32, (k1 + _WEYL[1]) & _MASK_32
    return x0, x1, x2, x3


def exponentials(
    seeds_S: UInt64Array, indices_S: UInt64Array, positions_S: UInt64Array, vocab_size: int, device: torch.device
) -> Tensor:
    """Exponentially distributed numbers with mean 1, float64 (S, V) on the device: one for each row and token.

    Of a word w of Philox it is -log(1 - (w + 1/2) / 2^32). Positions and indices are taken modulo 2^32.
    """

    def column(words_S: UInt64Array) -> Tensor:
        return torch.from_numpy((words_S & np.uint64(_MASK_32)).astype(np.int64))[:, None].to(device)

    quarters_Q = torch.arange(-(-vocab_size // 4), device=device)[None]
    words = philox4x32(
        (column(positions_S), column(indices_S), quarters_Q, torch.zeros_like(quarters_Q)),
        (column(seeds_S), column(seeds_S >> np.uint64(32))),
    )
    words_SV = torch.stack(words, dim=2).flatten(1)[:, :vocab_size]
    return -torch.log1p(-((words_SV.double() + 0.5) * 2.0**-32))


def as_words(values: Sequence[int]) -> UInt64Array:
    """Python ints of any sign and size, modulo 2^64: seeds come from clients, and -1 is a fine one."""
    return np.array([value & 0xFFFF_FFFF_FFFF_FFFF for value in values], dtype=np.uint64)
