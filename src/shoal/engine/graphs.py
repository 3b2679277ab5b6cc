"""Steps as CUDA graphs: captured once for each size, replayed with one call instead of a thousand launches.

A graph holds sizes and addresses, so a step is padded to the next size and copied into tensors that stay. Decode steps
have a row for each token. Steps with chunks of prompts, up to `CHUNK_TOKENS` of all rows together, are padded in their
rows and in their tokens; longer ones keep a device busy for longer than the host launches them. What pads a step reads
and writes a block of the cache that belongs to no sequence. Sizes are captured when they are first met, within a bound
on memory; what is captured stays, and what no longer fits runs as it is. `CudaCapturer` has not yet run on a GPU.

Between ranks one rule holds: **a step is replayed by all ranks that exchange anything in it, or by none**. NCCL asks
for it (user guide, "Using NCCL with CUDA Graphs": whether an operation is captured must be uniform over all ranks, and
each launches the graph of that same capture), and padding does too, for a padded step sends longer messages than one
that runs as it is. Which size a step has all ranks know from its plan alone; whether that size is replayed they settle
once, when it is first met, by two votes: before the warm-up, whose exchanges need everybody, and after the capture.

Shapes: S sequences of a step, T their tokens, R rows of a graph, B blocks of its block tables, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from shoal.core.config import EngineConfig
from shoal.engine.attention.base import AttentionBatch, KVCache
from shoal.engine.comm.base import Comm, NullComm

CHUNK_TOKENS = 512
"""Of a step with chunks: docs/kernels.md has the arithmetic."""
_CHUNKS = (64, 128, 256)
_CHUNK_ROWS = (8, 32, 128)
"""Few sizes, for each is met in every size of chunk: an unused row costs some programs that end at once."""
_CONTEXTS = (2048, 8192, 32768)
"""A graph's launches are made for its longest context: short ones must not pay for the longest that there can be."""
_FINE, _COARSE = 8, 16
"""Steps between sizes, up to 32 rows and from there on."""
_WARM_UPS = 2
"""Before a capture: compilers run and libraries take their memory in what is not captured."""


