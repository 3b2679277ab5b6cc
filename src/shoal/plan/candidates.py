"""What an engine could be: every layout of a model on a cluster, in every precision that is allowed."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from shoal.core.cost.types import CachePrecision, EngineShape, WeightPrecision
from shoal.core.hardware import Cluster
from shoal.core.layout import Layout
from shoal.core.model_shape import ModelShape

WEIGHT_BITS: dict[WeightPrecision, float] = {
    "float32": 32,
    "bfloat16": 16,
    "float8": 8,
    "float8-block": 8,
    "int8": 8,
    "float4": 4,
    "int4": 4,
}
CACHE_BYTES: dict[CachePrecision, float] = {"float32": 4, "bfloat16": 2, "float8": 1, "int8": 1}


class Shape(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """Ranks along each axis, and groups with attention of their own."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    cp: int = 1
    attention_dp: int = 1

    @property
    def devices(self) -> int:
        return self.tp * self.pp * self.ep * self.cp * self.attention_dp

    @property
    def layout(self) -> Layout:
        return Layout(tp=self.tp, pp=self.pp, ep=self.ep, cp=self.cp)

    def __str__(self) -> str:
        sizes = (
            ("tp", self.tp),
            ("pp", self.pp),
            ("ep", self.ep),
            ("cp", self.cp),
            ("attention-dp", self.attention_dp),
        )
        return " x ".join(f"{name}{size}" for name, size in sizes if size != 1) or "tp1"


def sizes_for(cluster: Cluster) -> list[int]:
    """Along one axis: powers of two, and what divides the cluster or a node evenly."""
    total = cluster.num_devices
    powers = {2**power for power in range(total.bit_length()) if 2**power <= total}
    even = {
        size
        for whole in (total, cluster.devices_per_node, cluster.num_nodes)
        for size in range(1, min(whole, 64) + 1)
        if whole % size == 0
    }
    return sorted(powers | even)


def shapes(model: ModelShape, cluster: Cluster) -> Iterator[Shape]:
    """Every product of sizes that the cluster has devices for. Experts alone are split over ep and attention-dp."""
    sizes = sizes_for(cluster)
    split = sizes if model.is_mixture else [1]
    for tp in sizes:
        for pp in _up_to(sizes, cluster.num_devices // tp):
            for cp in _up_to(sizes, cluster.num_devices // (tp * pp)):
                for ep in _up_to(split, cluster.num_devices // (tp * pp * cp)):
                    for groups in _up_to(split, cluster.num_devices // (tp * pp * cp * ep)):
                        yield Shape(tp=tp, pp=pp, ep=ep, cp=cp, attention_dp=groups)


def _up_to(sizes: list[int], most: int) -> list[int]:
    return [size for size in sizes if size <= most]


def refusal(shape: Shape, model: ModelShape) -> str | None:
    """Why this model cannot be split so, whatever it runs on; None if it can."""
    ranks = shape.tp * shape.ep
    heads = min(layer.attention.num_heads for layer in model.layers)
    if ranks > heads:
        return f"{shape.layout} needs {ranks} attention heads, and the model has {heads}"
    if shape.pp > model.num_layers:
        return f"pp{shape.pp} is more stages than the model's {model.num_layers} layers"
    for layer in model.layers:
        mlp = layer.mlp
        if not mlp.num_experts:
            if ranks > mlp.intermediate_size:
                return f"{shape.layout} is more ranks than the MLP has features ({mlp.intermediate_size})"
        elif mlp.num_experts % (shape.ep * shape.attention_dp):
            return f"{shape.ep * shape.attention_dp} does not divide the model's {mlp.num_experts} experts"
        elif shape.tp > mlp.expert_size:
            return f"tp{shape.tp} is more than an expert's {mlp.expert_size} features"
    return None


def engines_that_fit(devices: int, cluster: Cluster) -> int:
    """Engines of so many devices on a cluster: an engine is within a node where it can be, else on whole ones."""
    if devices <= cluster.devices_per_node:
        return cluster.num_nodes * (cluster.devices_per_node // devices)
    return cluster.num_nodes // -(-devices // cluster.devices_per_node)


def lost_engines(replicas: int, devices: int, cluster: Cluster, survive: str) -> int:
    """Of so many engines, each of so many devices and spread evenly over nodes: those that are gone with one GPU (all
    on its MIG slices, where the devices are such), or with one node."""
    if not survive or not replicas:
        return 0
    if survive == "gpu":
        return min(replicas, -(-cluster.slices // devices))
    if devices > cluster.devices_per_node:
        return 1
    return -(-replicas // cluster.num_nodes)


def replicas_for(needed: int, devices: int, cluster: Cluster, survive: str) -> int:
    """The fewest engines of which so many are left."""
    replicas = needed
    while replicas - lost_engines(replicas, devices, cluster, survive) < needed:
        replicas += 1
    return replicas


def crosses_nodes(shape: Shape, cluster: Cluster) -> list[str]:
    """Axes whose ranks are on several nodes."""
    crossing = []
    stride = 1
    for name, size in (
        ("tp", shape.tp),
        ("ep", shape.ep),
        ("cp", shape.cp),
        ("pp", shape.pp),
        ("attention-dp", shape.attention_dp),
    ):
        if size > 1 and (size - 1) * stride >= cluster.devices_per_node:
            crossing.append(name)
        stride *= size
    return crossing


def engine_shape(
    model: ModelShape,
    cluster: Cluster,
    shape: Shape,
    weights: WeightPrecision,
    cache: CachePrecision,
    *,
    profile: str,
    max_batch_tokens: int,
    max_sequences: int,
    memory_share: float,
) -> EngineShape:
    return EngineShape(
        model=model,
        cluster=cluster,
        layout=shape.layout,
        attention_dp=shape.attention_dp,
        weights=weights,
        cache=cache,
        profile=profile,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        memory_share=memory_share,
    )
