"""`shoal serve --load-report`: where the time from the command to its first token went, as a table or as JSON."""

from __future__ import annotations

import json
import threading
import urllib.request
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Column, Table

from shoal.cli.terminal import format_bytes
from shoal.core.start_report import Phase, StartReport
from shoal.engine.child import process_age

_REQUEST_SECONDS = 600.0
"""Bounds a hang."""


class LoadReport:
    """Made when the command's imports are done. `show` and `file` None make it do nothing."""

    def __init__(self, show: Console | None, file: Path | None, errors: Console) -> None:
        self._show = show
        self._file = file
        self._errors = errors
        self._at = 0.0
        self._phases: list[Phase] = []
        self.end("import")
        if file is not None:
            file.write_text("")  # a path that cannot be written is the user's to know before the model loads

    def end(self, name: str) -> None:
        """What the command did since the last phase."""
        now = process_age()
        self._phases.append(Phase("command", name, now - self._at))
        self._at = now

    def ready(self, engine: StartReport, url: str, api_key: str | None) -> None:
        """The server answers: ask it for one token, and report when that has come. Returns at once."""
        if self._show is None and self._file is None:
            return
        now = process_age()
        # The engine's start is inside of it; the rest is the front's own: its tokenizer and its listener.
        listen = Phase("command", "listen", now - self._at - engine.total_seconds)
        self._at = now
        report = engine.inside(self._phases, [listen], now)
        threading.Thread(target=self._finish, args=(report, url, api_key), name="load-report", daemon=True).start()

    def _finish(self, report: StartReport, url: str, api_key: str | None) -> None:
        try:
            _one_token(url, api_key)
            self.end("first token")
            report = report.inside([], self._phases[-1:], self._at)
            if self._file is not None:
                self._file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        except (OSError, ValueError) as error:
            self._errors.print(f"[yellow]load report:[/] {error}", soft_wrap=True)
        if self._show is not None:
            for table in tables(report):
                self._show.print(table)
            self._show.file.flush()


def _one_token(url: str, api_key: str | None) -> None:
    """Raises OSError or ValueError."""
    body = json.dumps({"prompt": "a", "max_tokens": 1, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    request = urllib.request.Request(f"{url}/v1/completions", body, headers)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=_REQUEST_SECONDS) as answer:
        answer.read()


def tables(report: StartReport) -> list[Table]:
    """Phases in order, then what each rank read."""
    phases = Table("where", "phase", _number("seconds"), title="From start to first token", title_justify="left")
    for phase in report.phases:
        phases.add_row(phase.where, phase.name, f"{phase.seconds:.2f}")
    phases.add_row("", "other", f"{report.other_seconds:.2f}", end_section=True)
    phases.add_row("", "total", f"{report.total_seconds:.2f}", style="bold")
    columns = [_number(title) for title in ("read", "GB/s", "waited s", "converted s")]
    ranks = Table("rank", *columns, title="Weights", title_justify="left")
    for rank in report.ranks:
        ranks.add_row(
            str(rank.rank),
            format_bytes(rank.bytes_read),
            f"{rank.gigabytes_per_second:.2f}",
            f"{rank.read_seconds:.2f}",
            f"{rank.convert_seconds:.2f}",
        )
    return [phases, ranks]


def _number(title: str) -> Column:
    return Column(title, justify="right")
