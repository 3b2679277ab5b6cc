"""Graphs of steps without a device: sizes, padding, the bound on memory, agreement of ranks, results as without graphs.

The fake graph runs what it captured again, on the tensors that it captured, which is all that a graph does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor

from shoal.core.config import EngineConfig
from shoal.core.layout import Layout
from shoal.engine.attention.base import AttentionBatch
from shoal.engine.comm.base import Comm, NullComm
from shoal.engine.comm.process_group import ProcessGroupComm, make_group
from shoal.engine.graphs import (
    CHUNK_TOKENS,
    GraphBook,
    GraphedModel,
    GraphSize,
    NullBlock,
    StepInputs,
    unavailable_reason,
)
from tests.engine.comm.threads import together

CPU = torch.device("cpu")
BLOCK_SIZE, NULL = 16, 9


@dataclass
class FakeGraph:
    run: Callable[[], Tensor | None]
    result: Tensor | None
    num_bytes: int
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        again = self.run()
        if self.result is not None and again is not None:
            self.result.copy_(again)


@dataclass
class FakeCapturer:
    num_bytes: int = 100
    error: str | None = None
    graphs: list[FakeGraph] = field(default_factory=list)

    def capture(self, run: Callable[[], Tensor | None]) -> tuple[FakeGraph, Tensor | None]:
        if self.error is not None:
            raise RuntimeError(self.error)
        self.graphs.append(FakeGraph(run, run(), self.num_bytes))
        return self.graphs[-1], self.graphs[-1].result


class FakeCache:
    num_blocks, block_size, nbytes = NULL + 1, BLOCK_SIZE, 0

    def paged(self, layer: int) -> None:
        return None


class FakeModel:
    """Hidden states are a function of everything that a row has; what it was called with is kept."""

    def __init__(self) -> None:
        self.eager: list[int] = []
        self.slots: list[list[int]] = []

    def forward(self, ids_T: Tensor, positions_T: Tensor, batch: AttentionBatch, cache: FakeCache) -> Tensor:
        self.eager.append(len(ids_T))
        self.slots.append(batch.slot_mapping_T.tolist())
        starts = batch.query_starts_S1
        assert len(batch.block_tables_SB) == len(starts) - 1 and starts[0] == 0 and starts[-1] == len(ids_T)
        rows_T = torch.searchsorted(starts[1:].contiguous(), torch.arange(len(ids_T)), right=True)
        used = torch.arange(batch.block_tables_SB.shape[1]) * BLOCK_SIZE < batch.seen_T[:, None]
        tables = (batch.block_tables_SB[rows_T] * used).sum(dim=1)
        columns = [ids_T, positions_T, batch.seen_T, batch.unseen_T(20), tables, batch.slot_mapping_T]
        return torch.stack(columns, dim=1).float()

    def logits(self, hidden_SH: Tensor) -> Tensor:
        return hidden_SH * 2


def decode(rows: int, context: int = 40, seed: int = 0) -> tuple[Tensor, Tensor, AttentionBatch]:
    generator = torch.Generator().manual_seed(seed)
    seen = torch.randint(1, context + 1, (rows,), generator=generator).int()
    seen[0] = context
    tables = torch.randint(0, NULL, (rows, -(-context // BLOCK_SIZE)), generator=generator).int()
    slots = tables.gather(1, (seen[:, None].long() - 1) // BLOCK_SIZE)[:, 0] * BLOCK_SIZE + (seen - 1) % BLOCK_SIZE
    batch = AttentionBatch(torch.arange(rows + 1).int(), seen, tables, slots.int(), 1, context)
    return torch.randint(0, 1000, (rows,), generator=generator), seen.long() - 1, batch


def chunks(*queries: int, seed: int = 0) -> tuple[Tensor, Tensor, AttentionBatch]:
    """Rows of so many tokens each, the first behind a context of 60."""
    generator = torch.Generator().manual_seed(seed)
    contexts = [60 * (i == 0) + count for i, count in enumerate(queries)]
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    tables = torch.randint(0, NULL, (len(queries), -(-max(contexts) // BLOCK_SIZE)), generator=generator).int()
    slots = torch.randint(0, NULL * BLOCK_SIZE, (sum(queries),), generator=generator).int()
    batch = AttentionBatch.causal(starts, torch.tensor(contexts).int(), tables, slots)
    return torch.randint(0, 1000, (sum(queries),), generator=generator), batch.seen_T.long() - 1, batch


def graphed(
    capturer: FakeCapturer, model: Any, max_rows: int = 40, limit: int = 10**9, **options: Any
) -> tuple[GraphedModel, FakeCache]:
    cache = FakeCache()
    sizes = {"null_block": NULL, "max_rows": max_rows, "max_context": 5000, "limit_bytes": limit}
    return GraphedModel(model, cache, capturer, device=CPU, **sizes, **options), cache


@pytest.mark.parametrize("max_rows", [1, 2, 3, 8, 31, 32, 33, 100, 256])
def test_sizes_hold_every_step_and_are_few(max_rows: int) -> None:
    book = GraphBook(max_rows, 100_000, 1)
    assert book.rows == sorted(set(book.rows)) and book.rows[-1] == max_rows
    for rows in range(1, max_rows + 1):
        size = book.size_for(rows, 1)
        assert size is not None and rows <= size.rows <= max_rows
        # No more than half of a step is padding, and of a large one no more than 15 rows.
        assert size.rows < 2 * rows or size.rows <= 8
        assert size.rows - rows < 16
    assert book.size_for(max_rows + 1, 1) is None and book.size_for(0, 1) is None
    assert book.size_for(1, 100_001) is None
    assert [book.size_for(1, context).context for context in (1, 2048, 2049, 40_000)] == [2048, 2048, 8192, 100_000]


def test_memory_is_bounded_and_what_is_captured_stays() -> None:
    book = GraphBook(64, 2048, 250)
    sizes = [GraphSize(rows, 2048) for rows in (1, 2)]
    for size in sizes:
        assert book.has_room() and not book.is_settled(size)
        book.add(size, 100)
        assert book.is_settled(size)
    assert not book.has_room(), "another 100 would be above the bound"
    assert list(book.captured) == sizes and book.used_bytes == 200
    assert not GraphBook(64, 2048, 0).has_room()


def test_results_are_those_without_graphs_whatever_ran_before() -> None:
    capturer, model = FakeCapturer(), FakeModel()
    with_graphs, cache = graphed(capturer, model)
    for seed, rows in enumerate([3, 40, 4, 1, 33, 3, 17, 40, 2]):
        step = decode(rows, context=40 + 30 * seed, seed=seed)
        expected = FakeModel().forward(*step, cache)
        hidden = with_graphs.forward(*step, cache)
        assert hidden is not None and torch.equal(hidden, expected)
        assert torch.equal(with_graphs.logits(hidden), expected * 2)
    assert {size.rows for size in with_graphs.book.captured} == {4, 40, 1, 24, 2}
    assert sum(graph.replays for graph in capturer.graphs) == 9


@pytest.mark.parametrize("max_tokens", [1, 63, 64, 65, 200, 512, 8192])
def test_sizes_of_chunks_are_few_and_short(max_tokens: int) -> None:
    book = GraphBook(40, 5000, 1, max_tokens)
    assert book.chunks == sorted(set(book.chunks)) and book.chunks[-1] == min(max_tokens, CHUNK_TOKENS)
    for tokens in range(1, book.chunks[-1] + 1):
        size = book.size_for(3, 100, tokens)
        assert size is not None and size.tokens is not None and size.rows == 8
        assert tokens <= size.tokens and (size.tokens < 2 * tokens or size.tokens == book.chunks[0])
    assert book.size_for(3, 100, book.chunks[-1] + 1) is None
    assert [book.size_for(rows, 100, 1).rows for rows in (8, 9, 33, 40)] == [8, 32, 40, 40]  # type: ignore[union-attr]


def test_steps_with_chunks_give_what_they_would_without_graphs() -> None:
    """Beside decodes of as many tokens, which have sizes of their own; what one step left the next overwrites."""
    capturer, model = FakeCapturer(), FakeModel()
    with_graphs, cache = graphed(capturer, model, max_tokens=200)
    steps = [chunks(40), chunks(1, 30, 1, 20), chunks(64), chunks(5, 3), chunks(*[1] * 9, 90), decode(3), chunks(2)]
    steps += [chunks(100, 100), chunks(1, 1, 62), decode(40), chunks(63)]
    for number, step in enumerate(steps):
        hidden = with_graphs.forward(*step, cache)
        expected = FakeModel().forward(*step, cache)
        assert hidden is not None and torch.equal(hidden, expected), number
    sizes = {(size.rows, size.tokens) for size in with_graphs.book.captured}
    assert sizes == {(8, 64), (32, 128), (8, 200), (4, None), (40, None)}
    assert sum(graph.replays for graph in capturer.graphs) == len(steps)


def test_tokens_that_pad_a_chunk_are_a_row_of_their_own() -> None:
    inputs = StepInputs(GraphSize(4, 100, 16), NullBlock(NULL, BLOCK_SIZE), CPU)
    assert inputs.batch.query_starts_S1.tolist() == [0, 0, 0, 0, 0, 16] and inputs.batch.max_query_len == 16
    for queries, starts in (((9, 1, 6), [0, 9, 10, 16, 16, 16]), ((3, 2), [0, 3, 5, 5, 5, 16])):
        inputs.fill(*chunks(*queries))
        assert inputs.batch.query_starts_S1.tolist() == starts
    assert inputs.batch.seen_T[5:].tolist() == [1] * 11 and inputs.positions_T[5:].tolist() == [0] * 11
    assert (inputs.batch.slot_mapping_T[5:] == NULL * BLOCK_SIZE).all()
    assert (inputs.batch.block_tables_SB[2:] == NULL).all() and len(inputs.batch.block_tables_SB) == 5


def test_padding_reads_and_writes_the_null_block_alone() -> None:
    model = FakeModel()
    with_graphs, cache = graphed(FakeCapturer(), model)
    for rows in (4, 3, 1, 3):  # a full step first: what it leaves in the tensors must be overwritten
        step = decode(rows, seed=rows)
        with_graphs.forward(*step, cache)
        size = with_graphs.book.size_for(rows, 40)
        assert size is not None
        own = step[2].slot_mapping_T.tolist()
        assert model.slots[-1] == own + [NULL * BLOCK_SIZE] * (size.rows - rows)


def test_inputs_of_padding() -> None:
    inputs = StepInputs(GraphSize(4, 100), NullBlock(NULL, BLOCK_SIZE), CPU)
    addresses = [inputs.ids_T.data_ptr(), inputs.batch.block_tables_SB.data_ptr()]
    for rows in (4, 2):
        inputs.fill(*decode(rows, seed=rows))
    assert addresses == [inputs.ids_T.data_ptr(), inputs.batch.block_tables_SB.data_ptr()]
    assert inputs.batch.seen_T[2:].tolist() == [1, 1] and inputs.positions_T[2:].tolist() == [0, 0]
    assert (inputs.batch.block_tables_SB[2:] == NULL).all() and inputs.batch.query_starts_S1.tolist() == [0, 1, 2, 3, 4]
    assert inputs.batch.block_tables_SB.shape == (4, 7) and inputs.batch.max_context_len == 100


def test_steps_that_no_graph_holds_run_as_they_are() -> None:
    capturer, model = FakeCapturer(), FakeModel()
    with_graphs, cache = graphed(capturer, model)
    ids, positions, batch = decode(3)
    prefill = AttentionBatch(
        torch.tensor([0, 3]).int(), batch.seen_T, batch.block_tables_SB[:1], batch.slot_mapping_T, 3, 40
    )
    kept = AttentionBatch(
        batch.query_starts_S1, batch.seen_T, batch.block_tables_SB, batch.slot_mapping_T, 1, 40, kept_T=torch.arange(3)
    )
    eager: list[tuple[tuple[Tensor, Tensor, AttentionBatch], FakeCache]] = [
        (decode(41), cache),
        (decode(2, context=5001), cache),
        (decode(3), FakeCache()),
        ((ids, positions, kept), cache),
    ]
    for step, its_cache in eager:
        with_graphs.forward(*step, its_cache)
    with_graphs.forward(ids, positions, prefill, cache)  # there are no graphs of chunks here
    assert not capturer.graphs and model.eager == [41, 2, 3, 3, 3]


def test_a_capture_that_fails_is_not_tried_again_and_the_step_runs() -> None:
    capturer, model = FakeCapturer(error="out of memory"), FakeModel()
    with_graphs, cache = graphed(capturer, model)
    step = decode(3)
    for _ in range(2):
        hidden = with_graphs.forward(*step, cache)
        assert hidden is not None and torch.equal(hidden, FakeModel().forward(*step, cache))
    assert with_graphs.book.refused == {GraphSize(4, 2048): "out of memory"}
    assert model.eager == [4, 4, 3, 3], "two warm-ups, then each step by itself"


def test_above_the_bound_steps_run_as_they_are() -> None:
    capturer, model = FakeCapturer(num_bytes=100), FakeModel()
    with_graphs, cache = graphed(capturer, model, limit=150)
    for rows in (1, 8, 1, 8):
        with_graphs.forward(*decode(rows), cache)
    assert [size.rows for size in with_graphs.book.captured] == [1] and len(capturer.graphs) == 1
    assert model.eager[-1] == 8


def test_above_the_bound_it_is_said_why() -> None:
    with_graphs, cache = graphed(FakeCapturer(num_bytes=100), FakeModel(), limit=150)
    for rows in (1, 8):
        with_graphs.forward(*decode(rows), cache)
    assert with_graphs.book.refused == {GraphSize(8, 2048): "graphs have 100 of the 150 bytes that they may take"}


# --- ranks ----------------------------------------------------------------------------------------------------------


class SummingModel(FakeModel):
    """Each rank contributes to every token. The group finds ranks out that send messages of different sizes."""

    def __init__(self, comm: Comm) -> None:
        super().__init__()
        self.comm = comm
        self.capturing = False

    def forward(self, ids_T: Tensor, positions_T: Tensor, batch: AttentionBatch, cache: FakeCache) -> Tensor:
        x = super().forward(ids_T, positions_T, batch, cache) * (self.comm.rank + 1)
        return x if self.capturing else self.comm.all_reduce_(x.contiguous())


@dataclass
class RankCapturer(FakeCapturer):
    """As with NCCL, what is captured exchanges nothing until it is replayed."""

    model: SummingModel | None = None

    def capture(self, run: Callable[[], Tensor | None]) -> tuple[FakeGraph, Tensor | None]:
        assert self.model is not None
        self.model.capturing = True
        try:
            return super().capture(run)
        finally:
            self.model.capturing = False


@pytest.mark.parametrize(
    ("limits", "errors", "captured", "why"),
    [
        ((10**9, 10**9), (None, None), {4, 24, 8}, {""}),
        ((10**9, 150), (None, None), {4}, {"another rank has no room for it", "graphs have 100 of the 150 bytes"}),
        ((0, 10**9), (None, None), set(), {"another rank has no room for it", "graphs have 0 of the 0 bytes"}),
        ((10**9, 10**9), ("not while capturing", None), set(), {"another rank could not", "not while capturing"}),
    ],
    ids=["all", "one runs out", "one has none", "one cannot"],
)
def test_ranks_replay_the_same_sizes_and_no_others(
    tmp_path: Path, limits: tuple[int, int], errors: tuple[str | None, ...], captured: set[int], why: set[str]
) -> None:
    steps = [decode(3), decode(20), decode(3), chunks(30, 3), decode(4), decode(17), chunks(50)]

    def rank(comm: Comm) -> tuple[list[Tensor], GraphedModel]:
        model = SummingModel(comm)
        capturer = RankCapturer(error=errors[comm.rank], model=model)
        made, cache = graphed(capturer, model, limit=limits[comm.rank], max_tokens=64, peers=comm)
        # Copies, each before the next step: a graph overwrites its result.
        return [hidden.clone() for step in steps if (hidden := made.forward(*step, cache)) is not None], made

    first, second = together(tmp_path, 2, rank)
    expected = [FakeModel().forward(*step, FakeCache()) * 3 for step in steps]
    for found in (first[0], second[0]):
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert first[1].book.captured.keys() == second[1].book.captured.keys()
    assert first[1].book.refused.keys() == second[1].book.refused.keys()
    assert {size.rows for size in first[1].book.captured} == captured
    reasons = [reason for made in (first[1], second[1]) for reason in made.book.refused.values()]
    assert all(any(part in reason for part in why) for reason in reasons) and (reasons or captured == {4, 24, 8})


def test_a_rank_that_fails_in_a_warm_up_fails_its_step(tmp_path: Path) -> None:
    """Others wait for its part of a sum, so it must not go on to vote as if nothing had been."""

    class Failing(SummingModel):
        def forward(self, ids_T: Tensor, positions_T: Tensor, batch: AttentionBatch, cache: FakeCache) -> Tensor:
            if self.comm.rank == 1 and self.eager:
                raise RuntimeError("out of memory")
            return super().forward(ids_T, positions_T, batch, cache)

    def rank(comm: Comm) -> str:
        model = Failing(comm)
        made, cache = graphed(RankCapturer(model=model), model, peers=comm)
        with pytest.raises(RuntimeError) as error:
            made.forward(*decode(3), cache)
        return str(error.value)

    first, second = together(tmp_path, 2, rank)
    assert "rank 1 of 2 is gone" in first and second == "out of memory"


@pytest.mark.parametrize(
    ("changes", "device", "capturable", "comm", "why"),
    [
        ({}, "cpu", True, "null", "the device is cpu"),
        ({}, "cuda", False, "null", "on the host"),
        ({"layout": Layout(pp=2)}, "cuda", True, "null", "stages"),
        ({"layout": Layout(cp=2)}, "cuda", True, "null", "tokens of a context"),
        ({"layout": Layout(ep=2), "expert_dispatch": "all_to_all"}, "cuda", True, "nccl", "rows for other ranks"),
        ({"layout": Layout(tp=2)}, "cuda", True, "gloo", "exchanges over gloo"),
        ({"layout": Layout(tp=2)}, "cuda", True, "nccl", None),
        ({"layout": Layout(ep=2), "expert_dispatch": "all_gather"}, "cuda", True, "nccl", None),
        ({}, "cuda", True, "null", None),
    ],
)
def test_where_there_are_no_graphs_it_says_why(
    tmp_path: Path, changes: dict[str, Any], device: str, capturable: bool, comm: str, why: str | None
) -> None:
    peers: Comm = NullComm()
    if comm != "null":
        store = torch.distributed.FileStore(str(tmp_path / "store"))
        group = make_group("gloo", 0, 1, store, name="alone", host="127.0.0.1", timeout=1.0)
        peers = ProcessGroupComm(group, comm, timeout=1.0)
    found = unavailable_reason(EngineConfig(model="m", **changes), torch.device(device), capturable, peers)
    assert found is None if why is None else why in str(found)
    peers.close()
