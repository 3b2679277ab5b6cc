"""What storing the weights in bfloat16 or int8 costs: perplexity beside float32 on a fixed text.

    python benchmarks/quality.py

The text is the Python language reference as the interpreter carries it (`pydoc_data.topics`, the sections in
alphabetical order): plain English with some code, on every machine that runs this. It changes a little between versions
of Python, so the SHA-256 of what was used is printed; the comparison is made within one run, on one text.

It is cut into windows; each starts from nothing, and every token of a window but the first is predicted. Perplexity is
exp(mean negative log-likelihood). Target: int8 within 1% of float32.

Shapes: T tokens of a window, H hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch

import machine
from shoal.checkpoint.builtin import PullError
from shoal.checkpoint.errors import CheckpointError, ModelNotFound
from shoal.checkpoint.resolve import load_spec, resolve
from shoal.checkpoint.tokenizer import load_tokenizer
from shoal.core.config import WeightPrecision
from shoal.engine.attention.base import AttentionBatch
from shoal.engine.attention.native import NativeAttention
from shoal.engine.model import Decoder
from shoal.engine.native import unavailable_reason
from shoal.engine.native_ops import NativeOps
from shoal.engine.weights import open_weights

PRECISIONS: tuple[WeightPrecision, ...] = ("float32", "bfloat16", "int8")
BLOCK_SIZE = 16
TARGET = 0.01
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Text:
    windows: list[list[int]]
    sha256: str
    """Of the UTF-8 text before it was cut."""


def read_text(model: Path, num_windows: int, window_len: int) -> Text:
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = load_tokenizer(model).encode(text)
    available = len(ids) // window_len
    if available < num_windows:
        raise SystemExit(
            f"--windows: the text has {available} windows of {window_len} tokens, {num_windows} were asked for"
        )
    # Evenly spread, so that no single topic decides.
    starts = [index * available // num_windows * window_len for index in range(num_windows)]
    windows = [ids[start : start + window_len] for start in starts]
    return Text(windows, hashlib.sha256(text.encode()).hexdigest())


def losses(model: Path, precision: WeightPrecision, windows: list[list[int]], threads: int) -> list[float]:
    """Mean negative log-likelihood, in nats a token, of each window. The KV cache is as the engine keeps it: bfloat16
    unless the weights are float32."""
    spec = load_spec(model)
    ops = NativeOps(threads=threads)
    try:
        decoder = Decoder(
            spec,
            ops,
            NativeAttention(ops),
            precision,
            device=CPU,
            kv_dtype=torch.float32 if precision == "float32" else torch.bfloat16,
            max_len=len(windows[0]),
        )
        source = open_weights(model)
        try:
            decoder.load(source)
        finally:
            source.close()
        with torch.inference_mode():
            return [window_loss(decoder, window) for window in windows]
    finally:
        ops.close()


def window_loss(decoder: Decoder, window: list[int]) -> float:
    length = len(window)
    num_blocks = -(-length // BLOCK_SIZE)
    batch = AttentionBatch(
        query_starts_S1=torch.tensor([0, length], dtype=torch.int32),
        context_lens_S=torch.tensor([length], dtype=torch.int32),
        block_tables_SB=torch.arange(num_blocks, dtype=torch.int32)[None],
        slot_mapping_T=torch.arange(length, dtype=torch.int32),
        max_query_len=length,
        max_context_len=length,
    )
    ids_T = torch.tensor(window)
    cache = decoder.new_cache(num_blocks, BLOCK_SIZE)
    hidden_TH = decoder.forward(ids_T, torch.arange(length), batch, cache)
    logits_TV = decoder.logits(hidden_TH[:-1].contiguous())
    return float(torch.nn.functional.cross_entropy(logits_TV.double(), ids_T[1:]))


def report(results: dict[WeightPrecision, list[float]]) -> str:
    reference = results["float32"]
    lines = ["| weights | perplexity | relative to float32 | standard error | within 1% |", "|" + " --- |" * 5]
    for precision, found in results.items():
        # Windows are paired, so what differs between texts does not blur what differs between precisions.
        differences = [loss - base for loss, base in zip(found, reference, strict=True)]
        change = math.expm1(statistics.mean(differences))
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        relative = "–" if precision == "float32" else f"{change:+.3%}"
        verdict = "–" if precision == "float32" else "yes" if change <= TARGET else "**no**"
        perplexity = math.exp(statistics.mean(found))
        lines.append(f"| {precision} | {perplexity:.4f} | {relative} | {error:.3%} | {verdict} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Perplexity of each weight precision on a fixed text.")
    parser.add_argument("--model", default="smollm2-135m", help="as for `shoal serve`; default smollm2-135m")
    parser.add_argument("--windows", type=int, default=64, help="default 64")
    parser.add_argument("--window-len", type=int, default=512, help="tokens; default 512")
    parser.add_argument("--threads", type=int, default=machine.num_cores(), help="default: all cores")
    arguments = parser.parse_args()
    for option, least in (("windows", 2), ("window_len", 2), ("threads", 1)):
        if getattr(arguments, option) < least:
            given = getattr(arguments, option)
            parser.error(f"--{option.replace('_', '-')} must be at least {least}, got {given}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if (reason := unavailable_reason()) is not None:
        raise SystemExit(f"this measures the native kernels, which are not available: {reason}")
    try:
        model = resolve(arguments.model).path
    except (ModelNotFound, PullError, CheckpointError) as error:
        raise SystemExit(f"--model: {error}") from None
    text = read_text(model, arguments.windows, arguments.window_len)
    facts = machine.describe()
    print(f"{arguments.model} on {facts['cpu']}, Python {platform.python_version()}, torch {facts['torch']}")
    print(f"{arguments.windows} windows of {arguments.window_len} tokens, text SHA-256 {text.sha256}\n")
    results = {precision: losses(model, precision, text.windows, arguments.threads) for precision in PRECISIONS}
    print(report(results))


if __name__ == "__main__":
    main()
