"""`shoal calibrate`: times this machine's devices and the real engine on them, and writes what a cost model needs."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn
from rich.table import Table

from shoal import __version__
from shoal.bench.calibration.fit import constants, quantile
from shoal.bench.calibration.machine import catalogue_yaml, machine_of
from shoal.bench.calibration.session import Outcome, StoppableExecutor, Subject, calibrate, subject_config
from shoal.bench.calibration.step_timing import QUIET_CORES, TimingError
from shoal.checkpoint.resolve import load_spec
from shoal.cli.errors import CommandError
from shoal.cli.terminal import error_console, passing_bar, print_json, resolve_with_progress
from shoal.core.config import EngineConfig, WeightPrecision
from shoal.core.cost.calibration import encode
from shoal.core.hardware import DeviceSpec, LinkSpec
from shoal.core.layout import Layout, refusal
from shoal.core.model_shape import shape_of
from shoal.engine.device_timing import DeviceFigures, Question, measure
from shoal.engine.executor import WorkerInfo, open_executor

_DEVICE_SHARE = 0.08
"""Of a calibration's time, about, that devices alone take."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What --json prints."""

    model: str
    dtype: str
    device: DeviceSpec
    link: LinkSpec
    outcome: Outcome
    files: list[str]


def run_calibrate(
    model: str,
    dtype: WeightPrecision,
    device: str,
    ranks: tuple[int, ...],
    output: Path,
    hardware: Path | None,
    *,
    quick: bool,
    rounds: int | None,
    command: str,
    as_json: bool,
) -> int:
    """Raises CommandError, and what resolving a model and starting an engine raise."""
    if not output.parent.is_dir():  # before minutes of measuring, not after
        raise CommandError(f"{output}: there is no directory {output.parent}")
    if hardware is not None:  # the user's catalogue need not exist yet
        hardware.parent.mkdir(parents=True, exist_ok=True)
    console = error_console()
    files = resolve_with_progress(model, console)
    bar = passing_bar(console, BarColumn(), TimeElapsedColumn())
    bar.live.refresh_per_second = 1  # what draws it takes time from what is measured
    with bar:
        reported = _Reported(bar)
        reported("devices", 0.0)
        subject = make_subject(files.path, files.name, dtype, device, ranks)
        made = provenance_of(subject, command)
        try:
            outcome = calibrate(
                subject,
                open_engine,
                made,
                lambda what, share: reported(what, _DEVICE_SHARE + (1 - _DEVICE_SHARE) * share),
                rounds=rounds or (3 if quick else 5),
                checks=3 if quick else 6,
                seconds=60.0 if quick else 240.0,
                quick=quick,
            )
        except TimingError as error:
            raise CommandError(str(error)) from None
    output.write_bytes(encode(outcome.calibration) + b"\n")
    written = [str(output)]
    if hardware is not None:
        text = catalogue_yaml(subject.machine, subject.ranks, outcome.calibration.fractions)
        hardware.write_text(text, encoding="utf-8")
        written.append(str(hardware))
    if as_json:
        machine = subject.machine
        print_json(
            Report(
                model=files.name, dtype=dtype, device=machine.device, link=machine.link, outcome=outcome, files=written
            )
        )
    else:
        _print(Console(highlight=False), subject, outcome, written)
    return 0


