"""The command `shoal calibrate`, its flags and its help. What it does is in calibration.py."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer


def calibrate(
    model: Annotated[
        str, typer.Argument(help="A built-in name, a checkpoint directory, a .gguf file, or a hub id.")
    ] = "smollm2-135m",
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.json", help="The calibration.")] = Path(
        "calibration.json"
    ),
    hardware: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="The machine's devices too, as the catalogue has them.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "int8"], typer.Option(help="Precision of the weights.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    tensor_parallel_size: Annotated[
        str, typer.Option(metavar="N[,N...]", help="Numbers of ranks to time. [default: 1, and 2 where they fit]")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer points and rounds: about a minute.")] = False,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Visits to every point. [default: 5; 3 with --quick]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> int:
    """Time the real engine on this machine, so that plans and simulations are of it.

    Measures memory, matrix products and all-reduces, then steps of the engine over a grid of batches, contexts and
    prompt chunks; fits a few physical constants; shows what they predict for steps that they were not fitted to. Takes
    minutes, and wants the machine for itself.

    **Examples**

    - `shoal calibrate`
    - `shoal calibrate ./Llama-3.2-1B-Instruct --dtype int8 --output int8.json`
    - `shoal calibrate smollm2-135m --quick --tensor-parallel-size 1 --hardware machine.yaml`
    """
    from shoal.cli.calibration import run_calibrate

    return run_calibrate(
        model,
        dtype,
        device,
        _ranks(tensor_parallel_size),
        output,
        hardware,
        quick=quick,
        rounds=rounds,
        command=shlex.join(["shoal", *sys.argv[1:]]),
        as_json=as_json,
    )


def _ranks(text: str) -> tuple[int, ...]:
    try:
        ranks = tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no list of numbers: write 1,2", param_hint="--tensor-parallel-size"
        ) from None
    if any(count < 1 for count in ranks):
        raise typer.BadParameter(f"{text!r}: the least is 1", param_hint="--tensor-parallel-size")
    return ranks
