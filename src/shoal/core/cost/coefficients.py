"""What of a step's time does not depend on the step, worked out once for an engine. Seconds a unit of work.

Layers are counted for the fullest pipeline stage. Names: `stream` is seconds of reading, `compute` of computing.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from shoal.core.cost import collectives
from shoal.core.cost.memory import (
    attention_parameters,
    attention_precision,
    expert_ranks,
    local_cache_bytes,
    local_heads,
    stage_share,
)
from shoal.core.cost.operators import (
    ATTENTION_KERNELS,
    BYTES,
    CACHE_BYTES,
    EXPERT_COMPUTE,
    EXPERT_KERNELS,
    EXPERT_SKEW,
    EXPERT_STATES,
    EXPERT_STREAM,
    Reached,
    distinct_experts,
)
from shoal.core.cost.profiles import EngineProfile
from shoal.core.cost.types import EngineShape, WeightPrecision
from shoal.core.hardware import LinkSpec
from shoal.core.model_shape import LayerShape


class ExpertCoefficients(msgspec.Struct, kw_only=True):
    count: float
    """Layers of a stage."""
    local: float
    """Experts of a layer on one device."""
    chosen_share: float
    """Of all experts that a token visits."""
    parameters: float
    """Of one expert's part on one device."""
    bytes: float
    stream: float
    """Seconds of reading one expert."""
    compute: float
    """Seconds of one token in one expert."""
    skew: float
    parts: int
    """Devices that the experts are dealt to."""
    launch: float


class AttentionCoefficients(msgspec.Struct, kw_only=True):
    count: float
    window: int
    """0: none."""
    bytes: float
    """Of cache, of one token, on one device."""
    index_bytes: float
    """The same, of an indexer's keys, which a query reads all of."""
    row_bytes: float
    pair_operations: float
    context_operations: float
    decode_stream: float
    decode_compute: float
    prefill_compute: float
    index_stream: float
    index_compute: float
    row_stream: float
    token_compute: float
    launch: float


class Coefficients(msgspec.Struct, kw_only=True):
    groups: int
    """attention_dp."""
    context_ranks: int
    ranks: int
    """That an all-reduce joins."""
    stages: int
    all_stages: float
    """Work of all stages relative to the fullest."""
    linear: list[tuple[float, float]]
    """(seconds to read the matrices, seconds of one token), by precision."""
    linear_bytes: float
    linear_parameters: float
    linear_launch: float
    eager: float
    """The least time of a step with prompts, whose kernels the host launches one by one."""
    experts: list[ExpertCoefficients]
    attention: list[AttentionCoefficients]
    head_bytes: float
    head_parameters: float
    head_stream: float
    head_compute: float
    kernels: float
    elementwise: float
    """Of one token: norms, residuals, activation, quantising."""
    reduces: float
    hidden_bytes: float
    exchange_ranks: int
    exchange_bytes: float
    """That one device sends for one of its group's tokens, all layers."""
    collectives: Callable[[float], float]
    sends: tuple[LinkSpec, ...]
    """From each stage to the next."""
    send_latency: float
    """Of all of them."""
    send_per_token: float
    step_seconds: float
    row_seconds: float
    token_seconds: float


GEMMS_A_LAYER = 4
SCAN = 40.0
"""Operations a token and element of the state of linear attention, at the rate of attention: four products of chunks,
at a fifth of its rate."""
UNFUSED = 3.0
"""Launches that experts and uncommon attention take outside of graphs, for one within."""