class _Reported:
    """To a progress bar."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=1.0)

    def __call__(self, what: str, share: float) -> None:
        self._bar.update(self._task, description=what, completed=share)


def open_engine(config: EngineConfig) -> tuple[StoppableExecutor, WorkerInfo]:
    executor = open_executor(config)
    try:
        return executor, executor.start()
    except BaseException:
        executor.stop()
        raise


def make_subject(path: Path, name: str, dtype: WeightPrecision, device: str, ranks: tuple[int, ...]) -> Subject:
    """Times the devices. An empty `ranks` is one, and two where there are cores or devices for two."""
    spec = load_spec(path)
    shape = shape_of(spec, name)
    kind, count = _device(device)
    if kind != "cpu" and not count:
        raise CommandError(f"--device: {device} is not on this machine; give auto, cpu, cuda or cuda:N")
    cores = _num_cores()
    parts = cores if kind == "cpu" else count
    chosen = ranks or tuple(tp for tp in (1, 2) if tp <= parts and refusal(Layout(tp=tp), spec) is None)
    for tp in chosen:
        if tp > parts:
            raise CommandError(f"--tensor-parallel-size: {tp} ranks need as many cores or devices; here are {parts}")
        if (reason := refusal(Layout(tp=tp), spec)) is not None:
            raise CommandError(f"--tensor-parallel-size: {reason}")
    question = Question(
        device=kind if device == "auto" else device,
        threads=cores,
        dtypes=(dtype,),
        ranks=tuple(tp for tp in chosen if tp > 1),
    )
    try:
        figures: DeviceFigures = measure(question)
    except RuntimeError as error:
        raise CommandError(str(error)) from None
    machine = machine_of(figures, cores, datetime.now(UTC).date().isoformat(), is_cpu=kind == "cpu")
    return Subject(
        shape=shape,
        config=subject_config(str(path), dtype, kind if device == "auto" else device, shape),
        machine=machine,
        cores=cores,
        vocab_size=spec.vocab_size,
        ranks=chosen,
    )


def _device(name: str) -> tuple[str, int]:
    """cpu or what torch calls the accelerator, and how many there are."""
    if name == "cpu":
        return "cpu", 1
    import torch

    accelerators = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if name == "auto":
        return ("cuda", accelerators) if accelerators else ("cpu", 1)
    return name.partition(":")[0], accelerators


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def provenance_of(subject: Subject, command: str) -> dict[str, str]:
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "machine": subject.machine.description,
        "system": f"{platform.system()} {platform.release()}",
        "versions": f"shoal {__version__}, Python {platform.python_version()}, torch {version('torch')}",
        "model": f"{subject.shape.name}, {subject.config.dtype}",
    }


# --- for people -------------------------------------------------------------------------------------------------------


def _print(console: Console, subject: Subject, outcome: Outcome, written: list[str]) -> None:
    device, machine = subject.machine.device, subject.machine
    console.print(f"[bold]{machine.description}[/bold]  ({device.name})")
    rates = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in device.rates.items())
    console.print(f"memory {device.memory_bandwidth / 1e9:.1f} GB/s, {rates}")
    for ranks, points in machine.link.all_reduce.items():
        sizes = ", ".join(f"{size / 1024:g} KiB {seconds * 1e6:,.0f} µs" for size, seconds in points)
        console.print(f"all-reduce of {ranks} ranks: {sizes}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("fitted", "value", "which is"):
        table.add_column(title, justify="right" if title == "value" else "left", overflow="fold")
    for constant in constants(subject.config.dtype):
        if (value := outcome.fitted.get(constant.name)) is not None:
            shown = f"{value * 1e6:,.0f} µs" if constant.name.endswith("_seconds") else f"{value:.2f}"
            table.add_row(constant.name, shown, constant.meaning)
    console.print(table)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("not fitted to", "tp", "measured ms", "predicted ms", "error"):
        table.add_column(title, justify="left" if title == "not fitted to" else "right")
    for one in outcome.checked:
        measured, predicted = one.step.seconds * 1e3, one.predicted * 1e3
        table.add_row(str(one.step.point), str(one.step.tp), f"{measured:.1f}", f"{predicted:.1f}", f"{one.error:+.1%}")
    console.print(table)
    console.print(_verdict(outcome))
    console.print("written: " + ", ".join(written), style="dim")


def _verdict(outcome: Outcome) -> str:
    errors = sorted(abs(one.error) for one in outcome.checked) or [0.0]
    fit_errors = sorted(abs(error) for error in outcome.fit_errors)
    text = f"error of step times: median {quantile(errors, 0.5):.1%}, p90 {quantile(errors, 0.9):.1%} of "
    text += f"{len(outcome.checked)} that were not fitted to; {quantile(fit_errors, 0.5):.1%}, "
    text += f"{quantile(fit_errors, 0.9):.1%} of {len(fit_errors)} that were"
    if outcome.disturbed > 0.3 or outcome.foreign_cores > QUIET_CORES:
        text += f"\n[yellow]something else ran beside {outcome.disturbed:.0%} of the timings: calibrate again when the "
        text += "machine is quiet[/yellow]"
    return text
