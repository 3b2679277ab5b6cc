"""What of a device's memory is left for KV blocks: measured by a step as large as there will be one.

Weights lie where they will stay, libraries have taken what they take, and the step's temporaries have been at their
peak; what then remains, less a share for graphs and one for what does not fit together, is the cache's. Sizes are
bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from shoal.core.config import EngineConfig
from shoal.core.config import WeightPrecision as FloatPrecision
from shoal.core.cost.memory import weight_bytes
from shoal.core.cost.types import EngineShape, WeightPrecision
from shoal.core.hardware import Cluster, DeviceSpec, LinkSpec
from shoal.core.layout import Layout, refusal
from shoal.core.model_shape import ModelShape, shape_of
from shoal.core.model_spec import ModelSpec
from shoal.core.quantization import Quantization
from shoal.core.types import Row, Sampling, SlotAssignment, StepPlan
from shoal.engine.devices import DeviceMemory
from shoal.engine.memory import OutOfMemory, Room, format_bytes

GRAPHS_FRACTION = 0.03
"""Of the free memory, where steps are captured. Graphs share one pool, as large as the largest of them needs."""
RESERVE_FRACTION = 0.03
"""Of all memory: for what the allocator cannot use for its cut, and what libraries load later."""
_LONGEST_CONTEXT = 8192
"""Of the step that is measured. Attention cuts a context into parts, at most as many as of this one."""
_ESTIMATE_MARGIN = 1.05
"""Weights are refused before they are read only if they are larger than what is free by more than the estimate errs."""
_QUANTIZED: dict[Quantization, WeightPrecision] = {"fp8": "float8", "int8": "int8", "int4": "int4"}
_SMALLER: tuple[tuple[str, WeightPrecision], ...] = (
    ("dtype bfloat16", "bfloat16"),
    ("quantize fp8", "float8"),
    ("quantize int8", "int8"),
    ("quantize int4", "int4"),
)
_TENSOR_RANKS = (2, 4, 8, 16, 32)
Loaded = TypeVar("Loaded")


class Measured(NamedTuple):
    free: int
    """With the weights loaded and nothing else in use."""
    step: int
    """Of the largest step, at its peak: activations, logits, what sampling takes."""


def largest_step(config: EngineConfig, max_len: int) -> StepPlan:
    """As large as the scheduler makes them: all slots but the last decode and draw behind a long context, with every
    filter and penalty, and chunks of prompts take the rest of `max_batch_tokens`.

    All rows have one block, the cache's first: what is in it is of no matter.
    """
    slots = min(config.max_sequences, config.max_batch_tokens)
    longest = max(1, min(max_len, _LONGEST_CONTEXT) - 1)
    left, rows = config.max_batch_tokens, []
    for slot in reversed(range(slots)):
        count = max(1, min(longest, left - slot))  # every slot below this one has a token at least
        start = 0 if count > 1 else longest - 1
        rows.append(Row(slot, start, count, True, []))
        left -= count
    sampling = Sampling(temperature=0.9, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, logprobs=1, seed=1)
    assigned = [
        SlotAssignment(row.slot, "largest", row.slot, [0], 1, [0] * blocks_of(config, longest), sampling, 0, [])
        for row in rows
    ]
    return StepPlan(0, [], assigned, rows)


def blocks_of(config: EngineConfig, tokens: int) -> int:
    return -(-tokens // config.block_tokens)


def measure(memory: DeviceMemory, step: Callable[[], None]) -> Measured:
    """`step` leaves nothing behind. Raises what it raises."""
    memory.trim()
    memory.reset_peak()
    before = memory.allocated()
    step()
    peak = memory.peak() - before
    memory.trim()
    return Measured(memory.free(), peak)


def find_room(
    config: EngineConfig, memory: DeviceMemory, step: Callable[[], None], are_captured: bool
) -> tuple[Room, int]:
    """For a cache, and bytes for graphs, if steps are captured. Raises OutOfMemory where not even `step` fits."""
    free = memory.free()
    try:
        measured = measure(memory, step)
    except torch.OutOfMemoryError:
        raise OutOfMemory(
            f"a step of max_batch_tokens {config.max_batch_tokens} and max_sequences {config.max_sequences} does not "
            f"fit beside the weights: {memory.name} has {format_bytes(memory.total)}, of which {format_bytes(free)} "
            "are free; lower max_batch_tokens or max_sequences, by half at first"
        ) from None
    available = max(0, measured.free - measured.step)
    graphs = int(available * GRAPHS_FRACTION) if are_captured else 0
    why = (
        f"{memory.name} has {format_bytes(memory.total)}, of which {format_bytes(measured.free)} are free with the "
        f"weights loaded; a step of {config.max_batch_tokens} tokens and {config.max_sequences} sequences takes "
        f"{format_bytes(measured.step)}, and {format_bytes(graphs)} are for graphs"
    )
    return Room(available, max(0, available - graphs - int(memory.total * RESERVE_FRACTION)), why), graphs


# --- weights --------------------------------------------------------------------------------------------------------


class WeightNeed:
    """What weights take of the device of the fullest rank, as they are asked for, and otherwise."""

    def __init__(
        self, spec: ModelSpec, layout: Layout, precision: FloatPrecision, quantize: Quantization | None = None
    ) -> None:
        """`quantize` is what matrices are made of at load, or stored as in the checkpoint; None: `precision`."""
        self._spec = spec
        self._shape = shape_of(spec, spec.family)
        self._layout = layout
        self._stored_as: WeightPrecision = precision if quantize is None else _QUANTIZED[quantize]

    def bytes(self) -> int:
        return self._bytes(self._layout, self._stored_as)

    def load(self, memory: DeviceMemory, load: Callable[[], Loaded]) -> Loaded:
        """What `load` gives. Raises OutOfMemory where it does not fit: at once if that is sure, else as it is found."""
        free = memory.free()
        if self.bytes() > _ESTIMATE_MARGIN * free:
            raise self.error(memory, free)
        try:
            return load()
        except torch.OutOfMemoryError:
            raise self.error(memory, free) from None

    def error(self, memory: DeviceMemory, free: int) -> OutOfMemory:
        """Names bytes needed, bytes there, and what would fit in what was free."""
        options = self._options(free)
        advice = f"what would fit: {', or '.join(options)}" if options else "no precision and no number of ranks fits"
        return OutOfMemory(
            f"the weights of a rank take {format_bytes(self.bytes())} as {self._stored_as} ({self._layout}), and "
            f"{memory.name} has {format_bytes(free)} of {format_bytes(memory.total)} free; {advice}"
        )

    def _options(self, free: int) -> list[str]:
        """A precision on as many ranks, more ranks in this precision; or, where neither fits, both."""
        own, smaller = self._stored_as, self._smaller()
        found = [(name, self._layout, kind) for name, kind in smaller if self._fits(self._layout, kind, free)][:1]
        more = self._fewest_ranks(own, free)
        found += [] if more is None else [(f"tp {more.tp}", more, own)]
        if not found:
            both = [(name, self._fewest_ranks(kind, free), kind) for name, kind in smaller]
            found = [(f"{name} on tp {wide.tp}", wide, kind) for name, wide, kind in both if wide is not None][:1]
        return [f"{name} ({format_bytes(self._bytes(layout, kind))} a rank)" for name, layout, kind in found]

    def _smaller(self) -> list[tuple[str, WeightPrecision]]:
        """Of those that a float checkpoint can be made at load; one that is quantised already stays as it is."""
        now = self.bytes()
        is_float = self._spec.quantization is None
        return [named for named in _SMALLER if is_float and self._bytes(self._layout, named[1]) < now]

    def _fewest_ranks(self, precision: WeightPrecision, free: int) -> Layout | None:
        layout = self._layout
        wider = (Layout(tp=tp, pp=layout.pp, ep=layout.ep, cp=layout.cp) for tp in _TENSOR_RANKS if tp > layout.tp)
        possible = (other for other in wider if refusal(other, self._spec) is None)
        return next((other for other in possible if self._fits(other, precision, free)), None)

    def _fits(self, layout: Layout, precision: WeightPrecision, free: int) -> bool:
        """With a tenth of what is free left for steps and a cache."""
        return self._bytes(layout, precision) <= 0.9 * free

    def _bytes(self, layout: Layout, precision: WeightPrecision) -> int:
        return weight_bytes(_engine(self._shape, layout, precision))


def _engine(model: ModelShape, layout: Layout, weights: WeightPrecision) -> EngineShape:
    """Bytes of weights depend on no device: this one is any."""
    device = DeviceSpec(name="any", vendor="cpu", memory_bytes=0, memory_bandwidth=1.0, rates={"float32": 1.0})
    link = LinkSpec(name="any", kind="memory", bandwidth=1.0, latency=0.0)
    cluster = Cluster(device=device, devices_per_node=1, num_nodes=1, scale_up=link, network=None)
    return EngineShape(model=model, cluster=cluster, layout=layout, weights=weights)
