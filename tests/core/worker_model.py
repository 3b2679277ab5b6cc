"""A worker without arithmetic: it keeps the slots as a real one does, and draws tokens from what the slot holds.

Of a pipeline the first stage is modelled beside it: it knows of a slot's tokens only what plans tell it.

Block contents are modelled too: each block records which tokens were written at which positions, so that a row which
reads a block that was never filled, or was overwritten by another sequence, is caught at once.
"""

from __future__ import annotations

from shoal.core.types import Sampled, SequenceFailure, SlotAssignment, StepPlan, StepResult


class Slot:
    def __init__(self, assignment: SlotAssignment) -> None:
        self.tokens: list[int] = []
        self.prefixes: list[int] = []
        """A digest of all tokens up to each position."""
        self.blocks = list(assignment.block_ids)
        self.assignment = assignment
        self.failed = False
        for token in assignment.tokens:
            self.append(token)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.prefixes.append(hash((self.prefixes[-1] if self.prefixes else 0, token)))


class ModelWorker:
    """`step` raises AssertionError when a plan asks for something that a real worker could not do correctly."""

    def __init__(self, block_size: int, vocab_size: int, num_blocks: int, *, is_pipeline: bool = False) -> None:
        self.told: dict[int, dict[int, int]] | None = {} if is_pipeline else None
        """At the first stage: tokens by position, of each slot."""
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.slots: dict[int, Slot] = {}
        self.memory: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        """Per block and offset: the digest of the prefix whose last token is stored there."""
        self.num_computed = 0

    def step(self, plan: StepPlan, fail_slots: tuple[int, ...] = ()) -> StepResult:
        self._tell_first_stage(plan)
        for slot_id in plan.released:
            self.slots.pop(slot_id, None)
        for assignment in plan.assigned:
            assert assignment.slot not in self.slots, "assigned a slot that is taken"
            self.slots[assignment.slot] = Slot(assignment)
        assert len({row.slot for row in plan.rows}) == len(plan.rows), "two rows of one slot"
        rows = [(row, self.slots[row.slot]) for row in plan.rows]
        for row, slot in rows:  # all writes of a step come before its reads
            slot.blocks += row.new_block_ids
            end = row.start + row.num_tokens
            if slot.failed and end > len(slot.tokens):
                slot.append(-1)
            assert end <= len(slot.tokens), "a row reaches beyond the known tokens"
            if self.told is not None and not slot.failed:
                told = [self.told[row.slot].get(position) for position in range(row.start, end)]
                assert told == slot.tokens[row.start : end], "the first stage was not told what the last one drew"
            for position in range(row.start, end):
                block, offset = slot.blocks[position // self.block_size], position % self.block_size
                self.memory[block][offset] = slot.prefixes[position]
            self.num_computed += row.num_tokens
        sampled, failed = [], []
        for row, slot in rows:
            end = row.start + row.num_tokens
            stored = [entry for block in slot.blocks for entry in self.memory[block]]
            assert stored[:end] == slot.prefixes[:end], f"slot {row.slot} reads what is not its own"
            assert row.sample == (end == len(slot.tokens)), "sample must be set exactly at the end of what is known"
            if slot.failed:
                continue
            if row.slot in fail_slots:
                slot.failed = True
                failed.append(SequenceFailure(row.slot, "injected"))
            elif row.sample:
                token = self.draw(slot)
                slot.append(token)
                sampled.append(Sampled(row.slot, token))
        return StepResult(plan.plan_id, sampled, failed)

    def _tell_first_stage(self, plan: StepPlan) -> None:
        if self.told is None:
            assert not plan.drawn, "there is no stage that has not seen what was drawn"
            return
        for drawn in plan.drawn:
            self.told[drawn.slot][drawn.position] = drawn.token_id
        for slot in plan.released:
            self.told.pop(slot, None)
        for assignment in plan.assigned:
            self.told[assignment.slot] = dict(enumerate(assignment.tokens))

    def draw(self, slot: Slot) -> int:
        """A pure function of the tokens so far: what a greedy model does."""
        return hash((slot.prefixes[-1], slot.assignment.index)) % self.vocab_size
