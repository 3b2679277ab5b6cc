"""What is asked of a cost model, and what it answers. One for planner, simulator and router.

EngineShape (model, precision, layout, cluster)  --CostModel-->  step(StepShape) -> StepCost
                                                                 memory() -> MemoryBudget
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal.core.hardware import Cluster, Provenance
from shoal.core.layout import Layout
from shoal.core.model_shape import ModelShape
from shoal.core.types import StepPlan

WeightPrecision = Literal["float32", "bfloat16", "float8", "float8-block", "int8", "int4", "float4"]
CachePrecision = Literal["float32", "bfloat16", "float8", "int8"]


class EngineShape(msgspec.Struct, frozen=True, kw_only=True):
    """One engine: what it runs and where. `layout.dp` is not of an engine: it is 1 here."""

    model: ModelShape
    cluster: Cluster
    layout: Layout = Layout()
    attention_dp: int = 1
    """Groups of `layout.ranks` devices that each compute attention for sequences of their own, while experts are split
    over all: `layout.ep` then counts the ranks of one group only."""
    weights: WeightPrecision = "bfloat16"
    cache: CachePrecision = "bfloat16"
    profile: str = "shoal"
    """Whose kernels and whose host code: shoal, vllm, sglang, tensorrt-llm (`core/cost/profiles.py`)."""
    block_size: int = 16
    max_batch_tokens: int = 8192
    max_sequences: int = 256
    memory_share: float = 0.9
    """Of a device's memory that the engine takes."""

    @property
    def num_devices(self) -> int:
        return self.layout.ranks * self.attention_dp


class StepShape(msgspec.Struct, frozen=True, kw_only=True):
    """A forward pass over a mixed batch, as sums, so that it is cheap to make one.

    A prefill row computes `n` new tokens behind `c` that are cached; a decode row one token behind `c`.
    """

    prefill_tokens: int = 0
    """Sum of n."""
    prefill_rows: int = 0
    prefill_pairs: float = 0.0
    """Sum of n (c + (n + 1) / 2): query-key pairs under a causal mask."""
    prefill_context: int = 0
    """Sum of c + n: tokens whose keys and values are read."""
    decode_rows: int = 0
    decode_context: int = 0
    """Sum of c + 1."""
    sampled: int = 0
    """Rows whose next token is drawn."""

    @property
    def tokens(self) -> int:
        return self.prefill_tokens + self.decode_rows

    @property
    def rows(self) -> int:
        return self.prefill_rows + self.decode_rows


def shape_of_plan(plan: StepPlan) -> StepShape:
    tokens = rows = context = decodes = decode_context = sampled = 0
    pairs = 0.0
    for row in plan.rows:
        n, end = row.num_tokens, row.start + row.num_tokens
        if n == 1:
            decodes += 1
            decode_context += end
        else:
            tokens += n
            rows += 1
            context += end
            pairs += n * (row.start + (n + 1) / 2)
        sampled += row.sample
    return StepShape(
        prefill_tokens=tokens,
        prefill_rows=rows,
        prefill_pairs=pairs,
        prefill_context=context,
        decode_rows=decodes,
        decode_context=decode_context,
        sampled=sampled,
    )


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Of a step's time."""

    name: str
    """linear, experts, attention, collectives, pipeline, head, kernels, host, ..."""
    seconds: float
    bound: Literal["compute", "bandwidth", "latency", "link", "host"]
    bytes: float = 0.0
    """Read or moved by one device."""
    operations: float = 0.0
    """Of one device."""


class StepCost(msgspec.Struct, frozen=True, kw_only=True):
    seconds: float
    parts: tuple[Part, ...]
    """Of one device of the slowest stage; their sum is `seconds`, where nothing overlaps."""
    low: float
    high: float
    """Nine of ten steps lie between."""
    provenance: Provenance
    """The weakest of what it rests on."""
    link_bytes: dict[str, float] = {}
    """That one device sends, by link."""


class MemoryBudget(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one device, the fullest."""

    total: int
    weights: int
    activations: int
    workspace: int
    """Graphs, communication buffers, the runtime's own."""
    cache: int
    """What is left for blocks; below 0: by how much it does not fit."""
    bytes_per_token: float
    """Of cache, on this device."""
    bytes_per_sequence: float
    """States of linear attention; half an unfilled block."""

    @property
    def cache_tokens(self) -> int:
        return max(0, int(self.cache / self.bytes_per_token)) if self.bytes_per_token else 0
