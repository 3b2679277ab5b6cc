"""What people see: consoles, bars while something loads, text that a model wrote."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from shoal.checkpoint.resolve import ModelFiles, resolve
from shoal.core.start_report import StartProgress

_CONTROLS = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Without control characters: a model's answer must not be able to steer the terminal."""
    return text.translate(_CONTROLS)


def error_console() -> Console:
    """For everything that is not the result: results alone go to standard output, so that they can be piped."""
    return Console(stderr=True, highlight=False)


def resolve_with_progress(model: str, console: Console, *, weights: bool = True) -> ModelFiles:
    """`resolve`, with a bar while a built-in model is fetched. Raises what `resolve` raises."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with passing_bar(console, *columns) as bar:
        task = bar.add_task(model, total=None, visible=False)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{what} {model}", completed=done, total=total, visible=True)

        return resolve(model, weights=weights, progress=report)


def passing_bar(console: Console, *columns: ProgressColumn) -> Progress:
    """A bar that leaves no trace, and nothing at all where there is no terminal."""
    shown = (TextColumn("{task.description}"), *columns)
    return Progress(*shown, console=console, transient=True, disable=not console.is_terminal)


class StartBar:
    """A bar while an engine starts, gone when it has started. `report` is what EngineClient.start reports to."""

    def __init__(self, name: str, console: Console) -> None:
        self._name = name
        self._progress = passing_bar(console, BarColumn(), TextColumn("{task.fields[detail]}"))
        self._task = self._progress.add_task(f"starting {name}", total=1.0, detail="")
        self._reading_from: tuple[float, int] | None = None
        """When bytes of weights were first heard of, and how many had been read by then."""

    def __enter__(self) -> StartBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def report(self, progress: StartProgress) -> None:
        description, detail = f"{self._name}: {progress.what}", self._detail(progress, time.monotonic())
        self._progress.update(self._task, description=description, completed=progress.fraction, detail=detail)

    def _detail(self, progress: StartProgress, now: float) -> str:
        """1.2 GiB of 4.0 GiB, 2.31 GB/s."""
        if not progress.bytes_total:
            return ""
        began, before = self._reading_from = self._reading_from or (now, progress.bytes_read)
        text = f"{format_bytes(progress.bytes_read)} of {format_bytes(progress.bytes_total)}"
        return f"{text}, {(progress.bytes_read - before) / (now - began) / 1e9:.2f} GB/s" if now > began else text

    def close(self) -> None:
        """May be called more than once."""
        self._progress.stop()


def format_bytes(count: int) -> str:
    """For people: 512 B, 1.5 MiB, 2.0 GiB."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"


def print_json(value: Any) -> None:
    """Indented, on standard output."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def shown_path(path: Path) -> str:
    """With ~ for the home directory."""
    try:
        return f"~/{path.relative_to(Path.home())}"
    except ValueError:
        return str(path)
