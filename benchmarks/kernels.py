"""The native CPU kernels beside torch's, on the shapes of SmolLM2-135M: a Markdown table.

    python benchmarks/kernels.py [--rounds 7] [--threads 2] [--only linear|attention]

Each library has a process of its own, so that their thread pools do not fight, and the two take turns within every
round. A ratio is taken round by round; the table shows its median and, in brackets, its smallest and largest. Weights
of one shape are as many matrices as the model has layers, so that they come from memory as they do in a model.

torch computes `F.linear` (float32) and its dynamically quantised linear layer (int8); its attention is
`scaled_dot_product_attention` over contiguous keys and values, which no paged cache has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from machine import ForeignLoad, describe, num_cores

LAYERS = 30
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 9, 3, 64, 16
SHAPES = {
    "qkv": (960, 576),
    "output": (576, 576),
    "gate and up": (3072, 576),
    "down": (576, 1536),
    "head": (49152, 576),
}
"""Output and input features."""
ROWS = (1, 4, 16, 64, 256, 512)
ATTENTION = {
    "decode, 1 sequence": (1, 1, 2048),
    "decode, 64 sequences": (64, 1, 300),
    "prefill, from nothing": (1, 512, 512),
    "prefill, last of 2,048": (1, 512, 2048),
}
"""Sequences, new tokens of each, tokens of context with them."""
SECONDS = 0.03
"""Least time of one measurement."""
QUIET_CORES = 0.1
"""Foreign load, in cores, up to which a run counts."""

Operation = Callable[[], Any]


# --- what a process computes ----------------------------------------------------------------------------------------


class Native:
    def __init__(self, threads: int) -> None:
        import torch

        from shoal.engine.attention.native import NativeAttention
        from shoal.engine.native_ops import NativeOps

        torch.set_num_threads(1)
        self.ops = NativeOps(threads=threads)
        self.attention_backend = NativeAttention(self.ops)
        self.name = self.ops.variant

    @lru_cache(maxsize=1)  # noqa: B019  (one object a process; one shape's weights at a time)
    def _weights(self, n: int, k: int, precision: Any) -> list[Any]:
        import torch

        return [self.ops.pack(torch.randn(n, k), None, precision) for _ in range(_copies(n))]

    def linear(self, n: int, k: int, rows: int, precision: str) -> list[Operation]:
        import torch

        x = torch.randn(rows, k)
        return [lambda w=w: self.ops.linear(x, w) for w in self._weights(n, k, precision)]  # type: ignore[misc]

    def attention(self, sequences: int, queries: int, context: int) -> list[Operation]:
        import torch

        from shoal.engine.attention.base import AttentionBatch

        blocks = -(-context // BLOCK_SIZE)
        cache = self.attention_backend.allocate(
            LAYERS, sequences * blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM, torch.float32, torch.device("cpu")
        )
        for tensor in cache.keys + cache.values:
            tensor.normal_()
        batch = AttentionBatch.causal(
            query_starts_S1=torch.arange(0, sequences * queries + 1, queries, dtype=torch.int32),
            context_lens_S=torch.full((sequences,), context, dtype=torch.int32),
            block_tables_SB=torch.randperm(sequences * blocks).int().view(sequences, blocks),
            slot_mapping_T=torch.zeros(sequences * queries, dtype=torch.int32),
        )
        q = torch.randn(sequences * queries, HEADS, HEAD_DIM)
        forward = self.attention_backend.forward
        return [lambda i=i: forward(cache, i, q, batch, scale=HEAD_DIM**-0.5) for i in range(LAYERS)]  # type: ignore[misc]


class Torch:
    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.name = torch.__version__

    @lru_cache(maxsize=1)  # noqa: B019
    def _weights(self, n: int, k: int, precision: str) -> list[Any]:
        import torch

        layers = [torch.nn.Linear(k, n, bias=False) for _ in range(_copies(n))]
        if precision == "int8":
            return [torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(each)) for each in layers]
        return layers

    def linear(self, n: int, k: int, rows: int, precision: str) -> list[Operation]:
        import torch

        x = torch.randn(rows, k)
        return [lambda w=w: w(x) for w in self._weights(n, k, precision)]  # type: ignore[misc]

    def attention(self, sequences: int, queries: int, context: int) -> list[Operation]:
        import torch
        import torch.nn.functional as F  # noqa: N812

        q = torch.randn(sequences, HEADS, queries, HEAD_DIM)
        caches = [torch.randn(2, sequences, KV_HEADS, context, HEAD_DIM) for _ in range(LAYERS)]
        mask = None
        if 1 < queries < context:
            mask = torch.ones(queries, context, dtype=torch.bool).tril(context - queries)

        def run(cache: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(
                q, cache[0], cache[1], mask, is_causal=queries == context, enable_gqa=True
            )

        return [lambda cache=cache: run(cache) for cache in caches]  # type: ignore[misc]


def _copies(n: int) -> int:
    return 1 if n > 10_000 else LAYERS


def serve(library: str, threads: int) -> None:
    """Read a case a line, measure it, answer with seconds of one operation."""
    import torch

    made = Native(threads) if library == "native" else Torch(threads)
    print(json.dumps(made.name), flush=True)
    prepared: tuple[Any, list[Operation]] | None = None
    with torch.inference_mode():
        for line in sys.stdin:
            kind, arguments = json.loads(line)
            if prepared is None or prepared[0] != (kind, arguments):
                prepared = None  # give memory back before more is asked for
                prepared = ((kind, arguments), getattr(made, kind)(*arguments))
                for operation in prepared[1]:
                    operation()
            count, began = 0, time.perf_counter()
            while time.perf_counter() - began < SECONDS:
                for operation in prepared[1]:
                    operation()
                count += len(prepared[1])
            print(json.dumps((time.perf_counter() - began) / count), flush=True)


# --- comparison -----------------------------------------------------------------------------------------------------


class Child:
    def __init__(self, library: str, threads: int) -> None:
        command = [sys.executable, "-W", "ignore", __file__, "--serve", library, "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the measuring process ended with status {self.process.wait()}")
        return json.loads(line)

    def measure(self, kind: str, arguments: tuple[Any, ...]) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps((kind, arguments)) + "\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(
    native: Child, torch: Child, rounds: int, kind: str, ours: tuple[Any, ...], theirs: tuple[Any, ...]
) -> tuple[float, float, str]:
    """Median seconds of each, and theirs over ours: above 1 the native kernel is faster."""
    pairs = [(native.measure(kind, ours), torch.measure(kind, theirs)) for _ in range(rounds)]
    ratios = [b / a for a, b in pairs]
    spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), spread


def print_linear(native: Child, torch: Child, rounds: int) -> None:
    print(
        "| layer | N x K | rows | float32 µs | GFLOP/s | GB/s | vs torch float32 | bfloat16 µs "
        "| int8 µs | int8 GOP/s | vs torch int8 | int8 vs our float32 |\n"
        "|---|---|--:|--:|--:|--:|---|--:|--:|--:|---|--:|"
    )
    for name, (n, k) in SHAPES.items():
        for rows in ROWS if n < 10_000 else ROWS[:4]:
            found = {}
            for precision in ("float32", "int8"):
                arguments = (n, k, rows, precision)
                found[precision] = compare(native, torch, rounds, "linear", arguments, arguments)
            half = statistics.median(native.measure("linear", (n, k, rows, "bfloat16")) for _ in range(rounds))
            (wide, _, against), (narrow, _, against_int8) = found["float32"], found["int8"]
            print(
                f"| {name} | {n} x {k} | {rows} | {wide * 1e6:.0f} | {2e-9 * n * k * rows / wide:.0f} "
                f"| {4e-9 * n * k / wide:.0f} | {against} | {half * 1e6:.0f} | {narrow * 1e6:.0f} "
                f"| {2e-9 * n * k * rows / narrow:.0f} | {against_int8} | {wide / narrow:.2f} |",
                flush=True,
            )


def print_attention(native: Child, torch: Child, rounds: int) -> None:
    print("\n| attention | sequences | new tokens | context | native µs | torch µs | vs torch |")
    print("|---|--:|--:|--:|--:|--:|---|")
    for name, case in ATTENTION.items():
        ours, theirs, spread = compare(native, torch, rounds, "attention", case, case)
        numbers = " | ".join(map(str, case))
        print(f"| {name} | {numbers} | {ours * 1e6:.0f} | {theirs * 1e6:.0f} | {spread} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--only", choices=("linear", "attention"))
    parser.add_argument("--serve", choices=("native", "torch"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    if options.serve:
        return serve(options.serve, options.threads)
    load = ForeignLoad()
    native, torch = Child("native", options.threads), Child("torch", options.threads)
    machine = describe()
    print(
        f"{machine['cpu']}, {options.threads} threads, {native.name} kernels, torch {torch.name}, "
        f"{machine['system']}, {datetime.now(UTC):%Y-%m-%d}, median of {options.rounds}\n"
    )
    if options.only != "attention":
        print_linear(native, torch, options.rounds)
    if options.only != "linear":
        print_attention(native, torch, options.rounds)
    native.close()
    torch.close()
    busy = load.cores()
    verdict = ": torch's barriers wait for it, so these ratios are not a result" if busy > QUIET_CORES else ""
    print(f"\n{busy:.2f} cores were busy with something else meanwhile{verdict}.")


if __name__ == "__main__":
    main()
