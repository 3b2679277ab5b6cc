"""Which endpoint probably holds which blocks of a prompt: what a router remembers of what it sent where.

A guess: engines evict by their own rules, and other gateways use them too. It is bounded for each endpoint, and errs
only in the cost of a request, never in its answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

WINDOW = 16
"""Prompts for each endpoint, over which it is counted how often a block is asked for."""
FEWEST = 4
"""Prompts for each endpoint without which nothing is asked for often: after a start everything would be."""
MOST_WEIGHT = 1e200
"""Of a prompt, after which all weights are scaled down."""


class PrefixIndex:
    """Blocks are named by chained hashes, so a block stands for all of the prompt up to its end.

    An insertion touches a chain from its last block to its first. So within an endpoint a block was always used less
    recently than those before it, the block evicted is never one that another depends on, and along a chain endpoints
    only ever drop out: that is what lets `match` halve its way instead of asking for every block.
    """

    def __init__(self) -> None:
        self._names: list[str | None] = []
        """By bit; None is a bit to be given out again."""
        self._recent: dict[str, OrderedDict[bytes, None]] = {}
        """Blocks of each endpoint, least recently used first."""
        self._bits: dict[str, int] = {}
        self._capacity: dict[str, int] = {}
        self._holders: dict[bytes, int] = {}
        """By block: the endpoints that hold it, as a set of bits. Never 0."""
        self._asked: dict[bytes, float] = {}
        """By block that any endpoint holds: the weights of the prompts that had it. Never more than of the block
        before it. Later prompts weigh more, instead of every weight becoming less."""
        self._weight = 1.0
        """Of the next prompt."""
        self._total = 0.0
        """Of all prompts."""

    def add(self, name: str, capacity: int) -> None:
        """An endpoint that holds nothing, and will be remembered to hold `capacity` blocks at most."""
        self.forget(name)
        if None in self._names:
            bit = self._names.index(None)
            self._names[bit] = name
        else:
            bit = len(self._names)
            self._names.append(name)
        self._bits[name] = bit
        self._recent[name] = OrderedDict()
        self._capacity[name] = max(capacity, 1)

    def forget(self, name: str) -> None:
        """The endpoint and all it held. An unknown one is ignored."""
        if name not in self._bits:
            return
        bit = self._bits.pop(name)
        for digest in self._recent.pop(name):
            self._drop(digest, bit)
        del self._capacity[name]
        self._names[bit] = None

    def insert(self, name: str, blocks: Sequence[bytes]) -> None:
        """The endpoint was sent a prompt of these blocks, first block first. An unknown endpoint is ignored."""
        if name not in self._bits:
            return
        recent, capacity, holders = self._recent[name], self._capacity[name], self._holders
        asked, weight = self._asked, self._weight
        bit = self._bits[name]
        mask = 1 << bit
        for digest in reversed(blocks[:capacity]):
            if digest in recent:
                recent.move_to_end(digest)
            else:
                recent[digest] = None
                holders[digest] = holders.get(digest, 0) | mask
            asked[digest] = asked.get(digest, 0.0) + weight
        while len(recent) > capacity:
            digest, _ = recent.popitem(last=False)
            self._drop(digest, bit)
        self._total += weight
        self._weight *= 1 + 1 / (WINDOW * len(self._bits))
        if self._weight > MOST_WEIGHT:
            self._scale_down()

    def depth(self, name: str, blocks: Sequence[bytes]) -> int:
        """How many leading blocks one endpoint holds."""
        recent = self._recent.get(name)
        if not recent:
            return 0
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high) // 2
            if blocks[middle] in recent:
                low = middle + 1
            else:
                high = middle
        return low

    def match(self, blocks: Sequence[bytes]) -> dict[str, int]:
        """How many leading blocks each endpoint holds; endpoints that hold none are left out."""
        found: dict[str, int] = {}
        holders = self._holders
        if not blocks or blocks[0] not in holders:
            return found
        # Each entry: endpoints that hold blocks[low - 1], those of them that hold blocks[high - 1], low < high.
        spans = [(0, len(blocks), holders[blocks[0]], holders.get(blocks[-1], 0))]
        self._collect(found, spans[0][3], len(blocks))
        while spans:
            low, high, before, after = spans.pop()
            if before == after:
                continue
            if high - low == 1:
                self._collect(found, before & ~after, low)
                continue
            middle = (low + high) // 2
            between = holders.get(blocks[middle - 1], 0)
            spans.append((low, middle, before, between))
            spans.append((middle, high, between, after))
        return {name: depth for name, depth in found.items() if depth}

    def wanted(self, blocks: Sequence[bytes], depths: Iterable[int], endpoints: int) -> int:
        """How many leading blocks are asked for by a larger share of the prompts than the share of the endpoints that
        hold them, given how many leading blocks each of them holds that holds any (`match`)."""
        asked, share = self._asked, max(self._total, self._weight * FEWEST * endpoints) / endpoints
        if not blocks or asked.get(blocks[0], 0.0) <= share:
            return 0
        holders = 0
        held = sorted(depths, reverse=True)
        for number, depth in enumerate(held):
            holders += 1
            below = held[number + 1] if number + 1 < len(held) else 0
            if below == depth:
                continue
            # So many hold the blocks from `below` to `depth`, and the further of them are asked for less.
            low, high = below, depth
            while low < high:
                middle = (low + high) // 2
                if asked.get(blocks[middle], 0.0) > holders * share:
                    low = middle + 1
                else:
                    high = middle
            if low > below:
                return low
        return 0

    def size(self, name: str) -> int:
        """Blocks remembered of an endpoint."""
        return len(self._recent.get(name, ()))

    def _collect(self, found: dict[str, int], mask: int, depth: int) -> None:
        while mask:
            lowest = mask & -mask
            name = self._names[lowest.bit_length() - 1]
            if name is None:
                raise RuntimeError("a block is held by an endpoint that was forgotten")
            found[name] = depth
            mask ^= lowest

    def _drop(self, digest: bytes, bit: int) -> None:
        left = self._holders[digest] & ~(1 << bit)
        if left:
            self._holders[digest] = left
        else:
            del self._holders[digest]
            del self._asked[digest]

    def _scale_down(self) -> None:
        scale = 1 / self._weight
        self._asked = {digest: weight * scale for digest, weight in self._asked.items()}
        self._total *= scale
        self._weight = 1.0

    def check(self) -> None:
        """Raise AssertionError unless the two views agree and every bound is kept."""
        holders: dict[bytes, int] = {}
        for name, recent in self._recent.items():
            if self._names[self._bits[name]] != name:
                raise AssertionError(f"prefix index: the bit of {name} belongs to another")
            if len(recent) > self._capacity[name]:
                raise AssertionError(f"prefix index: {name} is remembered with more than its capacity")
            for digest in recent:
                holders[digest] = holders.get(digest, 0) | 1 << self._bits[name]
        if holders != self._holders:
            raise AssertionError("prefix index: holders differ from what the endpoints hold")
        if self._asked.keys() != self._holders.keys():
            raise AssertionError("prefix index: blocks are counted that nobody holds, or held that were not counted")
