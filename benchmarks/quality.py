"""What weights of fewer bits cost in quality: perplexity and greedy agreement beside float32, on text of every Python.

    python benchmarks/quality.py
    python benchmarks/quality.py --weights float32 bfloat16 --quantize fp8 int8 int4
    python benchmarks/quality.py --model ./Llama-3.1-8B-Instruct --beside ./Llama-3.1-8B-Instruct-FP8

The text is the language reference in the standard library's `pydoc_data.topics`: topics in the order of their names,
joined by blank lines. It differs a little between versions of Python, so the report gives version and SHA-256; the
relative difference of two precisions on the same text is what counts. Windows of 1,024 tokens are scored independently,
each from its second token on. Greedy agreement is the share of positions at which the likeliest next token is that of
the first row, given the same text before.

Shapes: T tokens of a window, H hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, cast, get_args

import torch
from torch import Tensor

import machine
from shoal.checkpoint.resolve import load_spec, resolve
from shoal.checkpoint.tokenizer import load_tokenizer
from shoal.core.config import WeightPrecision
from shoal.core.quantization import Quantization, at_load
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


class Row(NamedTuple):
    """One row of the table: a checkpoint, and what its weights are stored as."""

    model: Path
    label: str
    precision: WeightPrecision
    quantize: Quantization | None


class Scores(NamedTuple):
    """Of one window."""

    loss: float
    """Mean negative log-likelihood a token, in nats."""
    greedy_T: Tensor
    """Likeliest next token at each position but the last."""


def make_decoder(row: Row, max_len: int, arithmetic: str, device: torch.device) -> Decoder:
    """With the kernels that `shoal serve` uses on this device, or with torch."""
    spec, precision = load_spec(row.model), row.precision
    ops: Ops
    on_cpu = device.type == "cpu"
    activations = torch.float32 if on_cpu or precision == "float32" and row.quantize is None else torch.bfloat16
    quantize = None if row.quantize is None else at_load(row.quantize)
    # A backend takes only the caches that it made itself, which a protocol cannot say: the casts.
    if arithmetic == "native" and on_cpu and row.quantize is None and spec.quantization is None and spec.mla is None:
        native = NativeOps(threads=machine.num_cores())
        ops, attention = native, cast("AttentionBackend", NativeAttention(native))
    else:
        ops, attention = TorchOps(device, activations), cast("AttentionBackend", PortableAttention())
    kv_dtype = torch.float32 if precision == "float32" else torch.bfloat16  # what the engine chooses by default
    decoder = Decoder(
        spec,
        ops,
        attention,
        precision,
        device=device,
        dtype=activations,
        kv_dtype=kv_dtype,
        max_len=max_len,
        quantize=quantize,
    )
    source = open_weights(row.model)
    try:
        decoder.load(source)
    finally:
        source.close()
    return decoder


def window_scores(decoder: Decoder, windows: list[list[int]]) -> list[Scores]:
    """Every window by itself."""
    window_len, device = len(windows[0]), decoder.device
    num_blocks = -(-window_len // BLOCK_SIZE)
    cache = decoder.new_cache(num_blocks, BLOCK_SIZE)
    positions_T = torch.arange(window_len, device=device)
    batch = AttentionBatch.causal(
        query_starts_S1=torch.tensor([0, window_len], dtype=torch.int32, device=device),
        context_lens_S=torch.tensor([window_len], dtype=torch.int32, device=device),
        block_tables_SB=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
        slot_mapping_T=positions_T.int(),
    )
    scores = []
    for window in windows:
        ids_T = torch.tensor(window, device=device)
        with torch.inference_mode():
            logits_TV = decoder.logits(decoder.forward(ids_T, positions_T, batch, cache)[:-1])
            loss = float(torch.nn.functional.cross_entropy(logits_TV, ids_T[1:]))
            scores.append(Scores(loss, logits_TV.argmax(dim=1).cpu()))
    return scores


def compared(scores: list[Scores], baseline: list[Scores]) -> tuple[float, float, float]:
    """Relative difference in perplexity, that of the worst window, and the share of equal greedy choices."""
    differences = [math.expm1(score.loss - base.loss) for score, base in zip(scores, baseline, strict=True)]
    sums = [sum(score.loss for score in each) for each in (scores, baseline)]
    equal = [(score.greedy_T == base.greedy_T).float().mean() for score, base in zip(scores, baseline, strict=True)]
    difference = math.expm1((sums[0] - sums[1]) / len(scores))
    return difference, max(differences, key=abs), float(torch.stack(equal).mean())


def print_table(rows: list[Row], windows: list[list[int]], arithmetic: str, device: torch.device) -> None:
    """Each row's perplexity and agreement beside the first row's."""
    first = rows[0].label
    print(f"| weights | MB | perplexity | against {first} | worst window | greedy agreement | within 1% |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    baseline: list[Scores] = []
    for row in rows:
        decoder = make_decoder(row, len(windows[0]), arithmetic, device)
        scores = window_scores(decoder, windows)
        decoder.ops.close()
        baseline = baseline or scores
        difference, worst, agreement = compared(scores, baseline)
        perplexity = math.exp(sum(score.loss for score in scores) / len(scores))
        print(
            f"| {row.label} | {decoder.num_weight_bytes / 1e6:.0f} | {perplexity:.4f} | {difference:+.3%} "
            f"| {worst:+.3%} | {agreement:.2%} | {'yes' if abs(difference) <= LIMIT else '**no**'} |",
            flush=True,
        )


def rows_of(arguments: argparse.Namespace, model: Path) -> list[Row]:
    """The original first: all others stand beside it."""
    rows = [Row(model, precision, precision, None) for precision in arguments.weights]
    plain: WeightPrecision = "float32" if arguments.device == "cpu" else "bfloat16"
    rows += [Row(model, f"--quantize {kind}", plain, kind) for kind in arguments.quantize]
    for path in arguments.beside:
        scheme = load_spec(path).quantization
        label = path.name if scheme is None else f"{path.name} ({scheme.form} {scheme.weights})"
        rows.append(Row(path, label, plain, None))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity and greedy agreement by weights, as a Markdown table.")
    parser.add_argument("--model", default="smollm2-135m", help="a built-in model or a directory; default smollm2-135m")
    parser.add_argument("--windows", type=int, default=32, help="default 32")
    parser.add_argument("--window-len", type=int, default=1024, help="tokens; default 1024")
    parser.add_argument("--ops", choices=["native", "torch"], help="arithmetic; default: native where it can run")
    parser.add_argument("--weights", nargs="+", default=list(PRECISIONS), choices=PRECISIONS, help="default: all")
    parser.add_argument(
        "--quantize", nargs="+", default=[], choices=get_args(Quantization), help="at load, further rows"
    )
    parser.add_argument("--beside", nargs="+", default=[], type=Path, help="quantised checkpoints of the same model")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default cpu")
    arguments = parser.parse_args()
    if arguments.windows < 1 or arguments.window_len < 2:
        parser.error("--windows must be at least 1 and --window-len at least 2")
    arithmetic = arguments.ops or ("torch" if unavailable_reason() or arguments.device != "cpu" else "native")
    model = resolve(arguments.model).path
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
    print_table(rows_of(arguments, model), windows, arithmetic, torch.device(arguments.device))


if __name__ == "__main__":
    main()
