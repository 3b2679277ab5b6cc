"""Runner: turns a step plan into tensors, runs the model, draws tokens. Holds the state of the slots.

Shapes: S rows of the step, T their tokens, B blocks of the longest block table among them, H hidden, V vocabulary.

A plan is a diff: slots released, sequences assigned to slots, rows to compute. What a slot knows stays here: its
tokens, its block table, its sampling state. A row's inputs are the slot's tokens at its positions; the last of them
may have been drawn by the step before, which is why a plan can be queued before its predecessor has run.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.core.types import Sampled, SequenceFailure, SlotAssignment, StepPlan, StepResult
from shoal.engine.attention.base import AttentionBatch, KVCache
from shoal.engine.comm.base import Comm, NullComm
from shoal.engine.context_parallel import KeptTokens
from shoal.engine.grammar_state import GrammarFactory
from shoal.engine.ops import Ops
from shoal.engine.sampler import Sampler

IntArray = NDArray[np.int64]


class Model(Protocol):
    """What the runner needs of a `shoal.engine.model.Decoder`."""

    def forward(self, ids_T: Tensor, positions_T: Tensor, batch: AttentionBatch, cache: KVCache) -> Tensor | None:
        """Hidden states (T, H) behind the last norm, None where a later stage has them.

        Writes the step's keys and values into `cache`.
        """

    def logits(self, hidden_SH: Tensor) -> Tensor | None:
        """float32 (S, V), of ranks that draw."""


class Runner:
    def __init__(
        self,
        model: Model,
        cache: KVCache,
        *,
        num_slots: int,
        max_len: int,
        vocab_size: int,
        device: torch.device,
        ops: Ops,
        grammars: GrammarFactory,
        peers: Comm | None = None,
        context: Comm | None = None,
        draws: bool = True,
    ) -> None:
        """`peers` are the ranks with parts of the same layers, `context` those with parts of the same sequences: the
        first of all `draws`, and tells the others.
        """
        self._model = model
        self.cache = cache
        self._device = device
        self._grammars = grammars
        self._block_size = cache.block_size
        self._block_tokens = cache.block_size * (1 if context is None else context.size)
        self._peers = peers or NullComm()
        self._context = context or NullComm()
        self._kept = KeptTokens(cache.block_size, self._context)
        self._draws = draws
        self.sampler = Sampler(num_slots, vocab_size, ops)
        # Zeroed memory costs nothing until it is written: a slot takes up what its longest sequence did. The token
        # drawn behind the last position has a place too.
        self._tokens = np.zeros((num_slots, max_len + 1), dtype=np.int32)
        self._blocks = np.zeros((num_slots, -(-max_len // self._block_tokens)), dtype=np.int32)
        self._num_blocks = [0] * num_slots
        self._broken: dict[int, str] = {}
        """Slots whose sequence cannot be sampled, with the reason. Their KV is computed until they are released."""

    def step(self, plan: StepPlan) -> StepResult:
        """Run one step. Raises whatever the model raises; then the state of the slots is void."""
        for drawn in plan.drawn:
            self._tokens[drawn.slot, drawn.position] = drawn.token_id
        for slot in plan.released:
            self._release(slot)
        for assignment in plan.assigned:
            self._assign(assignment)
        if not plan.rows:
            return StepResult(plan.plan_id, [])
        with torch.inference_mode():
            return self._run(plan)

    # --- slots ------------------------------------------------------------------------------------------------------

    def _release(self, slot: int) -> None:
        self.sampler.release(slot)
        self._num_blocks[slot] = 0
        self._broken.pop(slot, None)

    def _assign(self, assignment: SlotAssignment) -> None:
        slot, tokens = assignment.slot, assignment.tokens
        self._release(slot)
        self._tokens[slot, : len(tokens)] = tokens
        self._append_blocks(slot, assignment.block_ids)
        if not self._draws:
            return
        grammar = assignment.sampling.grammar
        try:
            self.sampler.assign(
                slot,
                assignment.sampling,
                assignment.index,
                tokens,
                assignment.num_prompt,
                assignment.min_tokens,
                assignment.stop_token_ids,
                None if grammar is None else self._grammars.state(grammar.compiled, tokens[assignment.num_prompt :]),
            )
        except Exception as error:  # one sequence's defect must not end the batch
            self._broken[slot] = str(error) or type(error).__name__

    def _append_blocks(self, slot: int, block_ids: list[int]) -> None:
        end = self._num_blocks[slot] + len(block_ids)
        self._blocks[slot, self._num_blocks[slot] : end] = block_ids
        self._num_blocks[slot] = end

    # --- the step ---------------------------------------------------------------------------------------------------

    def _run(self, plan: StepPlan) -> StepResult:
        rows = plan.rows
        for row in rows:
            if row.new_block_ids:
                self._append_blocks(row.slot, row.new_block_ids)
        slots_S = np.array([row.slot for row in rows], dtype=np.int64)
        starts_S = np.array([row.start for row in rows], dtype=np.int64)
        lengths_S = np.array([row.num_tokens for row in rows], dtype=np.int64)
        samples_S = np.array([row.sample for row in rows], dtype=np.bool_)
        ends_S = starts_S + lengths_S
        ids_T, positions_T, batch = self._batch(slots_S, starts_S, lengths_S, ends_S)

        hidden_TH = self._model.forward(ids_T, positions_T, batch, self.cache)
        draws: list[Sampled] = []
        if hidden_TH is not None and samples_S.any():
            if len(hidden_TH) != np.count_nonzero(samples_S):
                last_S = np.cumsum(lengths_S)[samples_S] - 1
                hidden_TH = hidden_TH[self._to_device(last_S)]
            logits_SV = self._model.logits(hidden_TH)
            if self._draws and logits_SV is not None:
                draws = self._sample(logits_SV, slots_S[samples_S], ends_S[samples_S])
            self._share_tokens(slots_S[samples_S], ends_S[samples_S])
        if not self._broken:
            return StepResult(plan.plan_id, draws)
        failed = [SequenceFailure(row.slot, self._broken[row.slot]) for row in rows if row.slot in self._broken]
        return StepResult(plan.plan_id, [drawn for drawn in draws if drawn.slot not in self._broken], failed)

    def _batch(
        self, slots_S: IntArray, starts_S: IntArray, lengths_S: IntArray, ends_S: IntArray
    ) -> tuple[Tensor, Tensor, AttentionBatch]:
        """Input ids (T), positions (T) and the attention metadata of rows [start, end) of their slots."""
        query_starts_S1 = np.zeros(len(slots_S) + 1, dtype=np.int32)
        np.cumsum(lengths_S, out=query_starts_S1[1:])
        # Token t of the batch stands at position t + (start of its row - tokens of the rows before).
        positions_T = np.repeat(starts_S - query_starts_S1[:-1], lengths_S)
        positions_T += np.arange(len(positions_T))
        slots_T = np.repeat(slots_S, lengths_S)
        ids_T = self._tokens[slots_T, positions_T]
        kept, size = self._kept, self._block_size
        seen_T, longest = kept.count(positions_T + 1), max(1, int(kept.count(ends_S).max()))
        kept_T = np.flatnonzero(kept.has(positions_T))
        blocks_T = self._blocks[slots_T[kept_T], positions_T[kept_T] // self._block_tokens]
        is_split = self._context.size > 1

        def kept_before(window: int) -> Tensor:
            return self._to_device(kept.count(np.maximum(positions_T + 1 - window, 0)).astype(np.int32))

        batch = AttentionBatch(
            query_starts_S1=self._to_device(query_starts_S1),
            seen_T=self._to_device(seen_T.astype(np.int32)),
            block_tables_SB=self._to_device(self._blocks[slots_S, : -(-longest // size)]),
            slot_mapping_T=self._to_device((blocks_T * size + positions_T[kept_T] % size).astype(np.int32)),
            max_query_len=int(lengths_S.max()),
            max_context_len=longest,
            kept_T=self._to_device(kept_T) if is_split else None,
            kept_before=kept_before if is_split else None,
        )
        return self._to_device(ids_T.astype(np.int64)), self._to_device(positions_T), batch

    def _sample(self, logits_SV: Tensor, slots_S: IntArray, positions_S: IntArray) -> list[Sampled]:
        """Draw a token for each row and make it known to its slot, at `positions_S`."""
        draws = self.sampler.sample(logits_SV, slots_S, positions_S)
        slots = slots_S.tolist()
        for row, message in draws.failures.items():
            self._broken.setdefault(slots[row], message)
            # Meaningless, but a step in flight may read it: any id of the vocabulary will do.
            draws.tokens[row] = 0
        self._tokens[slots_S, positions_S] = draws.tokens
        drawn = zip(slots, draws.tokens, draws.logprobs, strict=True)
        return [Sampled(slot, token, logprobs) for slot, token, logprobs in drawn]

    def _share_tokens(self, slots_S: IntArray, positions_S: IntArray) -> None:
        """What the first of the peers drew, to the others: the next step may already be on its way to all of them."""
        for comm in (self._peers, self._context):  # the context's other ranks hear what their first one heard
            if comm.size > 1:
                tokens_S = self._to_device(self._tokens[slots_S, positions_S])
                self._tokens[slots_S, positions_S] = comm.broadcast_(tokens_S, 0).cpu().numpy()

    def _to_device(self, array: NDArray[np.int32] | IntArray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cpu":
            return tensor
        # From pinned memory the copy overlaps with what the device runs; torch keeps the buffer until it is done.
        return tensor.pin_memory().to(self._device, non_blocking=True)
