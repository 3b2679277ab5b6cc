"""What people see: consoles, bars while something loads, text that a model wrote."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from shoal.checkpoint.resolve import ModelFiles, resolve

_CONTROLS = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Without control characters: a model's answer must not be able to steer the terminal."""
    return text.translate(_CONTROLS)


def error_console() -> Console:
    """For everything that is not the result: results alone go to standard output, so that they can be piped."""
    return Console(stderr=True, highlight=False)


def resolve_with_progress(model: str, console: Console) -> ModelFiles:
    """`resolve`, with a bar while a built-in model is fetched. Raises what `resolve` raises."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(f"{model}", total=None, visible=False)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{what} {model}", completed=done, total=total, visible=True)

        return resolve(model, progress=report)


@contextlib.contextmanager
def start_progress(name: str, console: Console) -> Iterator[Callable[[str, float], None]]:
    """A bar while an engine starts. Gives what EngineClient.start reports to."""
    columns = (TextColumn("{task.description}"), BarColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"starting {name}", total=1.0)

        def report(what: str, fraction: float) -> None:
            bar.update(task, description=f"{name}: {what}", completed=fraction)

        yield report


def shown_path(path: Path) -> str:
    """With ~ for the home directory."""
    try:
        return f"~/{path.relative_to(Path.home())}"
    except ValueError:
        return str(path)
