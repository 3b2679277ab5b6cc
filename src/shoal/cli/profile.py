"""The command `shoal profile`, its flags and its help. What it does is in profiling.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def profile(
    model: Annotated[
        str, typer.Argument(help="A built-in name, a checkpoint directory, a .gguf file, or a hub id.")
    ] = "smollm2-135m",
    phase: Annotated[
        Literal["prefill", "decode", "mixed"],
        typer.Option(help="Prompts, sequences that decode, or one prompt beside sequences that decode."),
    ] = "decode",
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 1,
    tokens: Annotated[
        int, typer.Option("--input", min=1, help="Tokens of each: of a prompt, or cached of one that decodes.")
    ] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Steps to trace.")] = 10,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Keep the trace, for Perfetto or chrome://tracing.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "int8"], typer.Option(help="Precision of the weights.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: one a core]")] = None,
    ops: Annotated[
        Literal["auto", "native", "torch"], typer.Option(help="Arithmetic: native CPU kernels, or torch.")
    ] = "auto",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Read no weights: only config.json is needed.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Take limits from this device, measured now, not from the catalogue.")
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Of `shoal calibrate`, for the prediction.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> int:
    """Trace steps of the real engine: what each part took, moved and computed, and how near it is to its limit.

    The engine is of this process alone: no gateway and no server. Limits are of the device as the catalogue has it, or
    with --measure as it is; a part at 100% of its limit moves its bytes at the full bandwidth of the memory, or
    computes at the full rate.

    **Examples**

    - `shoal profile`
    - `shoal profile ./Llama-3.1-8B --dtype bfloat16 --batch 64 --input 2048 --trace decode.json`
    - `shoal profile ./Llama-3.1-8B --random-weights --phase prefill --input 8192 --json`
    """
    from shoal.cli.profiling import Wanted, run_profile

    wanted = Wanted(
        model=model,
        phase=phase,
        batch=batch,
        tokens=tokens,
        steps=steps,
        dtype=dtype,
        device=device,
        threads=threads,
        ops=ops,
        random_weights=random_weights,
        measure=measure,
    )
    return run_profile(wanted, trace, calibration, as_json=as_json)
