"""Ref-counted KV blocks and the prefix cache over them.

A block is in one of three states:

    held      refs > 0                    in some sequence's block table; may carry a hash, then others may share it
    cached    refs == 0, has a hash       in the free list, contents still valid: revivable until it is evicted
    blank     refs == 0, no hash          in the free list, contents worthless

The free list is doubly linked through two integer arrays, so that reviving a cached block from its middle is O(1).
Allocation takes from its head: blank blocks are put there, cached ones at the tail, so eviction is least recently
used and spends nothing cached while a blank block is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class BlockPool:
    def __init__(self, num_blocks: int, *, caching: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self.caching = caching
        self.reset()

    def reset(self) -> None:
        """Forget every block: all blank, no references. For a worker whose memory is gone."""
        count = self.num_blocks
        self._refs = [0] * count
        self._hash_of: list[bytes | None] = [None] * count
        self._block_of: dict[bytes, int] = {}
        # Entry `count` is the list's sentinel: its next is the head, its previous the tail.
        self._next = [*range(1, count + 1), 0]
        self._previous = [count, *range(count)]
        self._num_free = count

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out: blank and cached."""
        return self._num_free

    @property
    def num_held(self) -> int:
        return self.num_blocks - self._num_free

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest prefix of `hashes` that is held or cached. Takes no reference."""
        blocks: list[int] = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_revivals(self, blocks: Iterable[int]) -> int:
        """How many of these would leave the free list if they were acquired."""
        return sum(1 for block in blocks if self._refs[block] == 0)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add a reference to each; a cached block is revived."""
        for block in blocks:
            if self._refs[block] == 0:
                self._unlink(block)
            self._refs[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` blocks with one reference each. Evicts the least recently used cached ones if need be.

        The caller has made sure that `count <= num_free`; anything else is a defect and raises RuntimeError with the
        pool unchanged.
        """
        if count > self._num_free:
            raise RuntimeError(f"allocate({count}) with {self._num_free} free blocks: the caller must check num_free")
        blocks = []
        for _ in range(count):
            block = self._next[self.num_blocks]
            self._unlink(block)
            self._forget(block)
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference from each block of one sequence, given first to last.

        The last blocks are freed first: they depend on the ones before them, so they are the first worth evicting.
        """
        for block in reversed(blocks):
            refs = self._refs[block] - 1
            if refs < 0:
                raise RuntimeError(f"block {block} released more often than acquired")
            self._refs[block] = refs
            if refs == 0:
                self._link(block, at_tail=self._hash_of[block] is not None)

    def register(self, block: int, digest: bytes) -> None:
        """Make a held block findable. Where another block already has the contents, that one stays the findable one."""
        if self.caching and digest not in self._block_of and self._hash_of[block] is None:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def _forget(self, block: int) -> None:
        digest = self._hash_of[block]
        if digest is not None:
            del self._block_of[digest]
            self._hash_of[block] = None

    def _unlink(self, block: int) -> None:
        after, before = self._next[block], self._previous[block]
        self._next[before] = after
        self._previous[after] = before
        self._num_free -= 1

    def _link(self, block: int, *, at_tail: bool) -> None:
        sentinel = self.num_blocks
        before = self._previous[sentinel] if at_tail else sentinel
        after = self._next[before]
        self._next[before] = block
        self._previous[block] = before
        self._next[block] = after
        self._previous[after] = block
        self._num_free += 1

    def check(self, tables: Iterable[Sequence[int]] = ()) -> None:
        """Raise AssertionError unless the pool is consistent, with exactly the references that `tables` hold."""
        refs = [0] * self.num_blocks
        for table in tables:
            for block in table:
                refs[block] += 1
        _require(refs == self._refs, "references differ from the block tables")
        free = []
        block = self._next[self.num_blocks]
        while block != self.num_blocks:
            free.append(block)
            _require(len(free) <= self.num_blocks, "the free list has a cycle")
            _require(self._previous[self._next[block]] == block, f"links around block {block} disagree")
            block = self._next[block]
        _require(len(free) == self._num_free, "num_free differs from the free list")
        _require(sorted(free) == [b for b in range(self.num_blocks) if self._refs[b] == 0], "free list != unreferenced")
        cached = {d: b for b, d in enumerate(self._hash_of) if d is not None}
        _require(cached == self._block_of, "the hash index differs from the blocks' hashes")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(f"block pool: {what}")
