"""Decode steps as CUDA graphs: captured once for each size, replayed with one call instead of a thousand launches.

A graph holds sizes and addresses, so a step is padded to the next size and copied into tensors that stay. Rows that
pad it read and write a block of the cache that belongs to no sequence. Sizes are captured when they are first met,
within a bound on memory; what is captured stays, and what no longer fits runs as it is. `CudaCapturer` has not yet run
on a GPU.

Shapes: S sequences of a step, each with one token, R rows of a graph, B blocks of its block tables, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from shoal.engine.attention.base import AttentionBatch, KVCache

_CONTEXTS = (2048, 8192, 32768)
"""A graph's launches are made for its longest context: short ones must not pay for the longest that there can be."""
_FINE, _COARSE = 8, 16
"""Steps between sizes, up to 32 rows and from there on."""
_WARM_UPS = 2
"""Before a capture: compilers run and libraries take their memory in what is not captured."""


class GraphSize(NamedTuple):
    rows: int
    context: int
    """Tokens of the longest context."""


class Graph(Protocol):
    num_bytes: int
    """That it took from the device, beyond what others had taken."""

    def replay(self) -> None:
        """Enqueue all of it. Does not wait."""


class Capturer(Protocol):
    """Makes graphs: CUDA's, or a test's."""

    def capture(self, run: Callable[[], Tensor | None]) -> tuple[Graph, Tensor | None]:
        """What `run` enqueues, and the result that each replay overwrites. Raises RuntimeError where it cannot be."""


class GraphBook:
    """Which sizes there are, which of them are captured, and whether another one may be. Knows no device."""

    def __init__(self, max_rows: int, max_context: int, limit_bytes: int) -> None:
        """At most so many rows and so long contexts are ever asked for; graphs may take `limit_bytes` together."""
        small = [size for size in (1, 2, 4, *range(_FINE, 33, _FINE)) if size < max_rows]
        large = list(range(32 + _COARSE, max_rows, _COARSE)) if max_rows > 32 else []
        self.rows = [*small, *large, max_rows]
        self.contexts = [*(context for context in _CONTEXTS if context < max_context), max_context]
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.captured: dict[GraphSize, int] = {}
        """Bytes of each."""
        self.refused: dict[GraphSize, str] = {}
        """Why a size runs without a graph."""

    def size_for(self, rows: int, context: int) -> GraphSize | None:
        """The smallest that holds so many rows and so long a context; None where even the largest does not."""
        if not 0 < rows <= self.rows[-1] or context > self.contexts[-1]:
            return None
        return GraphSize(_next(self.rows, rows), _next(self.contexts, context))

    def may_capture(self, size: GraphSize) -> bool:
        """Whether it is to be tried: not refused before, and as much as the largest so far would fit."""
        if size in self.captured or size in self.refused:
            return False
        expected = max(self.captured.values(), default=0)
        if self.used_bytes + expected > self.limit_bytes or self.used_bytes >= self.limit_bytes:
            self.refuse(size, f"graphs have {self.used_bytes} of the {self.limit_bytes} bytes that they may take")
            return False
        return True

    def add(self, size: GraphSize, num_bytes: int) -> None:
        self.captured[size] = num_bytes
        self.used_bytes += num_bytes

    def refuse(self, size: GraphSize, reason: str) -> None:
        self.refused[size] = reason


def _next(sizes: Sequence[int], wanted: int) -> int:
    return next(size for size in sizes if size >= wanted)


@dataclass(frozen=True)
class NullBlock:
    """A block of the cache that no sequence ever has: what pads a step may write there."""

    number: int
    block_size: int

    @property
    def slot(self) -> int:
        return self.number * self.block_size


class StepInputs:
    """Tensors of one size that graphs read, filled anew for each step."""

    def __init__(self, size: GraphSize, null: NullBlock, device: torch.device) -> None:
        rows, width = size.rows, -(-size.context // null.block_size)

        def int32(*shape: int, fill: int) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int32, device=device)

        self.ids_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.batch = AttentionBatch(
            query_starts_S1=torch.arange(rows + 1, dtype=torch.int32, device=device),
            seen_T=int32(rows, fill=1),
            block_tables_SB=int32(rows, width, fill=null.number),
            slot_mapping_T=int32(rows, fill=null.slot),
            max_query_len=1,
            max_context_len=size.context,
        )
        self._null = null

    def fill(self, ids_S: Tensor, positions_S: Tensor, batch: AttentionBatch) -> None:
        """The step's rows first, then rows that see one token of the null block. Nothing waits for the device."""
        own, rows = self.batch, len(ids_S)
        width = batch.block_tables_SB.shape[1]
        self.ids_R[:rows].copy_(ids_S)
        self.positions_R[:rows].copy_(positions_S)
        own.seen_T[:rows].copy_(batch.seen_T)
        own.slot_mapping_T[:rows].copy_(batch.slot_mapping_T)
        own.block_tables_SB[:rows, :width].copy_(batch.block_tables_SB)
        if rows < len(self.ids_R):
            self.ids_R[rows:].zero_()
            self.positions_R[rows:].zero_()
            own.seen_T[rows:].fill_(1)
            own.slot_mapping_T[rows:].fill_(self._null.slot)
            own.block_tables_SB[rows:].fill_(self._null.number)


