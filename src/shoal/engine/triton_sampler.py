"""Settings of the sequences in slots, kept beside the logits, so that tokens are drawn there without the host.

Shapes: S rows of a batch, N slots, V vocabulary, P penalised sequences that there is room for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.core.types import Sampling
from shoal.engine.kernels.sampling import FLOATS, IN_PROMPT, WORDS, Needs, Settings, sample
from shoal.engine.random_stream import as_words

_GREEDY_BELOW = 1e-5
"""Of a temperature: a division by it would only overflow."""


class TritonSampler:
    """Settings are written on the host and sent, once, before the next rows are drawn. Counts live on the device."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._host_floats = np.zeros((num_slots, len(FLOATS)), dtype=np.float32)
        self._host_words = np.zeros((num_slots, len(WORDS)), dtype=np.int64)
        self._host_words[:, WORDS.index("penalty_row")] = -1
        self._floats = torch.from_numpy(self._host_floats.copy()).to(device)
        self._words = torch.from_numpy(self._host_words.copy()).to(device)
        self._changed: dict[int, None] = {}
        """Slots whose settings the device does not have yet, in order."""
        self._rows: list[int | None] = []
        """Of the counts: the slot that has each of them."""
        self._counts_PV = torch.empty((0, vocab_size), dtype=torch.int32, device=device)

    # --- slots ------------------------------------------------------------------------------------------------------

    def assign(
        self, slot: int, sampling: Sampling, top_k: int, index: int, prompt: Sequence[int], output: Sequence[int]
    ) -> None:
        self.release(slot)
        frequency, presence = sampling.frequency_penalty, sampling.presence_penalty
        penalised = frequency != 0 or presence != 0 or sampling.repetition_penalty != 1
        values = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition": sampling.repetition_penalty,
            "frequency": frequency,
            "presence": presence,
        }
        self._host_floats[slot] = [values[name] for name in FLOATS]
        seed, number = as_words([sampling.seed, index]).view(np.int64).tolist()
        # Only the repetition penalty looks at the prompt.
        looked_at = prompt if sampling.repetition_penalty != 1 else ()
        row = self._count(slot, looked_at, output) if penalised else -1
        words = {"seed": seed, "index": number, "top_k": top_k, "penalty_row": row}
        self._host_words[slot] = [words[name] for name in WORDS]
        self._changed[slot] = None

    def release(self, slot: int) -> None:
        row = int(self._host_words[slot, WORDS.index("penalty_row")])
        if row >= 0:
            self._rows[row] = None
        self._host_floats[slot] = 0
        self._host_words[slot] = [-1 if name == "penalty_row" else 0 for name in WORDS]
        # What the device has of an empty slot is never read, but it must not count in a row that another slot has now.
        self._changed[slot] = None

    def _count(self, slot: int, prompt: Sequence[int], output: Sequence[int]) -> int:
        """Put down what a penalised sequence has so far; the row of its counts."""
        if None not in self._rows:
            # Room for twice as many: a row is half a megabyte and most sequences are not penalised.
            more = max(4, len(self._rows))
            extra = torch.zeros((more, self._vocab_size), dtype=torch.int32, device=self._device)
            self._counts_PV = torch.cat([self._counts_PV, extra])
            self._rows += [None] * more
        row = self._rows.index(None)
        self._rows[row] = slot
        counts = np.zeros(self._vocab_size, dtype=np.int32)
        np.add.at(counts, np.array(output, dtype=np.int64), 1)
        counts[np.unique(np.array(prompt, dtype=np.int64))] += IN_PROMPT
        self._counts_PV[row].copy_(self._sent(torch.from_numpy(counts)))
        return row

    # --- one step ---------------------------------------------------------------------------------------------------

    def sample(self, logits_SV: Tensor, slots_S: Tensor, positions_S: Tensor) -> tuple[Tensor, Tensor]:
        self._send()
        top_p, temperature = self._column("top_p"), self._column("temperature")
        is_random = temperature >= _GREEDY_BELOW
        filters = (self._host_words[:, WORDS.index("top_k")] > 0) | (top_p < 1)
        is_penalised = any(slot is not None for slot in self._rows)
        settings = Settings(self._floats, self._words, self._counts_PV if is_penalised else None)
        needs = Needs(draws=bool(is_random.any()), filters=bool((is_random & filters).any()))
        return sample(logits_SV, self._sent(slots_S), self._sent(positions_S), settings, needs)

    def _column(self, name: str) -> np.ndarray:
        return self._host_floats[:, FLOATS.index(name)]

    def _send(self) -> None:
        if not self._changed:
            return
        slots = np.fromiter(self._changed, dtype=np.int64)
        self._changed.clear()
        at = self._sent(torch.from_numpy(slots))
        self._floats.index_copy_(0, at, self._sent(torch.from_numpy(self._host_floats[slots])))
        self._words.index_copy_(0, at, self._sent(torch.from_numpy(self._host_words[slots])))

    def _sent(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == self._device.type:
            return tensor
        # From pinned memory the copy overlaps with what the device runs; torch keeps the buffer until it is done.
        return tensor.pin_memory().to(self._device, non_blocking=True)
