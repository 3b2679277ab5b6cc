"""`shoal simulate`: its flags and their help. What it does is in simulation.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

_LOAD = "Load"
_ENGINES = "Engines"
_EVENTS = "What happens"
_TARGET = "Targets"
_OUTPUT = "Output"


def simulate(
    deployment: Annotated[
        Path, typer.Argument(metavar="DEPLOYMENT", help="The file that `shoal serve --deployment` takes.")
    ],
    on: Annotated[str, typer.Option("--on", metavar="CLUSTER", help="8xH100, 16x8xH100:ndr, or a topology file.")],
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Azure CSV, Mooncake JSONL, a request log, lengths.", rich_help_panel=_LOAD),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(metavar="RATE", help="As 20/s. Poisson; a trace's own clock is scaled.", rich_help_panel=_LOAD),
    ] = None,
    input_tokens: Annotated[
        str | None, typer.Option("--input", metavar="TOKENS", help="Of a prompt, in the mean.", rich_help_panel=_LOAD)
    ] = None,
    output_tokens: Annotated[
        str | None, typer.Option("--output", metavar="TOKENS", help="Of an output, in the mean.", rich_help_panel=_LOAD)
    ] = None,
    spread: Annotated[
        float, typer.Option(min=0.0, max=5.0, help="Of lengths: deviation over mean.", rich_help_panel=_LOAD)
    ] = 0.5,
    requests: Annotated[
        int | None, typer.Option(min=1, help="How many; of a trace, the first.", rich_help_panel=_LOAD)
    ] = None,
    duration: Annotated[
        str | None, typer.Option(metavar="TIME", help="For how long they come. [default: 10min]", rich_help_panel=_LOAD)
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(metavar="TOKENS", help="That all prompts begin with alike.", rich_help_panel=_LOAD),
    ] = None,
    repeat: Annotated[
        int, typer.Option(min=1, help="Copies of the trace over one another.", rich_help_panel=_LOAD)
    ] = 1,
    longest_pause: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="In a trace; a longer one is a gap. [default: a quarter of it, at least 1min]",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal runs.", rich_help_panel=_LOAD)] = 0,
    model: Annotated[str, typer.Option(help="Which of the deployment's. [default: its first]")] = "",
    replicas: Annotated[
        int | None, typer.Option(min=1, help="[default: the deployment's]", rich_help_panel=_ENGINES)
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="bfloat16, float8, int4, ... [default: the dtype]", rich_help_panel=_ENGINES)
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="bfloat16, float8, ... [default: the kv_dtype]", rich_help_panel=_ENGINES)
    ] = None,
    profile: Annotated[
        str, typer.Option(help="Whose kernels and host code: shoal, vllm, sglang, ...", rich_help_panel=_ENGINES)
    ] = "shoal",
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of `shoal calibrate`.", rich_help_panel=_ENGINES)
    ] = None,
    start: Annotated[
        str, typer.Option(metavar="TIME", help="That an engine takes to start.", rich_help_panel=_ENGINES)
    ] = "60s",
    fault: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FAULT",
            help="kill, rank, hang, throttle or link, as kill,replica=3,at=60s,for=30s. May be given again.",
            rich_help_panel=_EVENTS,
        ),
    ] = None,
    faults: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With a fault a line.", rich_help_panel=_EVENTS)
    ] = None,
    scale_on: Annotated[
        Literal["queue", "running", "kv"] | None,
        typer.Option(help="Scale on requests that wait, slots in use, or blocks in use.", rich_help_panel=_EVENTS),
    ] = None,
    scale_target: Annotated[
        float | None,
        typer.Option(help="That a replica should have. [default: queue 4, others 0.7]", rich_help_panel=_EVENTS),
    ] = None,
    min_replicas: Annotated[int, typer.Option(min=1, help="Of scaling.", rich_help_panel=_EVENTS)] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Of scaling. [default: what fits]", rich_help_panel=_EVENTS)
    ] = None,
    scale_down_after: Annotated[
        str, typer.Option(metavar="TIME", help="That fewer must do for so long.", rich_help_panel=_EVENTS)
    ] = "300s",
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="End then. [default: with the last]", rich_help_panel=_EVENTS)
    ] = None,
    ttft: Annotated[
        str | None, typer.Option(metavar="TIME", help="To the first token.", rich_help_panel=_TARGET)
    ] = None,
    tpot: Annotated[
        str | None, typer.Option(metavar="TIME", help="Between tokens, mean of a request.", rich_help_panel=_TARGET)
    ] = None,
    e2e: Annotated[str | None, typer.Option(metavar="TIME", help="To the last token.", rich_help_panel=_TARGET)] = None,
    interval: Annotated[
        str, typer.Option(metavar="TIME", help="Between two lines of the course.", rich_help_panel=_OUTPUT)
    ] = "10s",
    course: Annotated[bool, typer.Option("--course", help="Print it.", rich_help_panel=_OUTPUT)] = False,
    requests_csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a line a request.", rich_help_panel=_OUTPUT)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=_OUTPUT)] = False,
) -> None:
    """Run a deployment in virtual time: its own scheduler and router, a cost model in the place of its GPUs.

    **Examples**

    - `shoal simulate fleet.yaml --on 8xH100 --rate 20/s --input 2000 --output 300`
    - `shoal simulate fleet.yaml --on 16x8xH100:ndr --trace azure.csv --repeat 20 --ttft 1s --tpot 50ms`
    - `shoal simulate fleet.yaml --on 8xH100 --trace trace.jsonl --fault kill,replica=0,at=60s --json`
    - `shoal simulate fleet.yaml --on 32xL40S --rate 40/s --input 1k --output 200 --scale-on queue --start 90s`
    """
    from shoal.cli.simulation import Options, run_simulation

    run_simulation(
        deployment,
        Options(
            on=on,
            trace=trace,
            rate=rate,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            spread=spread,
            requests=requests,
            duration=duration,
            prefix=prefix,
            repeat=repeat,
            longest_pause=longest_pause,
            seed=seed,
            model=model,
            replicas=replicas,
            weights=weights,
            cache=cache,
            profile=profile,
            calibration=calibration,
            start=start,
            faults=tuple(fault or ()),
            faults_file=faults,
            scale_on=scale_on,
            scale_target=scale_target,
            min_replicas=min_replicas,
            max_replicas=max_replicas,
            scale_down_after=scale_down_after,
            until=until,
            ttft=ttft,
            tpot=tpot,
            e2e=e2e,
            interval=interval,
        ),
        course=course,
        requests_csv=requests_csv,
        as_json=as_json,
    )
