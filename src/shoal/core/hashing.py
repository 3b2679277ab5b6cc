"""Chained hashes of KV blocks: equal hash means equal tokens at equal positions under the same salt.

The hash of a block covers its parent's, so one lookup identifies the whole prefix. It is the same in every process
and on every machine (fixed algorithm, little-endian ids), so a router may compute it as well as an engine. 128 bits of
BLAKE2b: a collision would hand one client another's KV, so nothing weaker than a cryptographic hash will do.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

DIGEST_BYTES = 16


def root_hash(salt: str) -> bytes:
    """Parent of a sequence's first block. Different salts never share a block."""
    return blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES, person=b"shoal-kv-root").digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a full block whose predecessor hashes to `parent`. Token ids are in [0, 2**32)."""
    return blake2b(
        parent + _packer(len(token_ids)).pack(*token_ids), digest_size=DIGEST_BYTES, person=b"shoal-kv-block"
    ).digest()


@lru_cache(maxsize=64)
def _packer(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}I")


def chain(token_ids: Sequence[int], block_size: int, salt: str = "") -> list[bytes]:
    """Hashes of all full blocks of a sequence, first block first."""
    hashes: list[bytes] = []
    parent = root_hash(salt)
    for end in range(block_size, len(token_ids) + 1, block_size):
        parent = block_hash(parent, token_ids[end - block_size : end])
        hashes.append(parent)
    return hashes
