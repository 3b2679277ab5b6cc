"""`shoal pull`, `shoal models`, `shoal info`: models as files, and as numbers."""

from __future__ import annotations

from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from shoal.checkpoint.builtin import list_models
from shoal.checkpoint.resolve import load_spec
from shoal.cli.errors import CommandError
from shoal.cli.terminal import error_console, format_bytes, print_json, resolve_with_progress, shown_path
from shoal.core.config import EngineConfig, WeightPrecision
from shoal.core.model_spec import ModelSpec

_PRECISIONS: tuple[WeightPrecision, ...] = ("float32", "bfloat16", "int8")


def pull_model(model: str) -> None:
    """Fetch, and print the path. Raises ModelNotFound, PullError or CheckpointError."""
    files = resolve_with_progress(model, error_console())
    print(files.path)


def print_models(*, as_json: bool) -> None:
    listed = list_models()
    if as_json:
        print_json(
            [
                {
                    "name": model.name,
                    "description": model.description,
                    "size_bytes": model.size,
                    "path": None if model.path is None else str(model.path),
                }
                for model in listed
            ]
        )
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "size", "on this machine", "description"):
        table.add_column(column, overflow="fold")
    for model in listed:
        where = f"no: shoal pull {model.name}" if model.path is None else shown_path(model.path)
        table.add_row(model.name, format_bytes(model.size), where, model.description)
    console = Console(highlight=False)
    console.print(table)
    console.print("Any checkpoint directory, .gguf file or hub id can be given in place of a name.", style="dim")


class Fit(msgspec.Struct, frozen=True):
    """What is left for the KV cache with the weights in one precision, if `shoal serve` were started now."""

    dtype: str
    weight_bytes: int
    kv_bytes_per_token: int
    fits: bool
    kv_tokens: int
    """Tokens that the KV cache would hold."""
    sequences: int
    """Sequences of full length that run at once."""


def fit(spec: ModelSpec, model: str, dtype: WeightPrecision, max_len: int, available: int, device: str) -> Fit:
    """By the engine's own rule for sizing its cache. `available` is in bytes."""
    from shoal.engine.memory import OutOfMemory, estimated_room, plan_blocks, room_on_host

    config = EngineConfig(model=model, dtype=dtype, max_len=max_len)
    # As the worker chooses it where it is not told: the KV cache is as precise as the weights, but not below bfloat16.
    per_token, weights = spec.kv_bytes_per_token(4 if dtype == "float32" else 2), spec.weight_bytes(dtype)
    left = max(0, available - weights)
    room = room_on_host(left) if device == "cpu" else estimated_room(left)
    try:
        blocks = plan_blocks(config, block_bytes=per_token * config.block_size, max_len=max_len, room=room)
    except OutOfMemory:
        return Fit(dtype, weights, per_token, False, 0, 0)
    tokens = blocks * config.block_size
    return Fit(dtype, weights, per_token, True, tokens, tokens // max_len)


def print_info(model: str, max_len: int | None, *, as_json: bool) -> None:
    """Raises CommandError, ModelNotFound, PullError or CheckpointError."""
    files = resolve_with_progress(model, error_console())
    spec = load_spec(files.path)
    if max_len is not None and max_len > spec.max_len:
        raise CommandError(
            f"--max-model-len is {max_len}, and {files.name} was made for {spec.max_len} tokens: lower it"
        )
    length = max_len or spec.max_len

    import torch

    from shoal.engine.memory import available_memory

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    available = available_memory(device)
    fits = [fit(spec, model, dtype, length, available, device.type) for dtype in _PRECISIONS]
    if as_json:
        print_json(
            {
                "name": files.name,
                "path": str(files.path),
                "family": spec.family,
                "parameters": spec.num_parameters(),
                "active_parameters": spec.num_active_parameters(),
                "layers": spec.num_layers,
                "hidden_size": spec.hidden_size,
                "heads": spec.num_heads,
                "kv_heads": spec.num_kv_heads,
                "head_dim": spec.head_dim,
                "vocab_size": spec.vocab_size,
                "max_model_len": spec.max_len,
                "flops_per_token": spec.flops_per_token(length),
                "device": device.type,
                "available_bytes": available,
                "sequence_len": length,
                "fits": msgspec.to_builtins(fits),
            }
        )
        return
    _print_facts(files.name, spec, available, device.type, length, fits)


def _print_facts(name: str, spec: ModelSpec, available: int, device: str, length: int, fits: list[Fit]) -> None:
    console = Console(highlight=False)
    active = spec.num_active_parameters()
    parameters = _count(spec.num_parameters()) + (
        f", {_count(active)} active a token" if active != spec.num_parameters() else ""
    )
    facts: dict[str, Any] = {
        "model": f"{name} ({spec.family})",
        "parameters": parameters,
        "layers": f"{spec.num_layers} of {spec.hidden_size:,}, {spec.num_heads} heads over {spec.num_kv_heads} "
        f"KV heads of {spec.head_dim}",
        "vocabulary": f"{spec.vocab_size:,} tokens" + (", embeddings tied" if spec.tied_embeddings else ""),
        "context": f"{spec.max_len:,} tokens" + (f", window {spec.window:,}" if spec.window else ""),
        "compute": f"{spec.flops_per_token(1) / 1e9:,.2f} GFLOP a token, "
        f"{spec.flops_per_token(length) / 1e9:,.2f} at {length:,} tokens of context",
        "free memory": f"{format_bytes(available)} ({device})",
    }
    grid = Table(box=None, show_header=False, pad_edge=False)
    for label, value in facts.items():
        grid.add_row(f"[bold]{label}[/]", value)
    console.print(grid)
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("--dtype")
    for column in ("weights", "KV a token", "fits", "KV tokens", f"sequences of {length:,}"):
        table.add_column(column, justify="right")
    for row in fits:
        table.add_row(
            row.dtype,
            format_bytes(row.weight_bytes),
            format_bytes(row.kv_bytes_per_token),
            "yes" if row.fits else "[red]no[/]",
            f"{row.kv_tokens:,}" if row.fits else "",
            f"{row.sequences:,}" if row.fits else "",
        )
    console.print(table)


def _count(number: int) -> str:
    """134,515,008 (135M)."""
    short = (
        f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.0f}M" if number >= 1e6 else f"{number / 1e3:.0f}K"
    )
    return f"{number:,} ({short})"
