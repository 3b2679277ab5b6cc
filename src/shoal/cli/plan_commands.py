"""The flags and the help of `shoal plan` and `shoal explain`. What they do is in `cli.planning`."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import typer

from shoal.plan import units

Parsed = TypeVar("Parsed")


def _unit(parse: Callable[[str], Parsed]) -> Callable[[str], Parsed]:
    def checked(text: str) -> Parsed:
        try:
            return parse(text)
        except units.UnitError as error:
            raise typer.BadParameter(str(error)) from None

    return checked


def _several(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Of names joined by commas."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
        for name in names:
            if name not in known:
                near = get_close_matches(name, known, n=1, cutoff=0.3) or known[:1]
                raise units.UnitError(f"{name!r} is none of {', '.join(known)}; the nearest is {near[0]}")
        if not names:
            raise units.UnitError(f"{text!r} names nothing; choose of {', '.join(known)}")
        return names

    return parse


def _option(parse: Callable[[str], Any], metavar: str, help: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, parser=_unit(parse), metavar=metavar, help=help, rich_help_panel=panel)


_LOAD, _TARGETS, _CHOICE, _OUT = "Workload", "Targets", "What may be chosen", "Output"
Engine = Literal["shoal", "vllm", "sglang", "tensorrt-llm"]
Precision = Literal["float32", "bfloat16", "float8", "float8-block", "int8", "float4", "int4"]
Cache = Literal["float32", "bfloat16", "float8", "int8"]

On = Annotated[
    str,
    typer.Option(
        "--on", metavar="TOPOLOGY", help="8xH100, 2x8xH100:ndr, or a file of `shoal topology`.", show_default=False
    ),
]
Hardware = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE.yaml", help="Further devices, links and nodes.", rich_help_panel=_CHOICE),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option("--calibration", metavar="FILE", help="Of `shoal calibrate`.", rich_help_panel=_CHOICE),
]
Profile = Annotated[Engine, typer.Option("--engine", help="Whose kernels and host code.", rich_help_panel=_CHOICE)]
MemoryShare = Annotated[
    Any,
    _option(units.share, "SHARE", "Of a GPU's memory that engines take. [default: 90%]", _CHOICE, "--memory-share"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=_OUT)]


def plan(
    model: Annotated[
        str | None,
        typer.Argument(help="A published model, a hub id, or a path of its config.json.", show_default=False),
    ] = None,
    on: On = "",
    rate: Annotated[
        Any, _option(units.rate, "RATE", "Requests, as 20/s or 1200/min. [default: the trace's]", _LOAD, "--rate")
    ] = None,
    input_tokens: Annotated[Any, _option(units.count, "TOKENS", "Of a prompt, as 2000.", _LOAD, "--input")] = None,
    output_tokens: Annotated[Any, _option(units.count, "TOKENS", "Of an answer.", _LOAD, "--output")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Azure CSV, Mooncake JSONL, a request log, lengths.", rich_help_panel=_LOAD),
    ] = None,
    longest_pause: Annotated[
        Any,
        _option(
            units.duration,
            "TIME",
            "In a trace; a longer one is a gap. [default: a quarter of it, at least 1min]",
            _LOAD,
            "--longest-pause",
        ),
    ] = None,
    max_len: Annotated[
        Any,
        _option(
            units.count,
            "TOKENS",
            "That one sequence must have room for. [default: the longest asked for]",
            _LOAD,
            "--max-len",
        ),
    ] = None,
    ttft_p99: Annotated[
        Any, _option(units.duration, "TIME", "Time to first token, as 500ms.", _TARGETS, "--ttft-p99")
    ] = None,
    ttft_p50: Annotated[Any, _option(units.duration, "TIME", "Its median.", _TARGETS, "--ttft-p50")] = None,
    itl_p99: Annotated[
        Any, _option(units.duration, "TIME", "Between two tokens, as 30ms.", _TARGETS, "--itl-p99")
    ] = None,
    itl_p50: Annotated[Any, _option(units.duration, "TIME", "Its median.", _TARGETS, "--itl-p50")] = None,
    tpot: Annotated[Any, _option(units.duration, "TIME", "Between tokens, on average.", _TARGETS, "--tpot")] = None,
    budget: Annotated[
        Any, _option(units.money_per_hour, "MONEY", "At most, as $30/h or $20000/month.", _TARGETS, "--budget")
    ] = None,
    survive: Annotated[
        Any, _option(units.failures, "1gpu|1node", "Loss after which targets still hold.", _TARGETS, "--survive")
    ] = None,
    price: Annotated[
        Any, _option(units.money_per_hour, "MONEY", "Of one GPU. [default: the catalogue's]", _CHOICE, "--price")
    ] = None,
    precision: Annotated[
        Any,
        _option(
            _several(get_args(Precision)),
            "A,B,...",
            f"Of the weights: {', '.join(get_args(Precision))}. [default: the checkpoint's]",
            _CHOICE,
            "--precision",
        ),
    ] = None,
    kv: Annotated[
        Any,
        _option(
            _several(get_args(Cache)),
            "A,B,...",
            f"Of the KV cache: {', '.join(get_args(Cache))}. [default: bfloat16]",
            _CHOICE,
            "--kv",
        ),
    ] = None,
    engine: Profile = "shoal",
    pools: Annotated[
        bool,
        typer.Option("--pools/--no-pools", help="Consider prefill and decode apart.", rich_help_panel=_CHOICE),
    ] = True,
    attention_dp: Annotated[
        bool,
        typer.Option(
            "--attention-dp/--no-attention-dp",
            help="Consider groups with attention of their own and common experts.",
            rich_help_panel=_CHOICE,
        ),
    ] = True,
    memory_share: MemoryShare = None,
    calibration: CalibrationFile = None,
    hardware: Hardware = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every rejected family, not the nearest alone.", rich_help_panel=_OUT)
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page that opens offline.", rich_help_panel=_OUT)
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="Write what `shoal serve --deployment` takes.", rich_help_panel=_OUT),
    ] = None,
    known: Annotated[
        Literal["models", "devices"] | None,
        typer.Option("--list", help="List what is known, and exit.", rich_help_panel=_OUT),
    ] = None,
    as_json: Json = False,
) -> int:
    """Find the smallest setup that meets a target, and say why none of the others is it.

    It looks at every split of the model (tp, pp, ep, cp, attention-dp, replicas), chunk sizes, and prefill and decode
    together or apart. The exit status is 1 if nothing meets the target; then it says which bound breaks it, and what is
    nearest.

    **Examples**

    - `shoal plan llama-3.1-70b --on 8xH100 --rate 2/s --input 2000 --output 300 --ttft-p99 1s --itl-p99 50ms`
    - `shoal plan llama-3.1-405b --on 8x8xH100:ndr --rate 5/s --input 2k --output 300 --precision float8 --survive 1gpu`
    - `shoal plan qwen3-32b --on 4xL40S --trace requests.csv --tpot 40ms --budget $10/h --html plan.html`
    - `shoal plan llama-3.1-8b --on H100 --rate 1/s --input 1000 --output 200 --write deployment.yaml`
    - `shoal plan --list devices`
    """
    from shoal.cli.planning import Request, list_known, run_plan

    if known is not None:
        list_known(known, tuple(hardware or ()), as_json=as_json)
        return 0
    if model is None:
        raise typer.BadParameter("name a model, or see `shoal plan --list models`", param_hint="MODEL")
    if not on:
        raise typer.BadParameter("say what there is, as --on 8xH100", param_hint="--on")
    targets = {
        ("ttft", "p99"): ttft_p99,
        ("ttft", "p50"): ttft_p50,
        ("itl", "p99"): itl_p99,
        ("itl", "p50"): itl_p50,
        ("tpot", "p50"): tpot,
    }
    request = Request(
        model=model,
        on=on,
        rate=rate,
        input=input_tokens,
        output=output_tokens,
        trace=trace,
        longest_pause=longest_pause,
        max_len=max_len,
        targets={key: value for key, value in targets.items() if value is not None},
        budget=budget,
        survive=survive or "",
        price=price,
        precision=precision or (),
        kv=kv or (),
        engine=engine,
        pools=pools,
        attention_dp=attention_dp,
        memory_share=memory_share,
        calibration=calibration,
        hardware=tuple(hardware or ()),
    )
    return run_plan(request, everything=everything, html=html, write=write, as_json=as_json)


def explain(
    model: Annotated[
        str, typer.Argument(help="A published model, a hub id, or a path of its config.json.", show_default=False)
    ],
    on: On,
    layout: Annotated[
        str, typer.Option(metavar="LAYOUT", help="As tp4 or tp8xpp2, attention-dp8.", rich_help_panel=_CHOICE)
    ] = "tp1",
    batch: Annotated[int, typer.Option(min=1, help="Sequences that decode at once.", rich_help_panel=_LOAD)] = 1,
    context: Annotated[
        Any, _option(units.count, "TOKENS", "That each has. [default: 2000]", _LOAD, "--context")
    ] = None,
    prompt: Annotated[Any, _option(units.count, "TOKENS", "Of a prompt. [default: 2000]", _LOAD, "--prompt")] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Of the weights. [default: the checkpoint's]", rich_help_panel=_CHOICE)
    ] = None,
    kv: Annotated[Cache, typer.Option(help="Of the KV cache.", rich_help_panel=_CHOICE)] = "bfloat16",
    engine: Profile = "shoal",
    chunk: Annotated[int, typer.Option(min=1, help="Token budget of a step.", rich_help_panel=_CHOICE)] = 2048,
    memory_share: MemoryShare = None,
    calibration: CalibrationFile = None,
    hardware: Hardware = None,
    as_json: Json = False,
) -> None:
    """Print one configuration's budget: bytes of a GPU, time of a step by part, bytes on links, and where the limit is.

    **Examples**

    - `shoal explain llama-3.1-70b --on 8xH100 --layout tp4`
    - `shoal explain llama-3.1-405b --on 2x8xH100:ndr --layout tp8xpp2 --batch 32 --context 4k`
    - `shoal explain deepseek-v3 --on 2x8xH100:ndr --layout attention-dp16 --batch 256 --json`
    """
    from shoal.cli.planning import Explained, run_explain

    run_explain(
        Explained(
            model=model,
            on=on,
            layout=layout,
            batch=batch,
            context=2000 if context is None else context,
            prompt=2000 if prompt is None else prompt,
            precision=precision,
            kv=kv,
            engine=engine,
            chunk=chunk,
            memory_share=memory_share,
            calibration=calibration,
            hardware=tuple(hardware or ()),
        ),
        as_json=as_json,
    )
