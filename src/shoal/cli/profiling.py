"""`shoal profile`: runs steps of one shape under a profiler, and shows each part beside the least that it must do."""

from __future__ import annotations

import os
import statistics
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shoal import __version__
from shoal.bench.calibration.machine import machine_of, slug
from shoal.bench.calibration.points import StepPoint
from shoal.bench.calibration.step_timing import StepTiming, TimingError
from shoal.bench.profile.report import BETWEEN, WITHIN, ProfileReport, Row, prediction_of, rows_of, work_of
from shoal.bench.profile.trace import TraceError, read_profile
from shoal.checkpoint.resolve import load_spec
from shoal.cli.errors import CommandError
from shoal.cli.terminal import StartBar, error_console, print_json, resolve_with_progress
from shoal.core.config import EngineConfig, WeightPrecision
from shoal.core.cost.calibration import Calibration, decode
from shoal.core.cost.types import EngineShape
from shoal.core.hardware import Cluster, DeviceSpec, LinkSpec
from shoal.core.model_shape import ModelShape, shape_of
from shoal.core.model_spec import ModelSpec
from shoal.engine.device_timing import Question, device_name
from shoal.engine.device_timing import measure as measure_device
from shoal.engine.executor import WorkerInfo
from shoal.plan import catalogue

if TYPE_CHECKING:
    from shoal.engine.profiling import ProfiledExecutor

WARM_UP = 3
"""Steps before those that count: they build what is made on first use."""
MEASURE_SECONDS = 0.1
"""Of each of a handful of measurements of the device."""
WIDE = 140
"""Columns of output that is piped."""
LONGEST = 12
"""Kernels that are named below the table, on a device."""
FILL_TOKENS = 2048
"""Of a step that only fills the cache, unless the profiled one has more."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What the flags said."""

    model: str
    phase: Literal["prefill", "decode", "mixed"]
    batch: int
    tokens: int
    steps: int
    dtype: WeightPrecision
    device: str
    threads: int | None
    ops: Literal["auto", "native", "torch"]
    random_weights: bool
    measure: bool

    def point(self) -> StepPoint:
        """Raises CommandError."""
        if self.phase == "decode":
            return StepPoint(decodes=self.batch, context=self.tokens)
        if self.phase == "prefill":
            return StepPoint(chunk=self.tokens, prompts=self.batch)
        if self.batch < 2:
            raise CommandError("--batch is 1: a mixed step is of at least 2, a prompt and one that decodes")
        return StepPoint(decodes=self.batch - 1, context=self.tokens, chunk=self.tokens)


def run_profile(wanted: Wanted, trace: Path | None, calibration: Path | None, *, as_json: bool) -> int:
    """Raises CommandError, and what resolving a model and starting an engine raise."""
    if trace is not None and not trace.parent.is_dir():  # before minutes of loading, not after
        raise CommandError(f"{trace}: there is no directory {trace.parent}")
    point, known = wanted.point(), _calibration(calibration)
    console = error_console()
    files = resolve_with_progress(wanted.model, console, weights=not wanted.random_weights)
    spec = load_spec(files.path)
    config = engine_config(wanted, str(files.path), spec, point)
    # Before the engine starts: its threads would wait for the cores that these kernels are timed on.
    measured = _measured(wanted) if wanted.measure else None
    from shoal.engine.profiling import ProfiledExecutor  # brings torch, which no refusal above needs

    executor = ProfiledExecutor(config)
    try:
        with StartBar(files.name, console) as bar:
            info = executor.start(bar.report)
        with tempfile.TemporaryDirectory() as folder:
            path = trace or Path(folder) / "trace.json"
            plain = _run(executor, config, info, point, wanted.steps, path)
            report = _report(wanted, files.name, config, info, point, measured, known, plain, path)
    except (TimingError, TraceError) as error:
        raise CommandError(str(error)) from None
    finally:
        executor.stop()
    if trace is not None:
        report = msgspec.structs.replace(report, trace=str(trace))
    if as_json:
        print_json(report)
    else:
        console = Console(highlight=False)
        _print(console if console.is_terminal else Console(highlight=False, width=WIDE), report)
    return 0


