"""`shoal diagnose`: fetches what engines say of themselves, and prints what the planner makes of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.plan.units import UnitError, duration

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from shoal.plan.diagnose.reading import Reading, Snapshot
    from shoal.plan.diagnose.report import Report

MAX_BYTES = 64 << 20
"""Of one exposition: more is no engine's."""
FETCH_SECONDS = 10.0
READINGS = 10
"""Of a window, between these bounds of the time from one to the next."""
SHORTEST, LONGEST = 0.5, 5.0
_STYLES = {"title": "bold", "evidence": "dim", "try": "green", "against": "yellow"}
_COLOURS = {"healthy": "green", "idle": "green", "found": "yellow", "cannot tell": "magenta"}


def _duration(text: str | None, flag: str) -> float | None:
    if text is None:
        return None
    try:
        seconds = duration(text)
    except UnitError as error:
        raise typer.BadParameter(str(error), param_hint=flag) from None
    if not seconds:
        raise typer.BadParameter(f"{text!r} is no time; write 500ms or 0.5s", param_hint=flag)
    return seconds


def diagnose(
    metrics: Annotated[
        list[str],
        typer.Option(metavar="URL|FILE", help="Of an engine, a gateway or a GPU exporter; again for each of a fleet."),
    ],
    watch: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=1.0, help="Read for so long, and judge what happened meanwhile."),
    ] = None,
    before: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="An earlier scrape of each --metrics FILE, in the same order."),
    ] = None,
    window: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0.001, help="Between --before and --metrics.")
    ] = None,
    ttft_p99: Annotated[
        str | None, typer.Option(metavar="TIME", help="Target, as 500ms. [default: compared with the median]")
    ] = None,
    itl_p99: Annotated[
        str | None, typer.Option(metavar="TIME", help="Target, as 30ms. [default: compared with the median]")
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help="The engine's limit. [default: shoal's own metric; else inferred]")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="SHOAL_API_KEY", help="That may ask for metrics.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which of the signs that call for more GPUs a live engine shows, and what to try first.

    The signs: (1) it does not fit, (2) p99 rises while compute is idle, (3) batching has hit its limit; between
    replicas, whether one is loaded or slowed more than another. Each with its evidence, the first thing to try, and
    what would disprove it. Reads the metrics of shoal, vLLM and SGLang, and of DCGM beside them.

    **Examples**

    - `shoal diagnose --metrics http://127.0.0.1:8000 --watch 30`
    - `shoal diagnose --metrics http://a:8000 --metrics http://b:8000 --metrics http://a:9400 --watch 60 --json`
    - `shoal diagnose --metrics http://127.0.0.1:8000 --watch 30 --ttft-p99 500ms --itl-p99 30ms --max-num-seqs 256`
    - `shoal diagnose --before monday.prom --metrics tuesday.prom --window 86400`
    """
    from shoal.cli.terminal import error_console, print_json
    from shoal.plan.diagnose.findings import Targets
    from shoal.plan.diagnose.report import report

    earlier = before or []
    _check(metrics, watch, earlier, window)
    limits = Targets(_duration(ttft_p99, "--ttft-p99"), _duration(itl_p99, "--itl-p99"), max_num_seqs)
    fetch = _fetcher(api_key)
    if watch is not None:
        readings, notes = _watch(metrics, watch, fetch, error_console())
    else:
        readings, notes = _read_once(metrics, earlier, window, fetch), []
    result = report(readings, limits, tuple(notes))
    if as_json:
        print_json(result)
    else:
        _print(result)


def _check(metrics: list[str], watch: float | None, before: list[str], window: float | None) -> None:
    twice = next((one for one in metrics if metrics.count(one) > 1), None)
    files = [one for one in metrics if not _is_url(one)]
    if twice is not None:
        raise typer.BadParameter(f"{twice} is named twice", param_hint="--metrics")
    if before and len(before) != len(metrics):
        raise typer.BadParameter(f"{len(before)} files for {len(metrics)} of --metrics", param_hint="--before")
    if before and len(files) != len(metrics):
        raise typer.BadParameter("is for files; a URL is read twice with --watch SECONDS", param_hint="--before")
    if watch is not None and files:
        raise typer.BadParameter(
            f"{files[0]} is a file, which does not change: give the earlier one with --before", param_hint="--watch"
        )
    if window is not None and not before:
        raise typer.BadParameter("is the time between --before and --metrics: give both", param_hint="--window")


def _is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


# --- reading ---------------------------------------------------------------------------------------------------------


def _fetcher(api_key: str | None) -> Callable[[str], Snapshot]:
    """Reads one URL or file. The function raises CommandError."""
    from pathlib import Path

    from shoal.cli.errors import CommandError
    from shoal.plan.diagnose.prometheus_text import NotAnExposition, parse
    from shoal.plan.diagnose.reading import Snapshot

    def fetch(source: str) -> Snapshot:
        began = time.monotonic()
        if _is_url(source):
            text, at = _get(source, api_key), (began + time.monotonic()) / 2
        else:
            text, at = Path(source).read_bytes().decode("utf-8", "replace"), None
        try:
            return Snapshot(parse(text), at)
        except NotAnExposition as error:
            raise CommandError(f"{source}: {error}") from None

    return fetch


def _get(url: str, api_key: str | None) -> str:
    import http.client
    import urllib.error
    import urllib.parse
    import urllib.request

    from shoal.cli.errors import CommandError

    parts = urllib.parse.urlsplit(url)
    if parts.path in ("", "/"):
        parts = parts._replace(path="/metrics")
    request = urllib.request.Request(parts.geturl())
    if api_key:
        # A redirection must not carry the key to a host that nobody named.
        request.add_unredirected_header("authorization", f"Bearer {api_key}")
    # A proxy for the outside world must not get a request that is meant for this machine.
    is_local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if is_local else []))
    try:
        with opener.open(request, timeout=FETCH_SECONDS) as response:
            body: bytes = response.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        with error:
            hint = {401: " (--api-key or SHOAL_API_KEY)", 403: " (--api-key or SHOAL_API_KEY)"}.get(error.code, "")
            hint = " (SGLang has metrics with --enable-metrics)" if error.code == 404 else hint
            raise CommandError(f"{parts.geturl()} answers with status {error.code}{hint}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise CommandError(f"nothing answers at {parts.geturl()}: {said.lower()}") from None
    if len(body) > MAX_BYTES:
        raise CommandError(f"{parts.geturl()} answers with more than {MAX_BYTES >> 20} MiB: that is no exposition")
    return body.decode("utf-8", "replace")


def _read_once(
    metrics: list[str], before: list[str], window: float | None, fetch: Callable[[str], Snapshot]
) -> dict[str, Reading]:
    from shoal.plan.diagnose.reading import read

    readings = {}
    for number, source in enumerate(metrics):
        earlier = [fetch(before[number])] if before else []
        readings[source] = read([*earlier, fetch(source)], window)
    return readings


def _watch(
    metrics: list[str], seconds: float, fetch: Callable[[str], Snapshot], console: Console
) -> tuple[dict[str, Reading], list[str]]:
    """All targets, several times. One that cannot be read at first is an error; later it is worth a note."""
    from concurrent.futures import ThreadPoolExecutor

    from rich.progress import BarColumn, TimeRemainingColumn

    from shoal.cli.errors import CommandError
    from shoal.cli.terminal import passing_bar
    from shoal.plan.diagnose.reading import read

    def attempt(source: str) -> Snapshot | None:
        try:
            return fetch(source)
        except CommandError:
            return None

    pause = min(max(seconds / READINGS, SHORTEST), LONGEST)
    with (
        ThreadPoolExecutor(min(len(metrics), 32)) as pool,
        passing_bar(console, BarColumn(), TimeRemainingColumn()) as bar,
    ):
        task = bar.add_task("watching", total=seconds)
        taken = {source: [one] for source, one in zip(metrics, pool.map(fetch, metrics), strict=True)}
        failed = dict.fromkeys(metrics, 0)
        began = time.monotonic()
        while (passed := time.monotonic() - began) < seconds:
            bar.update(task, completed=passed)
            time.sleep(min(pause, seconds - passed))
            for source, snapshot in zip(metrics, pool.map(attempt, metrics), strict=True):
                if snapshot is None:
                    failed[source] += 1
                else:
                    taken[source].append(snapshot)
    notes = [f"{source} did not answer {count} times in the window" for source, count in failed.items() if count]
    return {source: read(snapshots) for source, snapshots in taken.items()}, notes


# --- printing --------------------------------------------------------------------------------------------------------


def _print(result: Report) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    from shoal.cli.terminal import printable
    from shoal.plan.diagnose.report import headline, lines, window_text

    console = Console(highlight=False)

    def show(text: str, style: str, indent: int) -> None:
        console.print(Padding(Text(printable(text), style=style), (0, 0, 0, indent)), soft_wrap=False)

    # First: what another spread of the load would mend needs nothing that is said of an engine alone.
    for finding in result.fleet:
        for kind, text in lines(finding, ""):
            show(text, _STYLES[kind], 0 if kind == "title" else 4)
    for target in result.targets:
        show(f"{target.source} ({target.engine}): {headline(target)}", f"bold {_COLOURS[target.verdict]}", 0)
        show(f"over {window_text(target)}", "dim", 2)
        for finding in target.findings:
            for kind, text in lines(finding, target.engine):
                show(text, _STYLES[kind], 2 if kind == "title" else 4)
    for note in result.notes:
        show(f"note: {note}", "dim", 0)
    if not result.targets:
        show("cannot tell: no engine's metrics were read", "bold magenta", 0)
