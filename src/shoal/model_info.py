"""`shoal info`: a model's counts, and what of it fits in this machine's memory."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.table import Table

from shoal.core.model_spec import PRECISION_BYTES, ModelSpec


def memory_bytes() -> tuple[int, int]:
    """Physical memory in all and available now, of this machine."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return total, int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return total, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def describe(name: str, spec: ModelSpec, context: int | None) -> dict[str, Any]:
    """Facts by name, bytes and tokens as plain numbers."""
    total, available = memory_bytes()
    context = min(context or spec.max_len, spec.max_len)
    fits = []
    for precision in ("float32", "bfloat16", "int8"):
        weights = spec.weight_bytes(precision)
        per_token = spec.kv_bytes_per_token(4 if precision == "float32" else 2)
        left = max(0, available - weights)
        fits.append(
            {
                "weights": precision,
                "weight_bytes": weights,
                "kv_bytes_per_token": per_token,
                "fits": weights + per_token * context <= available,
                "kv_tokens": left // per_token,
                "sequences_of_context": left // (per_token * context),
            }
        )
    return {
        "name": name,
        "family": spec.family,
        "parameters": spec.num_parameters(),
        "active_parameters": spec.num_active_parameters(),
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocabulary": spec.vocab_size,
        "max_context": spec.max_len,
        "flops_per_token": spec.flops_per_token(1),
        "weight_bytes": {precision: spec.weight_bytes(precision) for precision in PRECISION_BYTES},
        "context": context,
        "memory_bytes": total,
        "available_bytes": available,
        "fits": fits,
    }


def print_description(facts: dict[str, Any], console: Console) -> None:
    console.print(
        f"[bold]{facts['name']}[/bold]: {facts['family']}, {facts['parameters']:,} parameters, "
        f"{facts['layers']} layers of {facts['hidden_size']}, {facts['heads']} heads over {facts['kv_heads']} KV heads "
        f"of {facts['head_dim']}, vocabulary {facts['vocabulary']:,}, context {facts['max_context']:,}"
    )
    console.print(
        f"{facts['flops_per_token'] / 1e6:,.0f} MFLOP a token; this machine has "
        f"{facts['available_bytes'] / 2**30:.1f} of {facts['memory_bytes'] / 2**30:.1f} GiB available"
    )
    table = Table("weights", "bytes", "KV a token", "fits", "KV tokens", f"sequences of {facts['context']:,}")
    for row in facts["fits"]:
        table.add_row(
            row["weights"],
            f"{row['weight_bytes'] / 2**20:,.0f} MiB",
            f"{row['kv_bytes_per_token'] / 2**10:,.0f} KiB",
            "yes" if row["fits"] else "no",
            f"{row['kv_tokens']:,}",
            f"{row['sequences_of_context']:,}",
        )
    console.print(table)
