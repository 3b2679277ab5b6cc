"""Policies of other routers, written anew from what their documentation says, for `routing.py` to compare with.

power of two     two endpoints at random, the one with fewer requests in flight
cache aware      of the routers of SGLang and vLLM: while the numbers of requests in flight are apart by more than both
                 thresholds, the endpoint with the fewest; else the one whose approximate radix tree has most of the
                 prompt, if that is more than `cache_threshold` of it; else the one with the smallest tree.
                 Their defaults. The tree here is of blocks instead of characters.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from shoal.core.fleet_types import EndpointReport, RouteRequest
from shoal.core.prefix_index import PrefixIndex

CACHE_THRESHOLD = 0.3
BALANCE_ABS_THRESHOLD = 64
BALANCE_REL_THRESHOLD = 1.5
MAX_TREE_BLOCKS = 67_108_864 // (4 * 128)
"""Their 2**26 characters, at four a token and 128 tokens a block."""


class InFlight:
    """A router that counts requests in flight, and hears of nothing else."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.in_flight: dict[str, int] = {}

    def add(self, name: str, max_sequences: int | None, num_blocks: int | None, block_size: int, now: float) -> None:
        self.in_flight[name] = 0

    def remove(self, name: str) -> None:
        self.in_flight.pop(name, None)

    def route(self, request: RouteRequest, candidates: Sequence[str], now: float) -> str | None:
        raise NotImplementedError

    def dispatched(self, request: RouteRequest, name: str, now: float) -> None:
        self.in_flight[name] += 1

    def first_token(self, request_id: str, name: str, now: float) -> None:
        return

    def progressed(self, name: str, tokens: int, now: float) -> None:
        return

    def finished(self, request_id: str, name: str, num_generated: int, now: float, ok: bool) -> None:
        self.in_flight[name] -= 1

    def reported(self, name: str, report: EndpointReport, now: float) -> None:
        return


class PowerOfTwo(InFlight):
    def route(self, request: RouteRequest, candidates: Sequence[str], now: float) -> str | None:
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        return min(self.random.sample(list(candidates), 2), key=self.in_flight.__getitem__)


class CacheAware(InFlight):
    def __init__(self, seed: int, abs_threshold: int = BALANCE_ABS_THRESHOLD) -> None:
        super().__init__(seed)
        self.abs_threshold = abs_threshold
        self.trees = PrefixIndex()

    def add(self, name: str, max_sequences: int | None, num_blocks: int | None, block_size: int, now: float) -> None:
        super().add(name, max_sequences, num_blocks, block_size, now)
        self.trees.add(name, MAX_TREE_BLOCKS)

    def remove(self, name: str) -> None:
        super().remove(name)
        self.trees.forget(name)

    def route(self, request: RouteRequest, candidates: Sequence[str], now: float) -> str | None:
        if not candidates:
            return None
        loads = [self.in_flight[name] for name in candidates]
        most, least = max(loads), min(loads)
        if most - least > self.abs_threshold and most > BALANCE_REL_THRESHOLD * least:
            return min(candidates, key=self.in_flight.__getitem__)
        matched = self.trees.match(request.blocks)
        best = max(candidates, key=lambda name: matched.get(name, 0))
        if request.blocks and matched.get(best, 0) / len(request.blocks) > CACHE_THRESHOLD:
            return best
        return min(candidates, key=self.trees.size)

    def dispatched(self, request: RouteRequest, name: str, now: float) -> None:
        super().dispatched(request, name, now)
        self.trees.insert(name, request.blocks)