class GraphSize(NamedTuple):
    rows: int
    """Sequences."""
    context: int
    """Tokens of the longest context."""
    tokens: int | None = None
    """Of all rows, where some have several: chunks of prompts. None: each has one."""


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

    def __init__(self, max_rows: int, max_context: int, limit_bytes: int, max_tokens: int = 0) -> None:
        """At most so many rows and so long contexts are ever asked for, and so many tokens of a step with chunks;
        graphs may take `limit_bytes` together.
        """
        small = [size for size in (1, 2, 4, *range(_FINE, 33, _FINE)) if size < max_rows]
        large = list(range(32 + _COARSE, max_rows, _COARSE)) if max_rows > 32 else []
        self.rows = [*small, *large, max_rows]
        self.chunk_rows = [*(rows for rows in _CHUNK_ROWS if rows < max_rows), max_rows]
        longest = min(max_tokens, CHUNK_TOKENS)
        self.chunks = [*(tokens for tokens in _CHUNKS if tokens < longest), longest]
        self.contexts = [*(context for context in _CONTEXTS if context < max_context), max_context]
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.captured: dict[GraphSize, int] = {}
        """Bytes of each."""
        self.refused: dict[GraphSize, str] = {}
        """Why a size runs without a graph."""

    def size_for(self, rows: int, context: int, tokens: int | None = None) -> GraphSize | None:
        """The smallest that holds so many rows, so long a context and so many tokens; None where no size does."""
        if not 0 < rows <= self.rows[-1] or context > self.contexts[-1]:
            return None
        context = _next(self.contexts, context)
        if tokens is None:
            return GraphSize(_next(self.rows, rows), context)
        if tokens > self.chunks[-1]:
            return None
        return GraphSize(_next(self.chunk_rows, rows), context, _next(self.chunks, tokens))

    def is_settled(self, size: GraphSize) -> bool:
        return size in self.captured or size in self.refused

    def has_room(self) -> bool:
        """Whether as much as the largest so far would fit."""
        expected = max(self.captured.values(), default=0)
        return self.used_bytes + expected <= self.limit_bytes and self.used_bytes < self.limit_bytes

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
    """Tensors of one size that graphs read, filled anew for each step.

    Where rows have chunks there is one row more, the last: its chunk are the tokens that pad the step.
    """

    def __init__(self, size: GraphSize, null: NullBlock, device: torch.device) -> None:
        has_chunks = size.tokens is not None
        tokens = size.rows if size.tokens is None else size.tokens
        rows, width = size.rows + has_chunks, -(-size.context // null.block_size)

        def int32(*shape: int, fill: int) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int32, device=device)

        starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        if has_chunks:  # until the first step, all tokens are the last row's
            starts[:-1], starts[-1] = 0, tokens
        self.ids_T = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.positions_T = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.batch = AttentionBatch(
            query_starts_S1=starts,
            seen_T=int32(tokens, fill=1),
            block_tables_SB=int32(rows, width, fill=null.number),
            slot_mapping_T=int32(tokens, fill=null.slot),
            max_query_len=tokens if has_chunks else 1,
            max_context_len=size.context,
        )
        self._has_chunks = has_chunks
        self._null = null

    def fill(self, ids_T: Tensor, positions_T: Tensor, batch: AttentionBatch) -> None:
        """The step's rows and tokens first, then such as see one token of the null block. Nothing waits for the device.

        Rows behind the step's that have chunks have no token.
        """
        own, tokens = self.batch, len(ids_T)
        rows, width = batch.block_tables_SB.shape
        self.ids_T[:tokens].copy_(ids_T)
        self.positions_T[:tokens].copy_(positions_T)
        own.seen_T[:tokens].copy_(batch.seen_T)
        own.slot_mapping_T[:tokens].copy_(batch.slot_mapping_T)
        own.block_tables_SB[:rows, :width].copy_(batch.block_tables_SB)
        if self._has_chunks:
            own.query_starts_S1[: rows + 1].copy_(batch.query_starts_S1)
            own.query_starts_S1[rows + 1 : -1].fill_(tokens)
        if tokens < len(self.ids_T):
            self.ids_T[tokens:].zero_()
            self.positions_T[tokens:].zero_()
            own.seen_T[tokens:].fill_(1)
            own.slot_mapping_T[tokens:].fill_(self._null.slot)
        if rows < len(own.block_tables_SB):
            own.block_tables_SB[rows:].fill_(self._null.number)


class Model(Protocol):
    def forward(self, ids_T: Tensor, positions_T: Tensor, batch: AttentionBatch, cache: KVCache) -> Tensor | None: ...

    def logits(self, hidden_SH: Tensor) -> Tensor | None: ...