def coefficients_of(engine: EngineShape, profile: EngineProfile) -> Coefficients:
    model, layout, device = engine.model, engine.layout, engine.cluster.device
    reached = Reached(device, device.fractions)
    share, ranks = stage_share(engine), layout.tensor_ranks
    kernel = device.kernel_seconds * profile.kernel_factor
    plain: WeightPrecision = "float32" if engine.weights == "float32" else "bfloat16"
    by_precision = _products(engine)
    layers = model.num_layers * share
    head = model.vocab_size * model.hidden_size / ranks
    hidden_bytes = model.hidden_size * BYTES[plain]
    sends = _sends(engine)
    exchange_ranks = expert_ranks(engine) if engine.attention_dp > 1 and model.is_mixture else 1
    expert_layers = sum(layer.count for layer in model.layers if layer.mlp.num_experts) * share
    chosen = max((layer.mlp.num_experts_per_token for layer in model.layers), default=0)
    copies = distinct_experts(exchange_ranks, 1, chosen)
    exchange_bytes = expert_layers * copies * model.hidden_size * 3.0 / ranks if exchange_ranks > 1 else 0.0
    return Coefficients(
        groups=engine.attention_dp,
        context_ranks=layout.cp,
        ranks=ranks,
        stages=layout.pp,
        all_stages=1 / share,
        linear=[
            (count * BYTES[precision] / reached.stream(precision), 2 * count / reached.rate(precision))
            for precision, count in by_precision.items()
        ],
        linear_bytes=sum(count * BYTES[precision] for precision, count in by_precision.items()),
        linear_parameters=sum(by_precision.values()),
        linear_launch=layers * GEMMS_A_LAYER * reached.product_seconds(engine.weights) * profile.kernel_factor,
        eager=_eager(engine, profile) * share,
        experts=[_experts(engine, layer, reached, kernel, profile) for layer in model.layers if layer.mlp.num_experts],
        attention=[_attention(engine, layer, reached, kernel, profile) for layer in model.layers],
        head_bytes=head * BYTES[plain],
        head_parameters=head,
        head_stream=head * BYTES[plain] / reached.stream(plain),
        head_compute=2 * head / reached.rate(plain),
        kernels=layers * profile.layer_kernels * kernel,
        elementwise=profile.elementwise * layers * _features(engine) * BYTES[plain] / reached.copy(),
        reduces=(2 * layers if exchange_ranks == 1 else 2 * layers - expert_layers) if ranks > 1 else 0.0,
        hidden_bytes=hidden_bytes,
        exchange_ranks=exchange_ranks,
        exchange_bytes=exchange_bytes,
        collectives=_collectives(engine, profile, layers, expert_layers, hidden_bytes, exchange_ranks),
        sends=sends,
        send_latency=sum(link.latency for link in sends),
        send_per_token=sum(hidden_bytes / (link.bandwidth * link.reached) for link in sends),
        step_seconds=profile.step_seconds,
        row_seconds=profile.row_seconds,
        token_seconds=profile.token_seconds,
    )


def _sends(engine: EngineShape) -> tuple[LinkSpec, ...]:
    """Links from each pipeline stage to the next: the network's where one of its ranks sends to another node."""
    cluster, each = engine.cluster, engine.layout.ranks // engine.layout.pp
    return tuple(
        cluster.scale_up
        if (stage - 1) * each // cluster.devices_per_node == ((stage + 1) * each - 1) // cluster.devices_per_node
        else cluster.link(engine.layout.ranks)
        for stage in range(1, engine.layout.pp)
    )


def _products(engine: EngineShape) -> dict[WeightPrecision, float]:
    """Parameters of a stage's matrices on one device, without experts, by precision."""
    model, share, ranks = engine.model, stage_share(engine), engine.layout.tensor_ranks
    found: dict[WeightPrecision, float] = {}
    for layer in model.layers:
        features = layer.mlp.shared_size if layer.mlp.num_experts else layer.mlp.intermediate_size
        inner = (3 if layer.mlp.gated else 2) * model.hidden_size * features / ranks
        for precision, count in (
            (
                attention_precision(model, engine.weights),
                attention_parameters(model.hidden_size, layer.attention, ranks),
            ),
            (engine.weights, inner),
        ):
            if count:
                found[precision] = found.get(precision, 0.0) + layer.count * share * count
    return found


def _features(engine: EngineShape) -> float:
    """Of one token and layer, read or written by norms, residuals and activations."""
    widest = max(
        (layer.mlp.shared_size + layer.mlp.num_experts_per_token * layer.mlp.expert_size)
        if layer.mlp.num_experts
        else layer.mlp.intermediate_size
        for layer in engine.model.layers
    )
    return 8 * engine.model.hidden_size + 3 * widest / engine.layout.tensor_ranks


def _experts(
    engine: EngineShape, layer: LayerShape, reached: Reached, kernel: float, profile: EngineProfile
) -> ExpertCoefficients:
    mlp = layer.mlp
    parts = expert_ranks(engine)
    parameters = (3 if mlp.gated else 2) * engine.model.hidden_size * mlp.expert_size / engine.layout.tp
    moved = parameters * BYTES[engine.weights]
    kind = engine.weights.removesuffix("-block")
    if kind == "float4" and reached.operands(engine.weights) != "float4":
        kind = "int4"  # Weights alone are of 4 bits, whatever their code.
    rate = reached.rate(engine.weights) * EXPERT_COMPUTE[kind]
    states = EXPERT_STATES * engine.model.hidden_size / reached.copy()
    return ExpertCoefficients(
        count=layer.count * stage_share(engine),
        local=mlp.num_experts / parts,
        chosen_share=mlp.num_experts_per_token / mlp.num_experts,
        parameters=parameters,
        bytes=moved,
        stream=moved / (engine.cluster.device.memory_bandwidth * EXPERT_STREAM[kind]),
        compute=profile.expert_compute * (2 * parameters / rate + states),
        skew=EXPERT_SKEW,
        parts=parts,
        launch=EXPERT_KERNELS[kind] * kernel,
    )


