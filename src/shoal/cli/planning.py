"""`shoal plan` and `shoal explain`: from flags to a goal, and from a plan to tables, JSON, a page and a deployment."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from shoal import __version__
from shoal.cli.calibration_file import read_calibration
from shoal.cli.errors import CommandError, UsageError
from shoal.cli.terminal import error_console, format_bytes, print_json
from shoal.cli.trace_file import read_trace
from shoal.core.cost.model import CostModel
from shoal.core.cost.types import CachePrecision, EngineShape, WeightPrecision
from shoal.core.hardware import Cluster
from shoal.core.model_shape import ModelShape
from shoal.core.request_trace import TraceError
from shoal.plan import catalogue, models
from shoal.plan.candidates import Shape, refusal
from shoal.plan.deployment_file import NotServable, as_yaml, deployment
from shoal.plan.engines import Options
from shoal.plan.explain import explain
from shoal.plan.explain import sections as explained_sections
from shoal.plan.goal import Demand, Goal, GoalError, Survive, Target, demand_of, demand_of_trace
from shoal.plan.html_report import page
from shoal.plan.planner import Plan, make_plan
from shoal.plan.report import Section, sections, summary
from shoal.plan.trace import trace_of

WIDE = 160
"""Columns of output that is piped."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the flags of `shoal plan` said."""

    model: str
    on: str
    rate: float | None
    input: int | None
    output: int | None
    trace: Path | None
    longest_pause: float | None
    max_len: int | None
    targets: dict[tuple[str, str], float]
    budget: float | None
    survive: Survive
    price: float | None
    precision: tuple[WeightPrecision, ...]
    kv: tuple[CachePrecision, ...]
    engine: str
    pools: bool
    attention_dp: bool
    memory_share: float | None
    calibration: Path | None
    hardware: tuple[Path, ...]


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """What the flags of `shoal explain` said."""

    model: str
    on: str
    layout: str
    batch: int
    context: int
    prompt: int
    precision: WeightPrecision | None
    kv: CachePrecision
    engine: str
    chunk: int
    memory_share: float | None
    calibration: Path | None
    hardware: tuple[Path, ...]


def run_plan(request: Request, *, everything: bool, html: Path | None, write: Path | None, as_json: bool) -> int:
    """1 if nothing meets the goal."""
    shape, checkpoint, precision = _model(request.model)
    cluster = _cluster(request.on, request.hardware, request.price)
    try:
        goal = Goal(
            cluster=cluster,
            demand=_demand(request),
            targets=tuple(
                Target(metric=metric, percentile=percentile, seconds=seconds)  # type: ignore[arg-type]
                for (metric, percentile), seconds in request.targets.items()
            ),
            budget=request.budget,
            survive=request.survive,
        )
        made = make_plan(
            shape, goal, _options(request, precision), read_calibration(request.calibration, cluster.device)
        )
    except (GoalError, TraceError) as error:
        raise UsageError(str(error)) from None
    if write is not None:
        _write_deployment(made, cluster, write, name=shape.name, model=checkpoint)
    if html is not None:
        html.write_text(page(made, __version__), encoding="utf-8")
        error_console().print(f"wrote {html}")
    if as_json:
        print_json(made)
    else:
        _print(sections(made, all_rejections=everything))
    return 0 if made.answer is not None else 1


def run_explain(asked: Explained, *, as_json: bool) -> None:
    shape, _, precision = _model(asked.model)
    cluster = _cluster(asked.on, asked.hardware, None)
    for flag, tokens in (("--context", asked.context), ("--prompt", asked.prompt)):
        if not 1 <= tokens <= shape.max_len:
            raise UsageError(f"{flag} is {tokens:,}: {shape.name} takes 1 to {shape.max_len:,} tokens")
    split = parse_layout(asked.layout)
    _require_possible(split, shape, cluster)
    engine = EngineShape(
        model=shape,
        cluster=cluster,
        layout=split.layout,
        attention_dp=split.attention_dp,
        weights=asked.precision or precision,
        cache=asked.kv,
        profile=asked.engine,
        max_batch_tokens=asked.chunk,
        memory_share=asked.memory_share or 0.9,
    )
    cost = CostModel(engine, read_calibration(asked.calibration, cluster.device))
    found = explain(cost, batch=asked.batch, context=asked.context, prompt=asked.prompt)
    if as_json:
        print_json(found)
    else:
        _print(explained_sections(found))


def list_known(what: str, hardware: Sequence[Path], *, as_json: bool) -> None:
    """Models or devices, by name."""
    rows: list[dict[str, Any]]
    columns: tuple[str, ...]
    if what == "models":
        described = [models.describe(name) for name in models.names()]
        if as_json:
            print_json(described)
            return
        columns = ("model", "parameters", "active", "KV a token", "precision", "longest")
        rows = [
            {
                "model": one.name,
                "parameters": f"{one.parameters / 1e9:.2f} B",
                "active": f"{one.active_parameters / 1e9:.2f} B",
                "KV a token": format_bytes(one.kv_bytes_per_token),
                "precision": one.precision,
                "longest": f"{one.max_len:,}",
            }
            for one in described
        ]
    else:
        devices = list(catalogue.load(tuple(hardware)).devices.values())
        if as_json:
            print_json(devices)
            return
        columns = ("device", "memory", "bandwidth", "bfloat16", "float8", "link", "also called")
        rows = [
            {
                "device": one.name,
                "memory": format_bytes(one.memory_bytes),
                "bandwidth": f"{one.memory_bandwidth / 1e9:,.0f} GB/s",
                "bfloat16": _tera(one.rates.get("bfloat16")),
                "float8": _tera(one.rates.get("float8")),
                "link": one.scale_up,
                "also called": ", ".join(one.aliases),
            }
            for one in devices
        ]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    _console().print(table)


