"""Time of what one device computes: matrix products, attention over paged KV, experts, elementwise kernels. Seconds.

Each is a roofline: the larger of bytes over the bandwidth and operations over the rate that kernels reach, which are
fractions of the device's; `DeviceSpec.fractions` has measured ones, DEFAULT_FRACTIONS what is usual.
"""

from __future__ import annotations

import math

import msgspec

from shoal.core.cost.types import CachePrecision, WeightPrecision
from shoal.core.hardware import DeviceSpec

DEFAULT_FRACTIONS = {
    "matmul.float32": 0.80,
    "matmul.bfloat16": 0.72,
    "matmul.float8": 0.57,
    "matmul.float4": 0.42,
    "matmul.int8": 0.55,
    "stream.float32": 0.84,
    "stream.bfloat16": 0.84,
    "stream.float8": 0.77,
    "stream.int8": 0.77,
    "stream.float4": 0.55,
    "stream.int4": 0.55,
    "attention.decode": 0.80,
    "attention.decode.float8": 0.75,
    "attention.prefill": 0.50,
    "copy": 0.85,
}
"""Medians over A100, H100, H200, B200 and L40S of operators' measured times (NVIDIA aiconfigurator 0.12's tables)."""

BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float8": 1.0,
    "float8-block": 1.0 + 4 / (128 * 128),
    "int8": 1.0,
    "int4": 0.5 + 2 / 128,
    "float4": 0.5 + 1 / 16,
}
"""Of one weight, with its share of scales: a float32 of 128 x 128 (float8-block), a bfloat16 of 128 (int4), a float8
of 16 (float4)."""
CACHE_BYTES: dict[CachePrecision, float] = {"float32": 4.0, "bfloat16": 2.0, "float8": 1.0, "int8": 1.0}
_OPERANDS: dict[WeightPrecision, str] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float8": "float8",
    "float8-block": "float8",
    "int8": "int8",
    "int4": "bfloat16",
    "float4": "float4",
}
_WIDER = {"float4": "float8", "float8": "bfloat16", "int8": "bfloat16", "int4": "bfloat16", "bfloat16": "float32"}


class Reached(msgspec.Struct, frozen=True):
    """What a device's kernels reach: operations/s and bytes/s."""

    device: DeviceSpec
    fractions: dict[str, float]

    def fraction(self, name: str) -> float:
        """Of the device; else of the next shorter or wider name; else the usual one."""
        if name in self.fractions:
            return self.fractions[name]
        return DEFAULT_FRACTIONS[name]

    def operands(self, weights: WeightPrecision) -> str:
        """The dtype that products with such weights are computed in: the next wider one that the device has."""
        dtype = _OPERANDS[weights]
        while dtype not in self.device.rates and dtype in _WIDER:
            dtype = _WIDER[dtype]
        return dtype

    def rate(self, weights: WeightPrecision) -> float:
        dtype = self.operands(weights)
        if dtype not in self.device.rates:
            dtype = min(self.device.rates, key=lambda name: self.device.rates[name])
        return self.device.rates[dtype] * self.fraction(f"matmul.{dtype}")

    def stream(self, weights: WeightPrecision) -> float:
        """Without the time that a product takes whatever its size: the fractions are of products of some 10^8
        weights, that time included."""
        fraction = self.fraction(f"stream.{weights.removesuffix('-block')}")
        size = 1e8 * BYTES[weights] / self.device.memory_bandwidth
        return self.device.memory_bandwidth * min(
            0.9, 1 / max(1.0, 1 / fraction - self.product_seconds(weights) / size)
        )

    def product_seconds(self, weights: WeightPrecision) -> float:
        """That a matrix product takes whatever its size, and the quantising of what goes into it."""
        return self.device.kernel_seconds * PRODUCT_KERNELS[self.operands(weights)]

    def attention_bandwidth(self, cache: CachePrecision) -> float:
        name = "attention.decode.float8" if cache in ("float8", "int8") else "attention.decode"
        return self.device.memory_bandwidth * self.fraction(name)

    def attention_rate(self) -> float:
        dtype = "bfloat16" if "bfloat16" in self.device.rates else "float32"
        return self.device.rates[dtype] * self.fraction("attention.prefill")

    def copy(self) -> float:
        return self.device.memory_bandwidth * self.fraction("copy")


def roofline(stream: float, compute: float, sharpness: float = 3.0) -> float:
    """Both at once: near the crossing neither is hidden wholly. `sharpness` 1 is one after the other."""
    if stream <= 0 or compute <= 0:
        return max(stream, compute, 0.0)
    larger, smaller = (stream, compute) if stream > compute else (compute, stream)
    return larger * math.pow(1 + math.pow(smaller / larger, sharpness), 1 / sharpness)


PRODUCT_KERNELS = {"float32": 1.0, "bfloat16": 1.0, "int8": 2.0, "float8": 2.0, "float4": 3.0}
"""Least times of a kernel that a product takes beyond streaming, by its operands: an activation is quantised first."""
EXPERT_COMPUTE = {"float32": 0.7, "bfloat16": 0.7, "float8": 0.35, "float4": 0.75, "int8": 0.35, "int4": 0.3}
"""Of what large matrix products reach, by products grouped by expert, by their weights: tiles that are not full,
loads that differ, weights that are unpacked on the way.
From the tables of experts in aiconfigurator 0.12 (vLLM, SGLang, TensorRT-LLM on H100, H200, B200)."""
EXPERT_STREAM = {"float32": 0.78, "bfloat16": 0.78, "float8": 0.78, "float4": 0.78, "int8": 0.78, "int4": 0.45}
"""Of the bandwidth, by the weights of experts that few tokens visit; the same tables."""
EXPERT_KERNELS = {"float32": 12.0, "bfloat16": 12.0, "int8": 18.0, "float8": 18.0, "float4": 9.0, "int4": 18.0}
"""Of a layer of experts, by weights: choosing, sorting, quantising, two products, activation, and the sum. Those for
float4 are fused."""
ATTENTION_KERNELS = {"full": 3.0, "windowed": 3.0, "latent": 9.0, "sparse": 30.0, "linear": 10.0}
"""Of a layer's attention besides the projections, by kind."""


def busiest(visits: float, parts: float) -> float:
    """Load of the busiest of `parts` devices relative to the mean, where `visits` fall on each by chance."""
    return 1.0 if parts <= 1 or visits <= 0 else 1 + math.sqrt(2 * math.log(parts) / max(1.0, visits))


EXPERT_STATES = 12
"""Bytes a token, expert and feature of the hidden state that are moved to sort, quantise and add up."""
EXPERT_SKEW = 0.35
"""Of real choices: by that share fewer tokens, were the choices even, would visit as many experts (the tables'
power law of exponent 1.01, beside their balanced rows)."""


def distinct_experts(num_experts: float, chosen: float, tokens: float, skew: float = 0.0) -> float:
    """How many experts `tokens` tokens visit that choose `chosen` each: E (1 - (1 - k/E)^B) when all are as likely.

    `skew` in [0, 1): as many as a share of 1 - skew of the tokens would visit with even choices.
    """
    if tokens <= 0 or num_experts <= 0:
        return 0.0
    free = tokens * (1 - skew)
    spread = num_experts * (1 - math.pow(1 - min(1.0, chosen / num_experts), free))
    return min(num_experts, max(min(chosen, num_experts), spread))
