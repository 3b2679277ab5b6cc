"""Compiles attention kernels for a GPU that is not there: `python -m tests.kernels.attention_launches CAPABILITY`."""

from __future__ import annotations

import sys

import torch

from shoal.engine.attention.base import AttentionBatch
from shoal.engine.attention.latent_cache import LatentCache
from shoal.engine.attention.triton_backend import TritonAttention
from shoal.engine.attention.triton_latent import TritonLatentAttention

CPU = torch.device("cpu")


def batch(lens: list[tuple[int, int]]) -> AttentionBatch:
    """Of sequences of (context, queries); their blocks are of no matter."""

    def int32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    starts = [sum(queries for _, queries in lens[:i]) for i in range(len(lens) + 1)]
    contexts = int32([context for context, _ in lens])
    tables, slots = torch.zeros(len(lens), 16, dtype=torch.int32), torch.zeros(starts[-1], dtype=torch.int32)
    return AttentionBatch.causal(int32(starts), contexts, tables, slots)


def step(
    heads: int, kv_heads: int, head_dim: int, kv_dtype: torch.dtype, dtype: torch.dtype, window: int | None
) -> None:
    """A chunk beside a decode, of a fused projection."""
    mixed, attention = batch([(200, 180), (60, 1)]), TritonAttention(132, parts=4)
    heads_TAD = torch.zeros(181, heads + 2 * kv_heads, head_dim, dtype=dtype)
    q, k, v = heads_TAD.split([heads, kv_heads, kv_heads], dim=1)
    cache = attention.allocate(1, 2, 16, kv_heads, head_dim, kv_dtype, CPU)
    attention.write(cache, 0, k, v, mixed)
    attention.forward(cache, 0, q, mixed, scale=0.1, window=window, need_lse=window is not None)


def latents(kv_dtype: torch.dtype) -> None:
    rows, decodes = torch.zeros(2, 129, 576, dtype=torch.bfloat16), batch([(9, 1), (9, 1)])
    attention, cache = TritonLatentAttention(512, 132, 4), LatentCache(1, 2, 16, 512, 64, kv_dtype, CPU)
    attention.write(cache, 0, rows[:, :1], rows[:, :1, :512], decodes)
    attention.forward(cache, 0, rows[:, 1:], decodes, scale=0.1)


LAUNCHES = {
    "bfloat16": lambda: step(32, 8, 128, torch.bfloat16, torch.bfloat16, None),
    "int8": lambda: step(32, 8, 128, torch.int8, torch.bfloat16, None),
    "float8": lambda: step(16, 8, 256, torch.float8_e4m3fn, torch.bfloat16, 1024),
    "float32": lambda: step(8, 4, 256, torch.float32, torch.float32, None),
    "latents": lambda: latents(torch.bfloat16),
    "latents of float8": lambda: latents(torch.float8_e4m3fn),
}
"""What large models launch, and the widest of all."""


if __name__ == "__main__":
    from tests.kernels.compiling import compile_launches

    for what, launch in LAUNCHES.items():
        for found in compile_launches(int(sys.argv[1]), launch):
            print(what.replace(" ", "-"), *found)
