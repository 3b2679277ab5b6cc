"""What each kernel of a step must move and compute at the least, and how soon a device could do that.

CostModel predicts time; this counts work: every weight read once, every cached token that is seen read once, each
activation written by who makes it and read by who needs it. Bytes and operations of one device, all layers of its
stage together. Kernels are those of a step whose elementwise work is fused as far as it goes: an engine that fuses less
moves more, which is what its distance from the limit shows.

Symbols: T tokens, S rows that are sampled, h hidden, a bytes of an activation, n query and m key/value heads, d head
size, f inner features of the MLP, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from shoal.core.cost.memory import (
    attention_parameters,
    attention_precision,
    expert_ranks,
    local_cache_bytes,
    local_cache_elements,
    local_heads,
    stage_share,
)
from shoal.core.cost.operators import BYTES, EXPERT_SKEW, Reached, distinct_experts
from shoal.core.cost.types import EngineShape, StepShape, WeightPrecision
from shoal.core.hardware import DeviceSpec
from shoal.core.model_shape import AttentionShape, LayerShape


class KernelWork(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    part: str
    """What it is counted as by a profile: linear, experts, attention, cache, norms, rope, embedding, head, sampling."""
    launches: float
    """A step."""
    operands: str
    """dtype that it computes in, by the device's rates."""
    weight_bytes: float = 0.0
    cache_bytes: float = 0.0
    """Of keys and values, read or written."""
    state_bytes: float = 0.0
    """Of activations, read and written."""
    operations: float = 0.0

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes + self.state_bytes

    def limit_seconds(self, device: DeviceSpec) -> float:
        """The sooner it cannot be: all of the bandwidth, or all of the rate of its operands."""
        return max(self.bytes / device.memory_bandwidth, self.operations / device.rates[self.operands])


class PartWork(msgspec.Struct, frozen=True, kw_only=True):
    """Of all kernels that a profile counts as one part."""

    bytes: float
    operations: float
    limit_seconds: float
    """Sum of its kernels', which run one after another."""
    stream_seconds: float
    """Of that, what kernels take that are bound by bandwidth."""

    @property
    def is_streamed(self) -> bool:
        """Bandwidth is the limit, of most of it."""
        return 2 * self.stream_seconds >= self.limit_seconds


def by_part(kernels: Iterable[KernelWork], device: DeviceSpec) -> dict[str, PartWork]:
    """In the order in which the parts come first."""
    found: dict[str, PartWork] = {}
    for kernel in kernels:
        before = found.get(kernel.part) or PartWork(bytes=0.0, operations=0.0, limit_seconds=0.0, stream_seconds=0.0)
        limit = kernel.limit_seconds(device)
        is_streamed = kernel.bytes / device.memory_bandwidth >= limit
        found[kernel.part] = PartWork(
            bytes=before.bytes + kernel.bytes,
            operations=before.operations + kernel.operations,
            limit_seconds=before.limit_seconds + limit,
            stream_seconds=before.stream_seconds + limit * is_streamed,
        )
    return found


def step_kernels(engine: EngineShape, step: StepShape, *, activation_bytes: float | None = None) -> list[KernelWork]:
    """In the order of a layer. `activation_bytes` is of one number; None: 4 with float32 weights, else 2.

    Raises ValueError for engines whose ranks have different tokens: attention_dp and context parallelism.
    """
    if engine.attention_dp > 1 or engine.layout.cp > 1:
        raise ValueError("kernels are counted where all ranks have the same tokens: attention_dp and layout.cp are 1")
    return list(_Counter(engine, step, activation_bytes).kernels())