def _tera(rate: float | None) -> str:
    return "" if rate is None else f"{rate / 1e12:,.0f} TFLOP/s"


# --- from flags -------------------------------------------------------------------------------------------------------


def _model(name: str) -> tuple[ModelShape, str, WeightPrecision]:
    """Its shape, what `shoal serve` would load, and what that is stored in."""
    try:
        shape = models.model_shape(name)
    except models.ModelError as error:
        raise UsageError(str(error)) from None
    try:
        published = models.published_model(name)
    except models.ModelError:
        return shape, name, "bfloat16"
    if name in published.checkpoints:
        return shape, name, published.checkpoints[name]
    return shape, next(iter(published.checkpoints)), published.precision


def _cluster(text: str, hardware: Sequence[Path], price: float | None) -> Cluster:
    found = catalogue.cluster(text, tuple(hardware))
    if price is None:
        return found
    return msgspec.structs.replace(found, dollars_per_device_hour=price, price_source="as given")


def _demand(request: Request) -> Demand:
    if request.trace is not None:
        for flag, value in (("--input", request.input), ("--output", request.output)):
            if value is not None:
                raise UsageError(f"{flag} and --trace both say how long requests are; give one of them")
        rows = read_trace(request.trace, longest_pause=request.longest_pause)
        return demand_of_trace(trace_of(rows, request.trace.name), request.rate, request.max_len)
    for flag, given in (("--rate", request.rate), ("--input", request.input), ("--output", request.output)):
        if given is None:
            raise UsageError(f"{flag} is missing: give --rate, --input and --output, or --trace FILE")
    return demand_of(request.rate or 0, request.input or 0, request.output or 0, request.max_len)


def _options(request: Request, precision: WeightPrecision) -> Options:
    given = Options(
        weights=request.precision or (precision,),
        caches=request.kv or ("bfloat16",),
        profile=request.engine,
        pools=request.pools,
        attention_dp=request.attention_dp,
    )
    return given if request.memory_share is None else msgspec.structs.replace(given, memory_share=request.memory_share)


_AXES = {"tp": "tp", "pp": "pp", "ep": "ep", "cp": "cp", "attention-dp": "attention_dp", "adp": "attention_dp"}


def parse_layout(text: str) -> Shape:
    """tp8xpp2, "tp8 x pp2", attention-dp16. Raises UsageError."""
    sizes: dict[str, int] = {}
    for word in re.split(r"\s*[x,]\s*|\s+", text.strip().lower()):
        match = re.fullmatch(r"([a-z-]+?)[=-]?(\d+)", word)
        if match is None or match[1] not in _AXES or int(match[2]) < 1:
            raise UsageError(
                f"--layout {text!r}: {word!r} is no axis with a size; write tp4, tp8xpp2 (axes: {', '.join(_AXES)})"
            )
        name = _AXES[match[1]]
        if name in sizes:
            raise UsageError(f"--layout {text!r} says {match[1]} twice")
        sizes[name] = int(match[2])
    return Shape(**sizes)


def _require_possible(shape: Shape, model: ModelShape, cluster: Cluster) -> None:
    why = refusal(shape, model)
    if why is not None:
        raise UsageError(f"--layout {shape}: {why}")
    if shape.devices > cluster.num_devices:
        raise UsageError(
            f"--layout {shape} is {shape.devices} GPUs, and {cluster.name or 'the cluster'} has {cluster.num_devices}"
        )


# --- to people and files ----------------------------------------------------------------------------------------------


def _write_deployment(made: Plan, cluster: Cluster, file: Path, *, name: str, model: str) -> None:
    if made.answer is None:
        raise CommandError(f"nothing to write to {file}: {summary(made)}")
    try:
        content = deployment(made.answer.setup, cluster, name=name, model=model, max_len=made.asked.longest)
    except NotServable as error:
        raise CommandError(str(error)) from None
    comment = f"shoal plan: {summary(made)}\n{made.goal}"
    file.write_text(as_yaml(content, comment), encoding="utf-8")
    error_console().print(f"wrote {file}")


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDE)


def _print(told: Sequence[Section]) -> None:
    console = _console()
    for number, section in enumerate(told):
        if number:
            console.print()
        console.print(section.title, style="bold", markup=False)
        for line in section.lines:
            console.print(f"  {line}", markup=False)
        if section.rows:
            table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
            table.add_column("")
            for column in section.columns:
                table.add_column(column, overflow="fold")
            for row in section.rows:
                table.add_row(" ", *(_escaped(cell) for cell in row))
            console.print(table)


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
