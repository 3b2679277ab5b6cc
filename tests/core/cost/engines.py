"""Engines that tests ask about: figures of planner.md, sections 4.1 to 4.3, and published shapes."""

from shoal.core.cost.types import EngineShape
from shoal.core.hardware import Cluster, DeviceSpec, LinkSpec
from shoal.core.layout import Layout
from shoal.core.model_shape import AttentionShape, LayerShape, MLPShape, ModelShape

KIB, MIB = 1 << 10, 1 << 20

H100 = DeviceSpec(
    name="H100-SXM",
    vendor="nvidia",
    memory_bytes=81559 * MIB,
    memory_bandwidth=3.35e12,
    rates={"bfloat16": 989e12, "float8": 1979e12, "float32": 67e12},
    fractions={"matmul.bfloat16": 0.76, "matmul.float8": 0.57, "stream.bfloat16": 0.86, "stream.float8": 0.79},
    kernel_seconds=2.9e-6,
    scale_up="nvlink4",
)
NVLINK = LinkSpec(
    name="nvlink4",
    kind="scale-up",
    bandwidth=450e9,
    latency=4.2e-6,
    reached=0.78,
    all_reduce={
        2: ((16 * KIB, 4.5e-6), (64 * KIB, 4.5e-6), (256 * KIB, 5.2e-6), (MIB, 8.3e-6), (4 * MIB, 20e-6))
        + ((16 * MIB, 81e-6), (128 * MIB, 469e-6)),
        8: ((16 * KIB, 5.3e-6), (64 * KIB, 6.4e-6), (256 * KIB, 10.8e-6), (MIB, 15e-6), (4 * MIB, 31e-6))
        + ((16 * MIB, 92e-6), (128 * MIB, 577e-6)),
    },
)
NDR = LinkSpec(name="ndr", kind="network", bandwidth=50e9, latency=18e-6, reached=0.7)
TCP = LinkSpec(name="tcp-25", kind="network", bandwidth=3.1e9, latency=70e-6, reached=0.4)


def dense(name: str, layers: int, hidden: int, heads: int, kv: int, inner: int, vocab: int, head: int) -> ModelShape:
    attention = AttentionShape(
        kind="full",
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head,
        parameters=hidden * head * (2 * heads + 2 * kv),
    )
    layer = LayerShape(count=layers, attention=attention, mlp=MLPShape(intermediate_size=inner), norms=2 * hidden)
    return ModelShape(
        name=name, hidden_size=hidden, vocab_size=vocab, max_len=131072, layers=(layer,), other_parameters=hidden
    )


LLAMA_8B = dense("llama-3.1-8b", 32, 4096, 32, 8, 14336, 128256, 128)
LLAMA_70B = dense("llama-3.1-70b", 80, 8192, 64, 8, 28672, 128256, 128)
LLAMA_405B = dense("llama-3.1-405b", 126, 16384, 128, 8, 53248, 128256, 128)


def _mixtral() -> ModelShape:
    layer = LLAMA_8B.layers[0]
    mlp = MLPShape(intermediate_size=0, num_experts=8, num_experts_per_token=2, expert_size=14336)
    return ModelShape(
        name="mixtral-8x7b",
        hidden_size=4096,
        vocab_size=32000,
        max_len=32768,
        layers=(LayerShape(count=32, attention=layer.attention, mlp=mlp, norms=8192),),
        other_parameters=4096,
    )


def _deepseek() -> ModelShape:
    hidden, heads, rank, latent, rope, nope, value = 7168, 128, 1536, 512, 64, 128, 128
    attention = AttentionShape(
        kind="latent",
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=nope + rope,
        value_dim=value,
        latent_dim=latent + rope,
        rope_dim=rope,
        parameters=hidden * rank
        + rank * heads * (nope + rope)
        + hidden * (latent + rope)
        + latent * heads * (nope + value)
        + heads * value * hidden,
        vectors=rank + latent,
    )
    experts = MLPShape(
        intermediate_size=0,
        num_experts=256,
        num_experts_per_token=8,
        expert_size=2048,
        shared_size=2048,
        vectors=256,
    )
    return ModelShape(
        name="deepseek-v3",
        hidden_size=hidden,
        vocab_size=129280,
        max_len=163840,
        layers=(
            LayerShape(count=3, attention=attention, mlp=MLPShape(intermediate_size=18432), norms=2 * hidden),
            LayerShape(count=58, attention=attention, mlp=experts, norms=2 * hidden),
        ),
        other_parameters=hidden,
    )


MIXTRAL = _mixtral()
DEEPSEEK = _deepseek()


def cluster(nodes: int = 1, network: LinkSpec | None = NDR, device: DeviceSpec = H100) -> Cluster:
    return Cluster(
        device=device, devices_per_node=8, num_nodes=nodes, scale_up=NVLINK, network=network if nodes > 1 else None
    )


def engine(model: ModelShape = LLAMA_70B, nodes: int = 1, **given: object) -> EngineShape:
    axes = {name: given.pop(name) for name in ("tp", "pp", "ep", "cp") if name in given}
    where = given.pop("cluster", None) or cluster(nodes)
    return EngineShape(
        model=model,
        cluster=where,
        layout=Layout(**axes),
        **{"weights": "float8", "profile": "vllm", **given},
    )