class _Counter:
    def __init__(self, engine: EngineShape, step: StepShape, activation_bytes: float | None) -> None:
        self._engine, self._step = engine, step
        self._model, self._hidden = engine.model, engine.model.hidden_size
        self._ranks, self._share = engine.layout.tensor_ranks, stage_share(engine)
        self._plain: WeightPrecision = "float32" if engine.weights == "float32" else "bfloat16"
        self._a = BYTES[self._plain] if activation_bytes is None else activation_bytes
        self._tokens = step.tokens
        self._reached = Reached(engine.cluster.device, {})

    def kernels(self) -> Iterator[KernelWork]:
        yield self._embedding()
        yield self._norms()
        for layer in self._model.layers:
            yield from self._attention(layer)
            yield from self._mlp(layer)
        if self._step.sampled:
            yield self._head()
            yield self._sampling()

    # --- one kind of kernel each --------------------------------------------------------------------------------------

    def _embedding(self) -> KernelWork:
        moved = self._tokens * self._hidden
        return KernelWork(
            name="embedding",
            part="embedding",
            launches=1,
            operands=self._elementwise,
            weight_bytes=moved * BYTES[self._plain],
            state_bytes=moved * self._a,
        )

    def _norms(self) -> KernelWork:
        """A layer's first two with the residual: 4 T h a bytes; further ones, and the first of all: 2 T h a."""
        plain, fused = 1.0, 0.0
        for layer in self._model.layers:
            count = layer.count * self._share
            fused += 2 * count
            plain += (layer.norms // self._hidden - 2) * count
        return KernelWork(
            name="residual + norm",
            part="norms",
            launches=plain + fused,
            operands=self._elementwise,
            state_bytes=(4 * fused + 2 * plain) * self._tokens * self._hidden * self._a,
        )

    def _attention(self, layer: LayerShape) -> Iterator[KernelWork]:
        shape, count = layer.attention, layer.count * self._share
        precision = attention_precision(self._model, self._engine.weights)
        heads, kv = local_heads(shape, self._ranks)
        own = attention_parameters(self._hidden, shape, self._ranks)
        if shape.kind in ("full", "windowed") and not shape.latent_dim:
            inner = (heads + 2 * kv) * shape.head_dim
            out = self._hidden * shape.num_heads * (shape.value_dim or shape.head_dim) / self._ranks
            yield self._linear("qkv projection", count, own - out, self._hidden, inner, precision)
            yield KernelWork(
                name="rope",
                part="rope",
                launches=count,
                operands=self._elementwise,
                state_bytes=count * 2 * self._tokens * (heads + kv) * shape.head_dim * self._a,
            )
            yield self._cache_write(shape, count)
            yield self._paged(shape, count, heads)
            yield self._linear("output projection", count, out, heads * shape.head_dim, self._hidden, precision)
            return
        # Several matrices in a row: their activations between are small beside their weights.
        yield self._linear("attention projections", count, own, self._hidden, self._hidden, precision)
        if shape.kind == "linear":
            yield self._recurrent(shape, count)
        else:
            yield self._cache_write(shape, count)
            yield self._paged(shape, count, heads)

    def _cache_write(self, shape: AttentionShape, count: float) -> KernelWork:
        return KernelWork(
            name="cache write",
            part="cache",
            launches=count,
            operands=self._elementwise,
            cache_bytes=count * self._tokens * local_cache_bytes(shape, self._ranks, self._engine.cache),
            state_bytes=count * self._tokens * local_cache_elements(shape, self._ranks) * self._a,
        )

    def _paged(self, shape: AttentionShape, count: float, heads: float) -> KernelWork:
        """Queries against all that they see: 2 n (d + d_v) operations a pair, absorbed where the cache is a latent."""
        step, value = self._step, shape.value_dim or shape.head_dim
        window = shape.window if shape.kind in ("windowed", "sparse") else None
        decode, prefill, pairs = float(step.decode_context), float(step.prefill_context), step.prefill_pairs
        if window:
            decode = min(decode, float(step.decode_rows * window))
            prefill = min(prefill, float(step.prefill_tokens + step.prefill_rows * window))
            pairs = min(pairs, float(step.prefill_tokens * window))
        pair = 2 * heads * (shape.head_dim + value)
        absorbed = 2 * heads * (2 * shape.latent_dim - shape.rope_dim) if shape.latent_dim else pair
        kept = local_cache_bytes(shape, self._ranks, self._engine.cache)
        return KernelWork(
            name="paged attention" if not shape.latent_dim else "latent attention",
            part="attention",
            launches=count,
            operands=self._wide,
            cache_bytes=count * (decode + prefill) * kept,
            state_bytes=count * self._tokens * heads * (shape.head_dim + value) * self._a,
            operations=count * (pairs * pair + decode * absorbed),
        )

    def _recurrent(self, shape: AttentionShape, count: float) -> KernelWork:
        state = shape.state_elements / self._ranks
        return KernelWork(
            name="recurrent state",
            part="attention",
            launches=count,
            operands=self._wide,
            cache_bytes=count * self._step.rows * 2 * state * 4,
            operations=count * self._tokens * 4 * state,
        )

    def _mlp(self, layer: LayerShape) -> Iterator[KernelWork]:
        mlp, count = layer.mlp, layer.count * self._share
        ups = 2 if mlp.gated else 1
        features = mlp.shared_size if mlp.num_experts else mlp.intermediate_size
        if mlp.num_experts:
            yield self._router(layer, count)
            yield self._experts(layer, count)
        if features:
            name = "shared expert: " if mlp.num_experts else ""
            own = features / self._ranks
            weights = self._hidden * own
            yield self._linear(f"{name}gate, up, activation", count, ups * weights, self._hidden, own)
            yield self._linear(f"{name}down projection", count, weights, own, self._hidden)

    def _router(self, layer: LayerShape, count: float) -> KernelWork:
        """Computed in float32 on every rank."""
        parameters = self._hidden * layer.mlp.num_experts
        return KernelWork(
            name="router",
            part="experts",
            launches=count,
            operands=self._elementwise,
            weight_bytes=count * parameters * 4,
            state_bytes=count * self._tokens * (self._hidden * self._a + layer.mlp.num_experts * 4),
            operations=count * 2 * parameters * self._tokens,
        )

    def _experts(self, layer: LayerShape, count: float) -> KernelWork:
        mlp, parts = layer.mlp, expert_ranks(self._engine)
        local, chosen = mlp.num_experts / parts, mlp.num_experts_per_token / mlp.num_experts
        size = (3 if mlp.gated else 2) * self._hidden * mlp.expert_size / self._engine.layout.tp
        touched = distinct_experts(local, chosen * local, self._tokens, EXPERT_SKEW)
        rows = self._tokens * chosen * local
        inner = mlp.expert_size / self._engine.layout.tp
        return KernelWork(
            name="experts",
            part="experts",
            launches=2 * count,
            operands=self._operands(self._engine.weights),
            weight_bytes=count * touched * size * BYTES[self._engine.weights],
            state_bytes=count * rows * 2 * (self._hidden + inner) * self._a,
            operations=count * 2 * size * rows,
        )

    def _head(self) -> KernelWork:
        sampled, rows = self._step.sampled, self._model.vocab_size / self._ranks
        parameters = rows * self._hidden
        return KernelWork(
            name="head",
            part="head",
            launches=1,
            operands=self._operands(self._plain),
            weight_bytes=parameters * BYTES[self._plain],
            state_bytes=sampled * (self._hidden * self._a + rows * 4),
            operations=2 * parameters * sampled,
        )

    def _sampling(self) -> KernelWork:
        """The largest of the float32 logits, or one drawn from them: each is read once."""
        return KernelWork(
            name="sampling",
            part="sampling",
            launches=1,
            operands=self._elementwise,
            state_bytes=self._step.sampled * self._model.vocab_size * 4.0,
        )

    def _linear(
        self,
        name: str,
        count: float,
        parameters: float,
        inputs: float,
        outputs: float,
        precision: WeightPrecision | None = None,
    ) -> KernelWork:
        """`parameters` of this rank; `inputs` and `outputs`: features of its activations."""
        precision = precision or self._engine.weights
        return KernelWork(
            name=name,
            part="linear",
            launches=count,
            operands=self._operands(precision),
            weight_bytes=count * parameters * BYTES[precision],
            state_bytes=count * self._tokens * (inputs + outputs) * self._a,
            operations=count * 2 * parameters * self._tokens,
        )

    # --- what it computes in ------------------------------------------------------------------------------------------

    def _operands(self, precision: WeightPrecision) -> str:
        return self._known(self._reached.operands(precision))

    @property
    def _wide(self) -> str:
        """Of attention: 16 bits where the device has them."""
        return self._known("bfloat16" if self._plain == "bfloat16" else "float32")

    @property
    def _elementwise(self) -> str:
        return self._known("float32")

    def _known(self, dtype: str) -> str:
        """One that the device has a rate of: its slowest in the place of one that is absent."""
        rates = self._engine.cluster.device.rates
        return dtype if dtype in rates else min(rates, key=lambda name: rates[name])
