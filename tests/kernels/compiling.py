"""Compile kernels for a GPU that is not there: what a launch would run, down to machine code, and what it takes.

Triton brings the assembler with it, so nothing but the launch itself needs a card. Run as a program, without the
interpreter: it prints a line for each kernel that the launches in `launches()` compile.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from shoal.engine.quantization.weight import KernelWeight


class Compiled(NamedTuple):
    name: str
    spilled_bytes: int
    registers: int
    shared_bytes: int


def compile_launches(capability: int, launches: Callable[[], Any]) -> list[Compiled]:
    """Everything that the call launches, on CPU tensors, compiled for a CUDA capability such as 90, and not run."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    compiled: list[Compiled] = []
    original = JITFunction.run

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    def run(self: Any, *args: Any, **options: Any) -> Any:
        options["warmup"] = True
        with contextlib.redirect_stdout(io.StringIO()) as said:
            kernel = original(self, *args, **options)
        if log := said.getvalue():  # none comes of a kernel that these launches had compiled before
            spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", log))
            registers = max(int(count) for count in re.findall(r"Used (\d+) registers", log))
            compiled.append(Compiled(kernel.metadata.name, spilled, registers, kernel.metadata.shared))
        return kernel

    triton.runtime.driver.set_active(Driver())
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True  # what the assembler says, with the options that a launch gives it
    JITFunction.run = run
    try:
        launches()
    finally:
        JITFunction.run = original
    return compiled


def launches() -> None:
    """Every kernel of the step in the shapes of large models."""
    from shoal.core.model_spec import MoESpec
    from shoal.engine.kernels import activation, moe_experts, moe_routing, norm, rope, sampling

    bf16 = torch.bfloat16
    x, residual, weight = torch.empty(4, 4096, dtype=bf16), torch.empty(4, 4096, dtype=bf16), torch.empty(4096)
    norm.rms_norm(x, weight, 1e-5)
    norm.rms_norm(x, weight, 1e-5, residual_TH=residual)
    norm.rms_norm(x, weight, 1e-5, residual_TH=residual, first_weight_H=weight)
    activation.gate(x, "silu")
    activation.gate(x, "gelu_tanh")

    heads, kv_heads, size = 32, 8, 128
    qkv, positions = torch.empty(4, (heads + 2 * kv_heads) * size, dtype=bf16), torch.zeros(4, dtype=torch.int64)
    table, slots, head_norm = torch.empty(64, size), torch.zeros(4, dtype=torch.int32), torch.empty(size)
    rope.rope_(qkv, positions, table, heads, kv_heads, size, head_norm, head_norm, 1e-6)
    per_head, per_token = torch.ones(kv_heads), torch.ones(8, 16, kv_heads)
    for dtype, scale in (
        (bf16, None),
        (torch.float8_e4m3fn, per_head),
        (torch.float8_e4m3fn, per_token),
        (torch.int8, per_head),
        (torch.int8, per_token),
    ):
        cache = torch.empty(8, 16, kv_heads, size, dtype=dtype)
        paged = rope.PagedKV(cache, cache, scale, scale)
        rope.rope_(qkv, positions, table, heads, kv_heads, size, None, None, 1e-6, paged, slots)

    vocab_size = 151936
    settings = sampling.Settings(
        torch.empty(4, len(sampling.FLOATS)),
        torch.empty(4, len(sampling.WORDS), dtype=torch.int64),
        torch.empty(2, vocab_size, dtype=torch.int32),
    )
    sampling.sample(torch.empty(4, vocab_size), positions, positions, settings, sampling.Needs(True, True))

    for spec in (
        MoESpec(num_experts=128, num_experts_per_token=8, expert_intermediate_size=768),
        MoESpec(
            num_experts=256,
            num_experts_per_token=8,
            expert_intermediate_size=768,
            scoring="sigmoid",
            num_groups=8,
            num_groups_per_token=4,
            scaling=2.5,
        ),
    ):
        correction = torch.empty(spec.num_experts) if spec.scoring == "sigmoid" else None
        ids, weights = moe_routing.route(torch.empty(4, spec.num_experts), spec, correction)
    for dtype in (bf16, torch.float32):
        gate_up, down = torch.empty(4, 1536, 2048, dtype=dtype), torch.empty(4, 2048, 768, dtype=dtype)
        for tokens in (4, 2048) if dtype == bf16 else (2048,):  # the smallest tile and the largest
            x, local = torch.empty(tokens, 2048, dtype=dtype), torch.zeros(tokens, dtype=torch.int64)
            y, _ = moe_experts.run_experts(x, local, moe_experts.ExpertWeights(gate_up, down), "silu")
    moe_experts.combine(y[:32], ids.flatten(), weights)
    for weights, rows, group in (("fp8", 128, 128), ("int8", 1, 0), ("int4", 1, 128)):
        halves = (_few_bits(weights, rows, group, n, k) for n, k in ((1536, 2048), (2048, 768)))
        packed = moe_experts.ExpertWeights(*halves)
        for tokens in (4, 2048) if rows == 128 else (2048,):
            x, local = torch.empty(tokens, 2048, dtype=bf16), torch.zeros(tokens, dtype=torch.int64)
            moe_experts.run_experts(x, local, packed, "silu")


def _few_bits(weights: str, rows: int, group: int, n: int, k: int) -> KernelWeight:
    """Of four experts."""
    from shoal.engine.quantization.weight import KernelWeight

    is_packed = weights == "int4"
    stored = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}[weights]
    groups = k // (group or k)
    return KernelWeight(
        torch.empty(4, n, k // 2 if is_packed else k, dtype=stored),
        torch.empty(4, n // rows, groups),
        torch.empty(4, n, groups, dtype=torch.uint8) if is_packed else None,
        rows,
        group or k,
        k,
    )


if __name__ == "__main__":
    for found in compile_launches(int(sys.argv[1]), launches):
        print(*found)
