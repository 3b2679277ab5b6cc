"""One configuration's budget: bytes of a GPU by part, a step's time by part, bytes on links, and where the limit is."""

from __future__ import annotations

import msgspec

from shoal.core.cost.model import CostModel
from shoal.core.cost.types import EngineShape, MemoryBudget, Part, StepCost, StepShape
from shoal.plan.report import Section
from shoal.plan.setups import parts_of
from shoal.plan.units import show_bytes, show_duration

MOST_BATCH = 1 << 16


class StepBudget(msgspec.Struct, frozen=True, kw_only=True):
    what: str
    seconds: float
    low: float
    high: float
    parts: tuple[Part, ...]
    bytes_per_token: dict[str, float]
    """That one device sends for a token of the step, by link."""


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    configuration: str
    devices: int
    batch: int
    context: int
    prompt: int
    memory: MemoryBudget
    held: float
    """Sequences of that context for which the KV cache has room."""
    steps: tuple[StepBudget, ...]
    limits: tuple[str, ...]
    provenance: str


def explain(cost: CostModel, *, batch: int, context: int, prompt: int) -> Explanation:
    """A decode step of `batch` sequences at `context` tokens, and a step over a prompt's first piece."""
    engine, memory = cost.engine, cost.memory()
    decode_shape = _decode(batch, context)
    decode = cost.step(decode_shape)
    piece = min(prompt, engine.max_batch_tokens)
    prefill_shape = StepShape(
        prefill_tokens=piece,
        prefill_rows=1,
        prefill_pairs=piece * (piece + 1) / 2,
        prefill_context=piece,
        sampled=1,
    )
    prefill = cost.step(prefill_shape)
    held = memory.cache / (context * memory.bytes_per_token + memory.bytes_per_sequence)
    return Explanation(
        configuration=_name(engine),
        devices=engine.num_devices,
        batch=batch,
        context=context,
        prompt=prompt,
        memory=memory,
        held=max(0.0, held) * engine.attention_dp,
        steps=(
            _budget(f"decode: {batch} sequences at {context:,} tokens", decode, batch),
            _budget(f"prefill: {piece:,} tokens of a prompt", prefill, piece),
        ),
        limits=tuple(_limits(cost, memory, decode, batch, context, max(0.0, held) * engine.attention_dp)),
        provenance=decode.provenance,
    )


def _decode(batch: int, context: int) -> StepShape:
    return StepShape(decode_rows=batch, decode_context=batch * context, sampled=batch)


def _name(engine: EngineShape) -> str:
    groups = f" x attention-dp{engine.attention_dp}" if engine.attention_dp > 1 else ""
    cluster = engine.cluster.name or engine.cluster.device.name
    return f"{engine.model.name}, {engine.layout}{groups}, {engine.weights} weights, {engine.cache} KV, on {cluster}"


def _budget(what: str, step: StepCost, tokens: int) -> StepBudget:
    return StepBudget(
        what=what,
        seconds=step.seconds,
        low=step.low,
        high=step.high,
        parts=parts_of(step),
        bytes_per_token={name: size / tokens for name, size in step.link_bytes.items()},
    )


# --- where the limit is -----------------------------------------------------------------------------------------------


def _limits(
    cost: CostModel, memory: MemoryBudget, decode: StepCost, batch: int, context: int, held: float
) -> list[str]:
    if memory.cache <= 0:
        return [f"memory: it does not fit; {show_bytes(-memory.cache)} a GPU are missing"]
    told = []
    if held < batch:
        told.append(f"memory: KV for {held:.1f} sequences of {context:,} tokens, {batch} were asked for")
    else:
        told.append(f"memory: KV for {held:.0f} sequences of {context:,} tokens, {held / batch:.1f} times this batch")
    largest = max(decode.parts, key=lambda part: part.seconds)
    told.append(
        f"time: {largest.name} is {largest.seconds / decode.seconds:.0%} of a decode step, bound by {largest.bound}"
    )
    read = sum(part.bytes for part in decode.parts if part.name not in ("collectives", "pipeline"))
    floor = read / cost.engine.cluster.device.memory_bandwidth
    if floor > 0:
        told.append(
            f"speed of light: reading {show_bytes(read)} takes {show_duration(floor)} at full bandwidth; the step takes"
            f" {decode.seconds / floor:.1f} times that"
        )
    turn = _compute_bound_batch(cost, context)
    if turn is None:
        told.append(f"batching: the weights' matrix products stay bound by bandwidth up to {MOST_BATCH:,} sequences")
    elif turn <= held:
        told.append(
            f"batching: more sequences are nearly free up to about {turn}, where matrix products fill the compute"
        )
    else:
        told.append(f"batching: memory ends it at {held:.0f} sequences, compute would at about {turn}")
    return told


def _compute_bound_batch(cost: CostModel, context: int) -> int | None:
    """The first power of two at which the weights' part is bound by compute."""
    batch = 1
    while batch <= MOST_BATCH:
        step = cost.step(_decode(batch, context))
        parts = [part for part in step.parts if part.name in ("linear", "experts") and part.seconds > 0]
        if parts and max(parts, key=lambda part: part.seconds).bound == "compute":
            return batch
        batch *= 2
    return None


# --- told to people ---------------------------------------------------------------------------------------------------


def sections(found: Explanation) -> list[Section]:
    memory = found.memory
    rows = [
        (name, show_bytes(size), f"{size / memory.total:.0%}")
        for name, size in (
            ("weights", memory.weights),
            ("activations", memory.activations),
            ("workspace", memory.workspace),
            ("KV cache", memory.cache),
            ("usable", memory.total),
        )
    ]
    per = f"A token of KV takes {show_bytes(memory.bytes_per_token)} on each GPU"
    told = [
        Section(
            title=found.configuration,
            lines=(
                f"{found.devices} GPUs; figures rest on {found.provenance} values",
                f"{per}; the cache holds {memory.cache_tokens:,} tokens",
            ),
        ),
        Section(title="Memory of a GPU", columns=("part", "bytes", "share"), rows=tuple(rows)),
    ]
    for step in found.steps:
        told.append(
            Section(
                title=f"{step.what}: {show_duration(step.seconds)}"
                f" ({show_duration(step.low)} to {show_duration(step.high)})",
                lines=tuple(
                    f"{show_bytes(size)} over {name} from each GPU for a token"
                    for name, size in step.bytes_per_token.items()
                ),
                columns=("part", "time", "share", "bound by", "bytes"),
                rows=tuple(
                    (
                        part.name,
                        show_duration(part.seconds),
                        f"{part.seconds / step.seconds:.0%}",
                        part.bound,
                        show_bytes(part.bytes) if part.bytes else "",
                    )
                    for part in step.parts
                ),
            )
        )
    told.append(Section(title="Where the limit is", lines=found.limits))
    return told