class Model(Protocol):
    def forward(self, ids_T: Tensor, positions_T: Tensor, batch: AttentionBatch, cache: KVCache) -> Tensor | None: ...

    def logits(self, hidden_SH: Tensor) -> Tensor | None: ...


class GraphedModel:
    """A model whose decode steps are replayed where a graph can hold them, and otherwise run as they are.

    What `forward` returns from a graph is overwritten by the next step.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        capturer: Capturer,
        *,
        null_block: int,
        max_rows: int,
        max_context: int,
        limit_bytes: int,
        device: torch.device,
    ) -> None:
        """`null_block` is one of the cache's, which no sequence is ever given."""
        self.book = GraphBook(max_rows, max_context, limit_bytes)
        self._model = model
        self._cache = cache
        self._capturer = capturer
        self._null = NullBlock(null_block, cache.block_size)
        self._device = device
        self._graphs: dict[GraphSize, tuple[Graph, StepInputs, Tensor | None]] = {}

    def logits(self, hidden_SH: Tensor) -> Tensor | None:
        return self._model.logits(hidden_SH)

    def forward(self, ids_T: Tensor, positions_T: Tensor, batch: AttentionBatch, cache: KVCache) -> Tensor | None:
        size = self._size_of(len(ids_T), batch, cache)
        if size is not None and self.book.may_capture(size):
            self._capture(size)
        if size is None or size not in self._graphs:
            return self._model.forward(ids_T, positions_T, batch, cache)
        graph, inputs, hidden_RH = self._graphs[size]
        inputs.fill(ids_T, positions_T, batch)
        graph.replay()
        return None if hidden_RH is None else hidden_RH[: len(ids_T)]

    def _size_of(self, num_tokens: int, batch: AttentionBatch, cache: KVCache) -> GraphSize | None:
        is_decode = batch.max_query_len == 1 and num_tokens == len(batch.query_starts_S1) - 1
        if not is_decode or batch.kept_T is not None or cache is not self._cache:
            return None
        return self.book.size_for(num_tokens, batch.max_context_len)

    def _capture(self, size: GraphSize) -> None:
        """Of rows that are all padding: their results are never looked at."""
        inputs = StepInputs(size, self._null, self._device)

        def run() -> Tensor | None:
            # A new one each time: what a batch has found once and keeps would not be found again by a replay.
            batch = replace(inputs.batch)
            return self._model.forward(inputs.ids_R, inputs.positions_R, batch, self._cache)

        try:
            for _ in range(_WARM_UPS):
                run()
            graph, hidden_RH = self._capturer.capture(run)
        except RuntimeError as error:  # out of memory among them: the step can still run without a graph
            self.book.refuse(size, str(error))
            return
        self.book.add(size, graph.num_bytes)
        self._graphs[size] = graph, inputs, hidden_RH


# --- CUDA -----------------------------------------------------------------------------------------------------------


def unavailable_reason(device: torch.device, capturable: bool, num_ranks: int) -> str | None:
    """Why steps on the device cannot be captured; None if they can. `capturable` is what attention says of itself."""
    if device.type != "cuda":
        return f"graphs are for cuda devices, and the device is {device}"
    if not capturable:
        return "this attention reads lengths on the host"
    if num_ranks > 1:
        return f"the layout has {num_ranks} ranks, and exchanges between ranks are not captured"
    return None


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, num_bytes: int) -> None:
        self._graph = graph
        self.num_bytes = num_bytes

    def replay(self) -> None:
        self._graph.replay()


class CudaCapturer:
    """All graphs share one pool of memory: they never run at the same time, so what one leaves the next may use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], Tensor | None]) -> tuple[Graph, Tensor | None]:
        torch.cuda.synchronize(self._device)
        before = torch.cuda.mem_get_info(self._device)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool):
            result = run()
        torch.cuda.synchronize(self._device)
        return _CudaGraph(graph, max(0, before - torch.cuda.mem_get_info(self._device)[0])), result