def _calibration(path: Path | None) -> Calibration | None:
    if path is None:
        return None
    try:
        return decode(path.read_bytes())
    except ValueError as error:
        raise CommandError(f"{path}: {error}") from None


def engine_config(wanted: Wanted, path: str, spec: ModelSpec, point: StepPoint) -> EngineConfig:
    """An engine that is large enough for the step, and no larger. Raises CommandError."""
    block, needs = EngineConfig(model=path).block_size, point.needs()
    longest = max(needs) + 1
    if longest > spec.max_len:
        raise CommandError(f"--input is {wanted.tokens}, and the model was made for {spec.max_len} tokens: lower it")
    blocks = sum(-(-(need + 1) // block) for need in needs) + 1
    bytes_each = 4 if wanted.dtype == "float32" else 2
    return EngineConfig(
        model=path,
        dtype=wanted.dtype,
        load_format="random" if wanted.random_weights else "auto",
        device=wanted.device,
        threads=wanted.threads,
        ops=wanted.ops,
        max_len=min(spec.max_len, -(-longest // block) * block),
        # A little more than the blocks take: some caches keep scales beside them.
        kv_cache_bytes=int(1.05 * blocks * block * spec.kv_bytes_per_token(bytes_each)),
        max_sequences=len(needs),
        max_batch_tokens=max(FILL_TOKENS, point.shape().tokens),
        prefix_caching=False,
    )


def _run(
    executor: ProfiledExecutor, config: EngineConfig, info: WorkerInfo, point: StepPoint, steps: int, path: Path
) -> tuple[float, float, float]:
    """Fill the cache, time plain steps, then trace as many. Median, least and most of the plain ones, in seconds."""
    timing = StepTiming(
        executor,
        [point],
        block_tokens=config.block_tokens,
        vocab_size=info.spec.vocab_size,
        max_batch_tokens=config.max_batch_tokens,
    )
    timing.fill(lambda share: None)
    for _ in range(WARM_UP):
        timing.step(point)
    plain = [timing.step(point) for _ in range(steps)]
    with executor.traced(path):
        for _ in range(steps):
            timing.step(point)
    return statistics.median(plain), min(plain), max(plain)


# --- limits -----------------------------------------------------------------------------------------------------------


def _measured(wanted: Wanted) -> DeviceSpec:
    name, cores = _torch_device(wanted.device), _num_cores()
    threads = cores if wanted.threads is None else wanted.threads
    try:
        figures = measure_device(
            Question(device=name, threads=threads, dtypes=(wanted.dtype,), seconds=MEASURE_SECONDS)
        )
    except RuntimeError as error:
        raise CommandError(str(error)) from None
    date = datetime.now(UTC).date().isoformat()
    return machine_of(figures, threads, date, is_cpu=name == "cpu").device


def _torch_device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def _known_device(name: str, calibration: Calibration | None) -> DeviceSpec | None:
    """As the catalogue has it: by its own name, by that of `shoal calibrate`, by the calibration's."""
    known = catalogue.load()
    for candidate in (name, f"{slug(name)}-{_num_cores()}c", "" if calibration is None else calibration.device):
        if candidate and known.has_device(candidate):
            return known.device(candidate)
    return None


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_UNKNOWN = DeviceSpec(name="unknown", vendor="cpu", memory_bytes=1, memory_bandwidth=1.0, rates={"float32": 1.0})
"""In the place of a device without known limits: work does not depend on it."""


def _engine(wanted: Wanted, config: EngineConfig, shape: ModelShape, device: DeviceSpec) -> EngineShape:
    link = LinkSpec(name="none", kind="memory", bandwidth=1.0, latency=0.0)
    return EngineShape(
        model=shape,
        cluster=Cluster(device=device, devices_per_node=1, num_nodes=1, scale_up=link, network=None),
        weights=wanted.dtype,
        cache="float32" if wanted.dtype == "float32" else "bfloat16",
        block_size=config.block_size,
        max_batch_tokens=config.max_batch_tokens,
        max_sequences=config.max_sequences,
    )


def _report(
    wanted: Wanted,
    name: str,
    config: EngineConfig,
    info: WorkerInfo,
    point: StepPoint,
    measured: DeviceSpec | None,
    calibration: Calibration | None,
    plain: tuple[float, float, float],
    trace: Path,
) -> ProfileReport:
    called = device_name(info.device)
    device = measured or _known_device(called, calibration)
    engine = _engine(wanted, config, shape_of(info.spec, name), device or _UNKNOWN)
    on_cpu = info.device == "cpu"
    work = work_of(engine, point.shape(), 4.0 if on_cpu or wanted.dtype == "float32" else 2.0)
    profile = read_profile(trace)
    limits = "not known: the catalogue does not have this device; see --measure, or `shoal calibrate --hardware`"
    if device is not None:
        rates = ", ".join(f"{dtype} {rate / 1e12:,.3g} TFLOP/s" for dtype, rate in device.rates.items())
        limits = f"{device.name}: {device.memory_bandwidth / 1e9:,.4g} GB/s, {rates} ({device.provenance})"
    return ProfileReport(
        model=name,
        step=str(point),
        device=called,
        made={
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "versions": f"shoal {__version__}, torch {version('torch')}",
            "engine": f"{info.dtype} weights, {info.ops} arithmetic, {info.attention} attention",
            "weights": "random" if wanted.random_weights else "of the checkpoint",
        },
        limits=limits,
        profile=profile,
        plain=plain,
        rows=rows_of(profile, work, has_limits=device is not None),
        limit_seconds=None if device is None else sum(part.limit_seconds for part in work.values()),
        prediction=None if device is None else prediction_of(engine, point.shape(), calibration),
    )


# --- for people -------------------------------------------------------------------------------------------------------


def _print(console: Console, report: ProfileReport) -> None:
    console.print(f"[bold]{report.model}[/bold]: {report.step}, on {report.device}")
    console.print("; ".join(report.made.values()), style="dim")
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = ("part", "ms a step", "share", "calls", "MB", "GFLOP", "GB/s", "GFLOP/s", "bound by", "of the limit")
    for title in titles:
        table.add_column(title, justify="left" if title in ("part", "bound by") else "right")
    for row in report.rows:
        table.add_row(*_cells(row))
    console.print(table)
    _print_kernels(console, report)
    median, low, high = report.plain
    line = f"a step: {median * 1e3:.2f} ms ({low * 1e3:.2f}-{high * 1e3:.2f}), "
    line += f"{report.profile.step_seconds * 1e3:.2f} ms while it is traced"
    if report.of_limit is not None and report.limit_seconds is not None:
        line += f"; its parts' limits add up to {report.limit_seconds * 1e3:.2f} ms: {report.of_limit:.0%}"
    console.print(line)
    if report.prediction is not None:
        found = report.prediction
        console.print(
            f"the cost model says {found.seconds * 1e3:.2f} ms ({found.low * 1e3:.2f}-{found.high * 1e3:.2f}), "
            f"{found.provenance}"
        )
    console.print(f"limits: {report.limits}", style="dim")
    if report.trace:
        console.print(f"written: {report.trace}", style="dim")


def _print_kernels(console: Console, report: ProfileReport) -> None:
    """Those that took longest, where parts are made of kernels."""
    if not report.profile.on_device:
        return
    kernels = [(kernel, row.part) for row in report.rows for kernel in row.kernels]
    kernels.sort(key=lambda pair: -pair[0].seconds)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("kernel", "part", "ms a step", "calls"):
        table.add_column(title, justify="left" if title in ("kernel", "part") else "right", overflow="ellipsis")
    for kernel, part in kernels[:LONGEST]:
        table.add_row(escape(kernel.name), part, f"{kernel.seconds * 1e3:.3f}", f"{kernel.calls:,.0f}")
    console.print(table)


def _cells(row: Row) -> list[str]:
    cells = [row.part, f"{row.seconds * 1e3:.3f}", f"{row.share:.1%}"]
    if row.part in (WITHIN, BETWEEN):
        return cells
    cells.append(f"{row.calls:,.0f}")
    if row.bytes is None or row.operations is None:
        return cells
    seconds = max(row.seconds, 1e-12)
    cells += [f"{row.bytes / 1e6:,.1f}", f"{row.operations / 1e9:,.2f}"]
    cells += [f"{row.bytes / seconds / 1e9:,.1f}", f"{row.operations / seconds / 1e9:,.1f}"]
    return cells if row.of_limit is None else [*cells, row.bound, f"{row.of_limit:.0%}"]