class GraphedModel:
    """A model whose steps are replayed where a graph can hold them, and otherwise run as they are.

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
        max_tokens: int = 0,
        peers: Comm | None = None,
    ) -> None:
        """`null_block` is one of the cache's, which no sequence is ever given. `max_tokens` of a step with chunks are
        asked for; 0: only decode steps are. `peers` are the ranks that the model exchanges anything with.
        """
        self.book = GraphBook(max_rows, max_context, limit_bytes, max_tokens)
        self._model = model
        self._cache = cache
        self._capturer = capturer
        self._null = NullBlock(null_block, cache.block_size)
        self._device = device
        self._peers = peers or NullComm()
        self._graphs: dict[GraphSize, tuple[Graph, StepInputs, Tensor | None]] = {}

    def logits(self, hidden_SH: Tensor) -> Tensor | None:
        return self._model.logits(hidden_SH)

    def forward(self, ids_T: Tensor, positions_T: Tensor, batch: AttentionBatch, cache: KVCache) -> Tensor | None:
        size = self._size_of(len(ids_T), batch, cache)
        if size is not None and not self.book.is_settled(size):
            self._settle(size)
        if size is None or size not in self._graphs:
            return self._model.forward(ids_T, positions_T, batch, cache)
        graph, inputs, hidden_TH = self._graphs[size]
        inputs.fill(ids_T, positions_T, batch)
        graph.replay()
        return None if hidden_TH is None else hidden_TH[: len(ids_T)]

    def _size_of(self, num_tokens: int, batch: AttentionBatch, cache: KVCache) -> GraphSize | None:
        """By nothing that another rank could see otherwise."""
        if batch.kept_T is not None or cache is not self._cache:
            return None
        rows = len(batch.query_starts_S1) - 1
        is_decode = batch.max_query_len == 1 and num_tokens == rows
        return self.book.size_for(rows, batch.max_context_len, None if is_decode else num_tokens)

    def _settle(self, size: GraphSize) -> None:
        """Capture it or refuse it, as all ranks do: each of them comes here for this size in this step."""
        book = self.book
        if not self._all(book.has_room()):
            used = f"graphs have {book.used_bytes} of the {book.limit_bytes} bytes that they may take"
            book.refuse(size, "another rank has no room for it" if book.has_room() else used)
            return
        try:
            inputs, run = self._prepared(size)
        except RuntimeError as error:  # out of memory among them: the step can still run without a graph
            if self._peers.size > 1:
                raise  # in the midst of exchanges: the others wait for this rank's, not for its vote
            book.refuse(size, str(error))
            return
        captured, problem = None, ""
        try:
            captured = self._capturer.capture(run)
        except RuntimeError as error:
            problem = str(error)
        if not self._all(captured is not None):
            book.refuse(size, problem or "another rank could not capture it")
        elif captured is not None:
            book.add(size, captured[0].num_bytes)
            self._graphs[size] = captured[0], inputs, captured[1]

    def _prepared(self, size: GraphSize) -> tuple[StepInputs, Callable[[], Tensor | None]]:
        """Inputs of rows that are all padding, whose results are never looked at, and the step to capture, warmed up.

        It is no larger than the largest step that the memory for it was measured with (`sizing.py`).
        """
        inputs = StepInputs(size, self._null, self._device)

        def run() -> Tensor | None:
            # A new one each time: what a batch has found once and keeps would not be found again by a replay.
            return self._model.forward(inputs.ids_T, inputs.positions_T, replace(inputs.batch), self._cache)

        for _ in range(_WARM_UPS):
            run()
        return inputs, run

    def _all(self, agrees: bool) -> bool:
        """Whether every rank does."""
        votes = torch.tensor([int(agrees)], dtype=torch.int32, device=self._device)
        return int(self._peers.all_reduce_(votes).item()) == self._peers.size


# --- CUDA -----------------------------------------------------------------------------------------------------------


def unavailable_reason(config: EngineConfig, device: torch.device, capturable: bool, peers: Comm) -> str | None:
    """Why steps on the device cannot be captured; None if they can. The same on all ranks.

    `capturable` is what attention says of itself; `peers` are the ranks that split the same layers.
    """
    layout = config.layout
    checks = [
        (device.type != "cuda", f"graphs are for cuda devices, and the device is {device}"),
        (not capturable, "this attention reads lengths on the host"),
        (layout.pp > 1, "the stages of a pipeline send and receive, which is not captured"),
        (layout.cp > 1, "which tokens of a context a rank keeps is found on the host"),
        (layout.ep > 1 and config.expert_dispatch == "all_to_all", "rows for other ranks are counted on the host"),
        (not peers.capturable, f"exchanges over {peers.name} compute on the host"),
    ]
    return next((reason for applies, reason in checks if applies), None)


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
        # Other threads of the process, NCCL's that watches among them, may do what a capture must not.
        capture = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        with torch.cuda.device(self._device), capture:
            result = run()
        torch.cuda.synchronize(self._device)
        return _CudaGraph(graph, max(0, before - torch.cuda.mem_get_info(self._device)[0])), result
