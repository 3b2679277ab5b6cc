"""What int8 and bfloat16 weights cost in quality: perplexity beside float32, on text that every Python has.

    python benchmarks/quality.py

The text is the language reference in the standard library's `pydoc_data.topics`: topics in the order of their names,
joined by blank lines. It differs a little between versions of Python, so the report gives version and SHA-256; the
relative difference of two precisions on the same text is what counts. Windows of 1,024 tokens are scored independently,
each from its second token on.

Shapes: T tokens of a window, H hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
from importlib import import_module
from pathlib import Path
from typing import cast

import torch

import machine
from shoal.checkpoint.builtin import pull
from shoal.checkpoint.resolve import load_spec
from shoal.checkpoint.tokenizer import load_tokenizer
from shoal.core.config import WeightPrecision
from shoal.engine.attention.base import AttentionBackend, AttentionBatch
from shoal.engine.attention.native import NativeAttention
from shoal.engine.attention.portable import PortableAttention
from shoal.engine.model import Decoder
from shoal.engine.native import unavailable_reason
from shoal.engine.native_ops import NativeOps
from shoal.engine.ops import Ops, TorchOps
from shoal.engine.weights import open_weights

BLOCK_SIZE = 16
PRECISIONS: tuple[WeightPrecision, ...] = ("float32", "bfloat16", "int8")
LIMIT = 0.01
"""Relative difference to float32 that a precision may have."""


def reference_text() -> str:
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def make_decoder(model: Path, precision: WeightPrecision, max_len: int, arithmetic: str) -> Decoder:
    """On the CPU, with the kernels that `shoal serve` uses there, or with torch."""
    spec, cpu = load_spec(model), torch.device("cpu")
    ops: Ops
    # A backend takes only the caches that it made itself, which a protocol cannot say: the casts.
    if arithmetic == "native":
        native = NativeOps(threads=machine.num_cores())
        ops, attention = native, cast("AttentionBackend", NativeAttention(native))
    else:
        ops, attention = TorchOps(cpu), cast("AttentionBackend", PortableAttention())
    kv_dtype = torch.float32 if precision == "float32" else torch.bfloat16  # what the engine chooses by default
    decoder = Decoder(spec, ops, attention, precision, device=cpu, kv_dtype=kv_dtype, max_len=max_len)
    source = open_weights(model)
    try:
        decoder.load(source)
    finally:
        source.close()
    return decoder


def window_losses(decoder: Decoder, windows: list[list[int]]) -> list[float]:
    """Mean negative log-likelihood a token of each window, in nats."""
    window_len = len(windows[0])
    num_blocks = -(-window_len // BLOCK_SIZE)
    cache = decoder.new_cache(num_blocks, BLOCK_SIZE)
    positions_T = torch.arange(window_len)
    batch = AttentionBatch.causal(
        query_starts_S1=torch.tensor([0, window_len], dtype=torch.int32),
        context_lens_S=torch.tensor([window_len], dtype=torch.int32),
        block_tables_SB=torch.arange(num_blocks, dtype=torch.int32)[None],
        slot_mapping_T=positions_T.int(),
    )
    losses = []
    for window in windows:
        ids_T = torch.tensor(window)
        with torch.inference_mode():
            logits_TV = decoder.logits(decoder.forward(ids_T, positions_T, batch, cache)[:-1])
            losses.append(float(torch.nn.functional.cross_entropy(logits_TV, ids_T[1:])))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity by weight precision, as a Markdown table.")
    parser.add_argument("--model", default="smollm2-135m", help="a built-in model; default smollm2-135m")
    parser.add_argument("--windows", type=int, default=32, help="default 32")
    parser.add_argument("--window-len", type=int, default=1024, help="tokens; default 1024")
    parser.add_argument("--ops", choices=["native", "torch"], help="arithmetic; default: native where it can run")
    arguments = parser.parse_args()
    if arguments.windows < 1 or arguments.window_len < 2:
        parser.error("--windows must be at least 1 and --window-len at least 2")
    arithmetic = arguments.ops or ("torch" if unavailable_reason() else "native")
    model = pull(arguments.model)
    text = reference_text()
    ids = load_tokenizer(model).encode(text)
    length = arguments.window_len
    windows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][: arguments.windows]
    if len(windows) < arguments.windows:
        parser.error(f"--windows: the text has only {len(windows)} windows of {length} tokens")
    digest = hashlib.sha256(text.encode()).hexdigest()
    print(
        f"{arguments.model}, {len(windows)} windows of {length} tokens of Python {platform.python_version()}'s "
        f"`pydoc_data.topics` (SHA-256 {digest[:16]}), {arithmetic} arithmetic\n"
    )
    print("| weights | MB | perplexity | against float32 | worst window | within 1% |")
    print("| --- | --- | --- | --- | --- | --- |")
    baseline: list[float] = []
    for precision in PRECISIONS:
        decoder = make_decoder(model, precision, length, arithmetic)
        losses = window_losses(decoder, windows)
        decoder.ops.close()
        baseline = baseline or losses
        differences = [math.expm1(loss - base) for loss, base in zip(losses, baseline, strict=True)]
        difference = math.expm1((sum(losses) - sum(baseline)) / len(losses))
        print(
            f"| {precision} | {decoder.num_weight_bytes / 1e6:.0f} | {math.exp(sum(losses) / len(losses)):.4f} "
            f"| {difference:+.3%} | {max(differences, key=abs):+.3%} "
            f"| {'yes' if abs(difference) <= LIMIT else '**no**'} |"
        )


if __name__ == "__main__":
    main()
