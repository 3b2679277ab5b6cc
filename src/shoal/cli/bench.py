"""`shoal bench`: what proves a deployment. Progress on standard error, the result alone on standard output."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn

from shoal.bench.faults.catalogue import KINDS
from shoal.bench.faults.deployment import DeploymentError
from shoal.bench.faults.suite import Options, run_faults
from shoal.cli.errors import CommandError
from shoal.cli.terminal import error_console, passing_bar


def list_faults() -> None:
    width = max(len(kind.name) for kind in KINDS)
    for kind in KINDS:
        sys.stdout.write(f"{kind.name:<{width}}  {kind.about}\n")


def bench_faults(deployment: Path, options: Options, *, as_json: bool) -> int:
    """The exit status: 1 where a promise was broken."""
    console = error_console()
    with passing_bar(console, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task("faults", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        try:
            report = asyncio.run(run_faults(deployment, options, progress))
        except DeploymentError as error:
            raise CommandError(str(error)) from None
    text = msgspec.json.encode(report).decode() if as_json else report.markdown()
    sys.stdout.write(text + "\n")
    return 0 if report.ok else 1
