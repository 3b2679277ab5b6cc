"""The commands below `shoal bench`, their flags and their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal import __version__

bench = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Prove what a deployment promises.")


@bench.command()
def faults(
    deployment: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Started for the run, and gone after it.")
    ] = None,
    names: Annotated[
        str, typer.Option("--faults", metavar="A,B,...", help="Only these. [default: all that it can have]")
    ] = "",
    streams: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 32,
    kills: Annotated[int, typer.Option(min=1, help="Times of faults that strike in every phase.")] = 5,
    seed: Annotated[int, typer.Option(help="Of requests, phases and targets.")] = 0,
    requests: Annotated[int, typer.Option(min=1, help="Different requests.")] = 24,
    max_tokens: Annotated[int, typer.Option(min=8, help="Of the longest answer.")] = 48,
    patience: Annotated[float, typer.Option(min=1.0, help="Seconds after which a request is lost.")] = 60.0,
    window: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds for which hangs, partitions and the like last.")
    ] = None,
    greedy_only: Annotated[
        bool, typer.Option("--greedy-only", help="For endpoints whose sampling cannot be repeated elsewhere.")
    ] = False,
    model: Annotated[str, typer.Option(help="Which of the deployment's. [default: its first]")] = "",
    api_key: Annotated[str | None, typer.Option(envvar="SHOAL_API_KEY", help="That may also ask for /fleet.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    show: Annotated[bool, typer.Option("--list", help="List the faults and exit.")] = False,
) -> int:
    """Break a deployment in every way that one host allows, and compare each answer with the undisturbed one.

    Each fault runs under load and must prove that it took effect; aimed at nothing, the same proof must fail. The exit
    status is 1 if a request was lost or failed, or a token was repeated, missing or other than without faults.

    **Examples**

    - `shoal bench faults --list`
    - `shoal bench faults --deployment fleet.yaml`
    - `shoal bench faults --deployment fleet.yaml --faults kill,hang --kills 30 --json`
    """
    from shoal.bench.faults.suite import Options
    from shoal.cli.bench import bench_faults, list_faults

    if show:
        list_faults()
        return 0
    if deployment is None:
        raise typer.BadParameter("give the deployment to test", param_hint="--deployment")
    options = Options(
        version=__version__,
        faults=tuple(name.strip() for name in names.split(",") if name.strip()),
        streams=streams,
        kills=kills,
        seed=seed,
        requests=requests,
        max_tokens=max_tokens,
        patience=patience,
        window=window,
        greedy_only=greedy_only,
        model=model,
        headers={} if api_key is None else {"authorization": f"Bearer {api_key}"},
    )
    return bench_faults(deployment, options, as_json=as_json)
