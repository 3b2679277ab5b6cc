"""Runs a Decoder by hand: chunks of several sequences over scrambled block tables, without runner or scheduler."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from shoal.engine.attention.base import AttentionBatch, KVCache
from shoal.engine.model import Decoder


class PagedRun:
    """`extend` feeds the next tokens of some sequences in one step and returns the logits of every token fed."""

    def __init__(self, decoder: Decoder, num_sequences: int, *, num_blocks: int = 64, block_size: int = 16) -> None:
        self.decoder = decoder
        self.block_size = block_size
        self.cache: KVCache = decoder.new_cache(num_blocks, block_size)
        blocks = list(range(num_blocks))
        random.Random(7).shuffle(blocks)
        per_sequence = num_blocks // num_sequences
        self.tables = [blocks[i * per_sequence : (i + 1) * per_sequence] for i in range(num_sequences)]
        self.lens = [0] * num_sequences
        self.hidden: list[Tensor] = []
        """Of every step: what the logits are made of, on every rank."""

    def extend(self, tokens: dict[int, list[int]]) -> dict[int, Tensor]:
        members = list(tokens)
        starts, positions, slots = [0], [], []
        for i in members:
            for position in range(self.lens[i], self.lens[i] + len(tokens[i])):
                positions.append(position)
                slots.append(self.tables[i][position // self.block_size] * self.block_size + position % self.block_size)
            self.lens[i] += len(tokens[i])
            starts.append(len(positions))

        def int32(values: list[int] | list[list[int]]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.decoder.device)

        batch = AttentionBatch.causal(
            query_starts_S1=int32(starts),
            context_lens_S=int32([self.lens[i] for i in members]),
            block_tables_SB=int32([self.tables[i] for i in members]),
            slot_mapping_T=int32(slots),
        )
        ids = torch.tensor([t for i in members for t in tokens[i]], device=self.decoder.device)
        at = torch.tensor(positions, device=self.decoder.device)
        with torch.inference_mode():
            hidden = self.decoder.forward(ids, at, batch, self.cache)
            self.hidden.append(hidden.clone())
            logits = self.decoder.logits(hidden)
        if logits is None:
            return {}  # another rank has them
        return {i: logits[starts[k] : starts[k + 1]].cpu() for k, i in enumerate(members)}
