"""Which sequence computes how many tokens in the next step.

There is no prefill phase and no decode phase. A sequence knows `len(tokens)` tokens and awaits `num_awaited` more from
steps in flight; `num_scheduled` of them have been planned. Each step lets `num_scheduled` catch up under a token
budget. Chunked prefill, prefix hits, preemption and overlap are that one rule:

    decode          one token is missing
    prefill         many are; the budget cuts it into chunks
    prefix hit      num_scheduled starts at the end of the cached blocks
    preemption      blocks are given back and num_scheduled returns to 0; the tokens are kept
    overlap         planned tokens may be ones that a step in flight is about to draw

Steps run in the order of their plans, and within a layer all keys and values are written before any is read. So a
block may be shared from the moment the step that fills it is *planned*: a prompt that many requests share is computed
once even if they all arrive together. Likewise a block may be handed on while a step in flight still writes to it.

Order: a sequence runs by `arrival + priority * priority_aging`, which never changes; so a waiting request gains one
level of priority every `priority_aging` seconds on those that arrive later, and nothing starves.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

from shoal.core.block_pool import BlockPool
from shoal.core.config import SchedulerConfig
from shoal.core.hashing import block_hash, root_hash
from shoal.core.types import Request, Row, SlotAssignment


class Sequence:
    """One generation of a request. `slot` is None while it waits."""

    __slots__ = (
        "blocks",
        "epoch",
        "finished",
        "hashes",
        "index",
        "key",
        "num_awaited",
        "num_cached",
        "num_computed",
        "num_prompt",
        "num_registered",
        "num_scheduled",
        "parent_hash",
        "planned_in",
        "request",
        "slot",
        "token_limit",
        "tokens",
    )

    def __init__(self, request: Request, index: int, key: tuple[float, int], token_limit: int) -> None:
        self.request = request
        self.index = index
        self.key = key
        self.token_limit = token_limit
        """Prompt and output together never exceed this."""
        self.tokens = list(request.prompt)
        self.num_prompt = len(request.prompt)
        self.num_scheduled = 0
        self.num_computed = 0
        self.num_awaited = 0
        self.blocks: list[int] = []
        self.hashes: list[bytes] = []
        self.parent_hash = root_hash(request.cache_salt)
        """Hash of the last block in `hashes`, or the root."""
        self.num_registered = 0
        """Leading blocks whose hash is in the pool (or whose contents another block there already has)."""
        self.num_cached: int | None = None
        """Prompt tokens found in the cache at the first admission."""
        self.slot: int | None = None
        self.epoch = 0
        """Counts admissions: results of steps planned in an earlier one are dropped."""
        self.planned_in = 0
        """Number of the last batch with a row of this sequence."""
        self.finished = False

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_missing(self) -> int:
        """Tokens that can be planned now; 0 once the last token allowed is awaited."""
        total = len(self.tokens) + self.num_awaited
        return total - self.num_scheduled if total < self.token_limit else 0

    def hash_blocks(self, block_size: int) -> None:
        """Extend `hashes` over all blocks whose tokens are known."""
        for end in range((len(self.hashes) + 1) * block_size, len(self.tokens) + 1, block_size):
            self.parent_hash = block_hash(self.parent_hash, self.tokens[end - block_size : end])
            self.hashes.append(self.parent_hash)


class Batch:
    """A plan while it is made."""

    __slots__ = ("assigned", "budget", "cramped", "rows", "sequences")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.rows: list[Row] = []
        self.sequences: list[Sequence] = []
        """The sequence of each row."""
        self.assigned: list[SlotAssignment] = []
        self.cramped = False
        """Blocks ran out: somebody was preempted or got less than it could have used, so nobody new is let in."""


def _by_key(sequence: Sequence) -> tuple[float, int]:
    return sequence.key


class Scheduler:
    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, caching=config.prefix_caching)
        self.waiting: list[Sequence] = []
        """Sorted by key."""
        self.running: list[Sequence] = []
        """Sorted by key. Each holds a slot and the blocks of its scheduled tokens."""
        self.free_slots = list(range(config.max_sequences - 1, -1, -1))
        self.released_slots: list[int] = []
        """Given back since the last plan; the worker hears of it in the next."""
        self.num_preemptions = 0
        self.num_unfilled = 0
        """Entries of the blocks of those that run that nothing is planned for yet."""
        self.num_waiting_tokens = 0
        self._batch_number = 0

    def enqueue(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_by_key)
        self.num_waiting_tokens += len(sequence.tokens)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out for good, in whatever state it is. Its blocks and its slot are free afterwards."""
        if sequence.slot is None:
            _discard(self.waiting, sequence)
            self.num_waiting_tokens -= len(sequence.tokens)
        else:
            self._give_back(sequence)
        sequence.finished = True

    def fill(self) -> Batch:
        """Reserve blocks and advance `num_scheduled` for one step. An empty batch means that nothing can be planned."""
        batch = Batch(self.config.max_batch_tokens)
        self._batch_number += 1
        # Decodes first: a long prompt must not hold up the sequences that already stream, and they cost one token each.
        prefills: list[Sequence] = []
        size, pipelined = self.config.block_size, self.config.stages > 1
        most_decodes = -(-len(self.running) // self.config.stages)
        for sequence in list(self.running):
            missing = sequence.num_missing
            if missing > 1:
                prefills.append(sequence)
            elif missing == 1 and sequence.slot is not None:
                if pipelined and not self._may_decode(sequence, batch, most_decodes):
                    continue
                if sequence.num_scheduled < len(sequence.blocks) * size and batch.budget > 0:
                    self._append_decode(batch, sequence)
                else:
                    self._plan_row(batch, sequence, 1)
        for sequence in prefills:
            if sequence.slot is not None:
                self._plan_row(batch, sequence, sequence.num_missing)
        self._admit(batch)
        return batch

    def _may_decode(self, sequence: Sequence, batch: Batch, most: int) -> bool:
        """In a pipeline its token must be known to the first stage, and the batches in flight share the sequences."""
        return sequence.num_awaited == 0 and len(batch.rows) < most

    def register_full_blocks(self, sequence: Sequence) -> None:
        """Put every block that is planned in full and whose tokens are known into the prefix cache."""
        size = self.config.block_size
        num_full = min(sequence.num_scheduled, len(sequence.tokens)) // size
        if num_full <= sequence.num_registered:
            return
        sequence.hash_blocks(size)
        for i in range(sequence.num_registered, num_full):
            self.pool.register(sequence.blocks[i], sequence.hashes[i])
        sequence.num_registered = num_full

    def take_released_slots(self) -> list[int]:
        """Slots given back since the last plan; some may have been assigned anew in the same plan."""
        slots, self.released_slots = self.released_slots, []
        return slots

    def reset(self) -> list[Sequence]:
        """The workers' memory is gone: all blocks are blank, all slots free. Returns what was running."""
        lost, self.running = self.running, []
        for sequence in lost:
            sequence.slot = None
            sequence.blocks = []
            sequence.finished = True
        self.pool.reset()
        self.num_unfilled = 0
        self.free_slots = list(range(self.config.max_sequences - 1, -1, -1))
        self.released_slots = []
        return lost

    def _plan_row(self, batch: Batch, sequence: Sequence, missing: int) -> None:
        """Plan up to `missing` tokens: as many as budget and blocks allow, perhaps none."""
        count = min(missing, batch.budget)
        size = self.config.block_size
        num_new = -(-(sequence.num_scheduled + count) // size) - len(sequence.blocks)
        if num_new > self.pool.num_free:
            batch.cramped = True
            self._make_room(sequence, num_new)
            num_new = min(num_new, self.pool.num_free)
            count = min(count, (len(sequence.blocks) + num_new) * size - sequence.num_scheduled)
        if count > 0:
            self._append_row(batch, sequence, count, num_new)

    def _append_decode(self, batch: Batch, sequence: Sequence) -> None:
        """As `_plan_row` of one token that has room in the sequence's last block: nearly every row, so it is short."""
        start = sequence.num_scheduled
        sequence.num_scheduled = end = start + 1
        sequence.num_awaited += 1
        sequence.planned_in = self._batch_number
        batch.rows.append(Row(sequence.slot, start, 1, True, []))  # type: ignore[arg-type]
        batch.sequences.append(sequence)
        batch.budget -= 1
        self.num_unfilled -= 1
        if end >= (sequence.num_registered + 1) * self.config.block_size:
            self.register_full_blocks(sequence)

    def _append_row(self, batch: Batch, sequence: Sequence, count: int, num_new_blocks: int) -> None:
        if sequence.slot is None:
            raise RuntimeError("a sequence without a slot cannot be planned")
        new_blocks = self.pool.allocate(num_new_blocks) if num_new_blocks else []
        sequence.blocks += new_blocks
        start = sequence.num_scheduled
        sequence.num_scheduled = end = start + count
        sample = end == len(sequence.tokens) + sequence.num_awaited
        if sample:
            sequence.num_awaited += 1
        sequence.planned_in = self._batch_number
        batch.rows.append(Row(sequence.slot, start, count, sample, new_blocks))
        batch.sequences.append(sequence)
        batch.budget -= count
        self.num_unfilled += len(new_blocks) * self.config.block_size - count
        if end >= (sequence.num_registered + 1) * self.config.block_size:
            self.register_full_blocks(sequence)

    def _make_room(self, sequence: Sequence, num_blocks: int) -> None:
        """Preempt sequences behind this one, last first, until `num_blocks` are free or none is left.

        Those with a row in the plan being made are spared: others may already share the blocks that it fills. They
        advance, so everybody ends; and the first in the order finds the rest at its disposal.
        """
        for victim in reversed(self.running[bisect_right(self.running, sequence.key, key=_by_key) :]):
            if self.pool.num_free >= num_blocks:
                return
            if victim.planned_in != self._batch_number:
                self._preempt(victim)

    def _admit(self, batch: Batch) -> None:
        """Let waiting sequences in, in order, while there are slots, budget and blocks for all their known tokens.

        One block for each running sequence is left over, so that the newcomer is not preempted at once. If nothing
        runs the first always fits: `EngineCore.add` rejects what the whole pool could not hold.
        """
        size = self.config.block_size
        while self.waiting and self.free_slots and batch.budget > 0 and not batch.cramped:
            sequence = self.waiting[0]
            sequence.hash_blocks(size)
            # The last known token is computed again even if it is cached: its logits are needed.
            cached = self.pool.match(sequence.hashes[: (len(sequence.tokens) - 1) // size])
            num_new = -(-len(sequence.tokens) // size) - len(cached)
            needed = num_new + self.pool.num_revivals(cached) + len(self.running)
            if self.running and needed > self.pool.num_free:
                return
            self.waiting.pop(0)
            self.num_waiting_tokens -= len(sequence.tokens)
            self._assign(batch, sequence, cached)
            self._plan_row(batch, sequence, sequence.num_missing)

    def _assign(self, batch: Batch, sequence: Sequence, cached: list[int]) -> None:
        self.pool.acquire(cached)
        num_cached = len(cached) * self.config.block_size
        sequence.slot = self.free_slots.pop()
        sequence.blocks = list(cached)
        sequence.num_scheduled = sequence.num_computed = num_cached
        sequence.num_registered = len(cached)
        if sequence.num_cached is None:
            sequence.num_cached = num_cached
        insort(self.running, sequence, key=_by_key)
        request = sequence.request
        batch.assigned.append(
            SlotAssignment(
                slot=sequence.slot,
                request_id=request.id,
                index=sequence.index,
                tokens=list(sequence.tokens),
                num_prompt=len(request.prompt),
                block_ids=cached,
                sampling=request.sampling,
                min_tokens=request.min_tokens,
                stop_token_ids=request.stop_token_ids,
            )
        )

    def _preempt(self, sequence: Sequence) -> None:
        self._give_back(sequence)
        self.num_preemptions += 1
        self.enqueue(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        if sequence.slot is None:
            raise RuntimeError("only a running sequence holds blocks and a slot")
        _discard(self.running, sequence)
        self.pool.release(sequence.blocks)
        self.num_unfilled -= len(sequence.blocks) * self.config.block_size - sequence.num_scheduled
        self.free_slots.append(sequence.slot)
        self.released_slots.append(sequence.slot)
        sequence.slot = None
        sequence.blocks = []
        sequence.num_scheduled = sequence.num_computed = sequence.num_awaited = sequence.num_registered = 0
        sequence.epoch += 1

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds."""
        self.pool.check(sequence.blocks for sequence in self.running)
        size = self.config.block_size
        for queue in (self.waiting, self.running):
            _require([s.key for s in queue] == sorted(s.key for s in queue), "a queue is out of order")
        slots = [s.slot for s in self.running if s.slot is not None]
        _require(sorted(slots + self.free_slots) == list(range(self.config.max_sequences)), "slots lost or shared")
        unfilled = sum(len(s.blocks) * size - s.num_scheduled for s in self.running)
        _require(self.num_unfilled == unfilled, "unfilled entries miscounted")
        _require(self.num_waiting_tokens == sum(len(s.tokens) for s in self.waiting), "waiting tokens miscounted")
        for s in self.waiting:
            _require(
                s.slot is None and not s.blocks and not s.num_scheduled and not s.finished, "waiting holds something"
            )
        for s in self.running:
            _require(s.slot is not None and not s.finished, "running without a slot")
            _require(s.num_computed <= s.num_scheduled <= len(s.tokens) + s.num_awaited, "counters out of order")
            _require(len(s.tokens) + s.num_awaited <= s.token_limit, "more tokens awaited than allowed")
            _require(len(s.blocks) == -(-s.num_scheduled // size), "blocks do not fit the scheduled tokens")
            _require(s.num_registered * size <= s.num_scheduled, "a block registered before it was planned")


def _discard(queue: list[Sequence], sequence: Sequence) -> None:
    at = bisect_left(queue, sequence.key, key=_by_key)
    if at == len(queue) or queue[at] is not sequence:
        raise RuntimeError(f"sequence {sequence.request.id}/{sequence.index} is not in the queue it should be in")
    del queue[at]


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(f"scheduler: {what}")
