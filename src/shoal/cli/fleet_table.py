"""A fleet's status as people read it on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from shoal.cli.terminal import printable
from shoal.core.fleet_types import EndpointState, EndpointStatus, FleetStatus, ModelStatus, Percentiles

_STATES: dict[EndpointState, str] = {
    "starting": "blue",
    "ready": "green",
    "suspect": "yellow",
    "fenced": "magenta",
    "draining": "cyan",
    "down": "red",
}
_COLUMNS = ("endpoint", "state", "layout", "reqs", "KV", "queue", "prefill", "token", "step", "restarts")
_LEFT = frozenset({"endpoint", "state", "layout"})
_FOLDED = frozenset({"endpoint", "layout"})
"""Where 80 columns are too few; numbers and states stay whole."""
_UNKNOWN = "–"
MAX_EVENTS = 5
PIPED_WIDTH = 160
"""Columns where standard output is no terminal: a table that is folded is of no use to grep."""


def fleet_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPED_WIDTH)


def fleet_table(status: FleetStatus) -> RenderableType:
    parts: list[RenderableType] = []
    if status.draining:
        parts.append("[yellow]this gateway is draining: it ends once its requests have[/]\n")
    if not status.models:
        parts.append("no model is configured: name one in the deployment file\n")
    for model in status.models:
        parts += [_headline(model), _indented(_numbers(model)), _indented(_endpoints(model)), ""]
    for event in status.events[-MAX_EVENTS:]:
        time = datetime.fromtimestamp(event.time).strftime("%H:%M:%S")
        parts.append(Text(f"{time}  {_clean(event.kind).replace('_', ' ')}: {_clean(event.message)}", style="dim"))
    facts = f"gateway {status.version}, up {_duration(status.uptime)}, audit {status.audit}, journal {status.journal}"
    parts.append(Text(_clean(facts), style="dim" if status.audit in ("off", "ok") else "red"))
    return Group(*parts)


def _indented(part: RenderableType) -> RenderableType:
    return Padding(part, (0, 0, 0, 2))


def _headline(model: ModelStatus) -> RenderableType:
    spare = model.n_plus_one
    colour = "dim" if not spare.known else "green" if spare.ok else "yellow"
    line = Text(_clean(model.name), style="bold").append(f"  {_clean(model.policy)}", style="not bold")
    line.append(f"  N+1 {spare.label}", style=f"not bold {colour}")
    if model.served_by:
        line.append(f"  served by {_clean(model.served_by)}", style="not bold yellow")
    return line


def _numbers(model: ModelStatus) -> RenderableType:
    queue = f"{model.waiting:,} queued ({model.waiting_tokens:,} tokens)" if model.waiting else "none queued"
    facts = [f"{model.running:,} running, {queue}", f"{model.tokens_per_second:,.0f} tokens/s"]
    facts += [f"TTFT {_percentiles(model.ttft)}", f"ITL {_percentiles(model.itl)}"]
    counters = [("migrated", model.migrations), ("retried", model.retries), ("degraded", model.degradations)]
    counters += [("refused", model.refused), ("failed", model.failed)]
    facts.append(", ".join(f"{count:,} {what}" for what, count in counters if count))
    return Text(" · ".join(filter(None, facts)))


def _endpoints(model: ModelStatus) -> RenderableType:
    if not model.endpoints:
        return Text("no endpoint: its requests wait (shoal fleet add)", style="yellow")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for name in _COLUMNS:
        side: Literal["left", "right"] = "left" if name in _LEFT else "right"
        table.add_column(name, justify=side, no_wrap=name not in _FOLDED, overflow="fold")
    for endpoint in model.endpoints:
        table.add_row(*_row(endpoint))
    return Group(table, *(line for endpoint in model.endpoints for line in _trouble(endpoint)))


def _row(endpoint: EndpointStatus) -> list[Text]:
    name = Text(_clean(endpoint.name), style="bold")
    if endpoint.spare:
        name.append(" spare", style="not bold dim")
    layout = endpoint.layout or endpoint.address.removeprefix("http://")
    speed = endpoint.prefill_speed
    return [
        name,
        Text(endpoint.state, style=_STATES[endpoint.state]),
        Text(_clean(layout)),
        Text(f"{endpoint.requests:,}"),
        Text(_UNKNOWN if endpoint.kv_usage is None else f"{endpoint.kv_usage:.0%}"),
        Text(_UNKNOWN if endpoint.num_waiting is None else f"{endpoint.num_waiting:,}"),
        Text(_UNKNOWN if speed is None else f"{speed:,.0f}/s"),
        Text(_duration(endpoint.decode_seconds)),
        Text(_duration(endpoint.step_age)),
        Text(f"{endpoint.restarts:,}"),
    ]


def _trouble(endpoint: EndpointStatus) -> Iterator[Text]:
    """Why an endpoint is not what it should be, below the table, where there is room for words."""
    why = [_clean(endpoint.reason)] if endpoint.reason else []
    if endpoint.breaker != "closed":
        why.append(f"breaker {endpoint.breaker.replace('_', ' ')}")
    if why:
        yield Text(f"{_clean(endpoint.name)}: ", style=_STATES[endpoint.state]).append("; ".join(why), style="dim")


def _percentiles(of: Percentiles) -> str:
    if not of.count:
        return _UNKNOWN
    return f"{_duration(of.p50)} (p90 {_duration(of.p90)}, p99 {_duration(of.p99)})"


def _duration(seconds: float | None) -> str:
    """0.4 ms, 84 ms, 1.24 s, 12.3 s, 3 min 4 s, 26 h 3 min."""
    if seconds is None:
        return _UNKNOWN
    if seconds < 0.9995:
        return f"{seconds * 1000:.1f} ms" if seconds < 0.0095 else f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _clean(text: str) -> str:
    """One line without control characters: an endpoint's words must not be able to steer the terminal."""
    return " ".join(printable(text).split())
