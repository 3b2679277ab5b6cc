"""Graphs of decode steps without a device: sizes, padding, the bound on memory, and results as without graphs.

The fake graph runs what it captured again, on the tensors that it captured, which is all that a graph does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from shoal.engine.attention.base import AttentionBatch
from shoal.engine.graphs import GraphBook, GraphedModel, GraphSize, NullBlock, StepInputs, unavailable_reason

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
        used = torch.arange(batch.block_tables_SB.shape[1]) * BLOCK_SIZE < batch.seen_T[:, None]
        tables = (batch.block_tables_SB * used).sum(dim=1)
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


def graphed(
    capturer: FakeCapturer, model: FakeModel, max_rows: int = 40, limit: int = 10**9
) -> tuple[GraphedModel, FakeCache]:
    cache = FakeCache()
    made = GraphedModel(
        model, cache, capturer, null_block=NULL, max_rows=max_rows, max_context=5000, limit_bytes=limit, device=CPU
    )
    return made, cache


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
    sizes = [GraphSize(rows, 2048) for rows in (1, 2, 4)]
    for size in sizes[:2]:
        assert book.may_capture(size)
        book.add(size, 100)
        assert not book.may_capture(size), "captured once"
    assert not book.may_capture(sizes[2]), "another 100 would be above the bound"
    assert "200 of the 250 bytes" in book.refused[sizes[2]]
    assert list(book.captured) == sizes[:2] and book.used_bytes == 200
    assert not GraphBook(64, 2048, 0).may_capture(sizes[0])


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
    addresses = [inputs.ids_R.data_ptr(), inputs.batch.block_tables_SB.data_ptr()]
    for rows in (4, 2):
        inputs.fill(*decode(rows, seed=rows))
    assert addresses == [inputs.ids_R.data_ptr(), inputs.batch.block_tables_SB.data_ptr()]
    assert inputs.batch.seen_T[2:].tolist() == [1, 1] and inputs.positions_R[2:].tolist() == [0, 0]
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
    assert with_graphs._size_of(3, prefill, cache) is None
    assert not capturer.graphs and model.eager == [41, 2, 3, 3]


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


def test_where_there_are_no_graphs_it_says_why() -> None:
    assert "the device is cpu" in str(unavailable_reason(CPU, True, 1))
    cuda = torch.device("cuda", 0)
    assert "on the host" in str(unavailable_reason(cuda, False, 1))
    assert "2 ranks" in str(unavailable_reason(cuda, True, 2))
    assert unavailable_reason(cuda, True, 1) is None
