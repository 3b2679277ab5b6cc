"""Merkle trees as in RFC 6962, section 2.1 (the same in RFC 9162): roots, and proofs that a leaf is in a tree. Pure.

A tree grows by keeping only its frontier: the roots of the perfect subtrees that its size in binary names, largest
first. So a writer needs log2(n) hashes to go on, and a verifier the same to check a root at any size on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

EMPTY_ROOT = sha256(b"").digest()


def leaf_hash(data: bytes) -> bytes:
    """The prefixes of leaves and nodes differ, so that no node can be passed off as a leaf."""
    return sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()


class Frontier:
    """The tree over the leaves appended so far."""

    __slots__ = ("hashes", "size")

    def __init__(self, size: int = 0, hashes: Sequence[bytes] = ()) -> None:
        """Raises ValueError where so many hashes are not the frontier of a tree of that size."""
        if len(hashes) != size.bit_count() or any(len(part) != 32 for part in hashes):
            raise ValueError(f"a tree of {size} leaves has a frontier of {size.bit_count()} hashes of 32 bytes")
        self.size = size
        self.hashes = list(hashes)

    def append(self, leaf: bytes) -> None:
        """`leaf` is a leaf's hash. Trailing ones of the size are subtrees that are complete now, as in a carry."""
        subtree, size = leaf, self.size
        while size & 1:
            subtree = node_hash(self.hashes.pop(), subtree)
            size >>= 1
        self.hashes.append(subtree)
        self.size += 1

    def root(self) -> bytes:
        if not self.hashes:
            return EMPTY_ROOT
        root = self.hashes[-1]
        for left in reversed(self.hashes[:-1]):
            root = node_hash(left, root)
        return root

    def copy(self) -> Frontier:
        return Frontier(self.size, self.hashes)


def root_of(leaves: Sequence[bytes]) -> bytes:
    """Of the tree over these leaf hashes."""
    frontier = Frontier()
    for leaf in leaves:
        frontier.append(leaf)
    return frontier.root()


def _split(size: int) -> int:
    """The largest power of two below `size`: how many leaves are left of a tree's root."""
    return 1 << (size - 1).bit_length() - 1


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The hashes beside the way from leaf `index` up to the root (RFC 6962, 2.1.1)."""
    if not 0 <= index < len(leaves):
        raise ValueError(f"there is no leaf {index} in a tree of {len(leaves)}")
    proof: list[bytes] = []
    while len(leaves) > 1:
        middle = _split(len(leaves))
        left, right = leaves[:middle], leaves[middle:]
        if index < middle:
            proof.append(root_of(right))
            leaves = left
        else:
            proof.append(root_of(left))
            leaves, index = right, index - middle
    return proof[::-1]


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether `proof` shows that leaf `index` of the tree with `size` leaves and this root is `leaf`."""
    if not 0 <= index < size:
        return False
    on_right: list[bool] = []
    position, remaining = index, size
    while remaining > 1:  # from the root down: whether the way leads right, where the sibling is on the left
        middle = _split(remaining)
        on_right.append(position >= middle)
        position, remaining = (position - middle, remaining - middle) if position >= middle else (position, middle)
    if len(proof) != len(on_right):
        return False
    subtree = leaf
    for sibling, right in zip(proof, reversed(on_right), strict=True):
        subtree = node_hash(sibling, subtree) if right else node_hash(subtree, sibling)
    return subtree == root