def _attention(
    engine: EngineShape, layer: LayerShape, reached: Reached, kernel: float, profile: EngineProfile
) -> AttentionCoefficients:
    a = layer.attention
    ranks = engine.layout.tensor_ranks
    per = CACHE_BYTES[engine.cache]
    heads = local_heads(a, ranks)[0]
    value = a.value_dim or a.head_dim
    bandwidth, rate = reached.attention_bandwidth(engine.cache), reached.attention_rate()
    if engine.cache in ("float8", "int8"):
        bandwidth *= profile.float8_attention
    index = a.index_dim * per
    moved = local_cache_bytes(a, ranks, engine.cache) - index
    pair: float = 2 * heads * (a.head_dim + value)
    # Absorbed: a query of latent_dim numbers, and a value of the part that is not rotated, by head and cached token.
    context = 2 * heads * (2 * a.latent_dim - a.rope_dim) if a.latent_dim else pair
    if a.kind == "sparse":
        pair = context  # every query has tokens of its own, which are not expanded for it
    state = token = 0.0
    if a.kind == "linear":
        moved = pair = context = 0.0
        state, token = 2 * a.state_elements / ranks * 4, SCAN * a.state_elements / ranks
    split = engine.layout.cp
    return AttentionCoefficients(
        count=layer.count * stage_share(engine),
        window=(a.window or 0) if a.kind in ("windowed", "sparse") else 0,
        bytes=moved,
        index_bytes=index,
        row_bytes=state,
        pair_operations=pair,
        context_operations=context,
        decode_stream=moved / bandwidth / split,
        decode_compute=context / rate / split,
        prefill_compute=pair / rate / split,
        index_stream=index / bandwidth / split,
        index_compute=2 * a.index_dim * a.index_heads / rate / split,
        row_stream=state / reached.copy(),
        token_compute=token / rate,
        launch=ATTENTION_KERNELS[a.kind] * kernel,
    )


def _eager(engine: EngineShape, profile: EngineProfile) -> float:
    kernels = 0.0
    for layer in engine.model.layers:
        experts = EXPERT_KERNELS["bfloat16"] if layer.mlp.num_experts else 0.0
        special = 0.0 if layer.attention.kind in ("full", "windowed") else ATTENTION_KERNELS["latent"]
        own = 2 * GEMMS_A_LAYER + profile.layer_kernels + UNFUSED * (experts + special)
        kernels += layer.count * own
    return kernels * profile.eager_kernel_seconds


def _collectives(
    engine: EngineShape,
    profile: EngineProfile,
    layers: float,
    expert_layers: float,
    hidden_bytes: float,
    exchange_ranks: int,
) -> Callable[[float], float]:
    cluster, ranks = engine.cluster, engine.layout.tensor_ranks
    more = profile.reduce_seconds + profile.rank_seconds * (ranks - 1)
    reduces = 2 * layers if exchange_ranks == 1 else 2 * layers - expert_layers
    chosen = max((layer.mlp.num_experts_per_token for layer in engine.model.layers), default=0)
    hidden = engine.model.hidden_size

    def of(tokens: float) -> float:
        total = 0.0
        if ranks > 1:
            each = collectives.cluster_all_reduce(cluster, ranks, 1, tokens * hidden_bytes)
            total += reduces * max(1e-6, each + more)
        if exchange_ranks > 1:
            # Each device of a group sends its share of the group's tokens: as float8, and back in 16 bits.
            own = tokens / ranks * distinct_experts(exchange_ranks, 1, chosen) * hidden
            there = collectives.all_to_all(cluster, exchange_ranks * engine.layout.tp, 1, own)
            back = collectives.all_to_all(cluster, exchange_ranks * engine.layout.tp, 1, own * 2)
            total += expert_layers * (there + back)
        if engine.layout.cp > 1:
            total += context_exchange(engine, tokens * engine.layout.cp)
        return total

    return of


def context_exchange(engine: EngineShape, tokens: float) -> float:
    """Seconds of a step of so many tokens over context-parallel ranks: in every layer queries, keys and values of all
    are gathered, and each token's parts of attention go to its rank in float32 with their log-sum-exp
    (docs/parallelism.md)."""
    ranks, context = engine.layout.tensor_ranks, engine.layout.cp
    link = engine.cluster.link(context, ranks)
    total = 0.0
    for layer in engine.model.layers:
        gathered, parts = context_bytes(layer, tokens, ranks)
        there = collectives.all_gather(link, context, gathered)
        total += layer.count * (there + collectives.reduce_scatter(link, context, parts * context))
    return total


def context_bytes(layer: LayerShape, tokens: float, ranks: int) -> tuple[float, float]:
    """What is gathered in all, and one rank's parts of what is summed."""
    attention = layer.attention
    if attention.kind == "linear":
        return 0.0, 0.0
    queries = attention.num_heads * attention.head_dim / ranks
    gathered = 2 * tokens * (queries + attention.cache_elements() / min(ranks, max(1, attention.num_kv_heads)))
    return gathered, 4 * tokens * attention.num_heads / ranks * ((attention.value_dim or attention.head_dim) + 1)
