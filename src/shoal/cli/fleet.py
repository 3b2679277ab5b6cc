"""What `shoal fleet status`, `drain`, `add` and `remove` do."""

from __future__ import annotations

import sys
import time

import msgspec
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from shoal.cli.errors import CommandError
from shoal.cli.fleet_table import fleet_console, fleet_table
from shoal.cli.gateway_client import GatewayClient, GatewayUnreachable
from shoal.cli.terminal import error_console, print_json, printable
from shoal.core.fleet_types import EndpointStatus, FleetStatus

WATCH_SECONDS = 1.0
DRAIN_SECONDS = 0.5


def print_status(gateway: GatewayClient, *, as_json: bool, watch: bool) -> None:
    status = gateway.status()  # outside of the loop: where there is no gateway, that is all there is to say
    if watch:
        _watch(gateway, status, as_json=as_json)
    elif as_json:
        print_json(status)
    else:
        fleet_console().print(fleet_table(status))


def _watch(gateway: GatewayClient, status: FleetStatus, *, as_json: bool) -> None:
    """Until Ctrl-C, which is how it is meant to end; also through times when the gateway does not answer."""
    console = fleet_console()
    live = None if as_json or not console.is_terminal else Live(console=console, screen=False, auto_refresh=False)
    problem: str | None = None
    try:
        if live is not None:
            live.start()
        while True:
            if live is not None:
                live.update(_with_problem(status, problem), refresh=True)
            elif problem is not None:
                error_console().print(problem, markup=False)
            elif as_json:
                sys.stdout.write(msgspec.json.encode(status).decode() + "\n")
                sys.stdout.flush()
            else:
                console.print(fleet_table(status))
            time.sleep(WATCH_SECONDS)
            try:
                status, problem = gateway.status(), None
            except GatewayUnreachable as error:
                problem = str(error)
    except KeyboardInterrupt:
        return
    finally:
        if live is not None:
            live.stop()


def _with_problem(status: FleetStatus, problem: str | None) -> RenderableType:
    if problem is None:
        return fleet_table(status)
    return Group(Text(f"{problem}; below is what it said last", style="red"), fleet_table(status))


def drain_endpoint(gateway: GatewayClient, name: str, *, wait: bool) -> None:
    gateway.endpoint(name)
    gateway.drain(name)
    if not wait:
        print(f"{printable(name)} gets no new requests; `shoal fleet status` says when it is empty")
        return
    console = error_console()
    try:
        with console.status("") as line:
            while (endpoint := _find(gateway.status(), name)) is not None and not _is_drained(endpoint):
                left = f"{endpoint.requests:,} requests, {endpoint.tokens:,} tokens left"
                line.update(f"draining {escape(printable(name))}: {left}")
                time.sleep(DRAIN_SECONDS)
    except KeyboardInterrupt:
        console.print(f"{printable(name)} goes on draining", markup=False)
        raise
    print(f"{printable(name)} is drained")


def _is_drained(endpoint: EndpointStatus) -> bool:
    """Raises CommandError where it gets requests again: waiting would never end."""
    if endpoint.state == "ready":
        raise CommandError(f"{endpoint.name} is ready again: somebody ended its draining")
    return endpoint.state == "down" or endpoint.requests == 0


def _find(status: FleetStatus, name: str) -> EndpointStatus | None:
    return next((e for model in status.models for e in model.endpoints if e.name == name), None)


def add_endpoints(gateway: GatewayClient, model: str, openai: str | None, replicas: int | None) -> None:
    """Raises CommandError."""
    if openai is not None and replicas is not None:
        raise CommandError("--openai and --replicas exclude each other: an endpoint runs elsewhere, or is started here")
    gateway.check_model(model)
    before = {endpoint.name for endpoint in _endpoints_of(gateway.status(), model)}
    gateway.add({"model": model} | ({"replicas": replicas or 1} if openai is None else {"openai": openai}))
    added = [endpoint for endpoint in _endpoints_of(gateway.status(), model) if endpoint.name not in before]
    for endpoint in added:
        print(f"{printable(endpoint.name)} was added to {printable(model)} and is {endpoint.state}")
    if not added:
        print(f"the gateway adds to {printable(model)}; `shoal fleet status --watch` shows how far it is")


def _endpoints_of(status: FleetStatus, model: str) -> list[EndpointStatus]:
    return [endpoint for found in status.models if found.name == model for endpoint in found.endpoints]


def remove_endpoint(gateway: GatewayClient, name: str) -> None:
    endpoint = gateway.endpoint(name)
    gateway.remove(name)
    moved = f"; its {endpoint.requests:,} requests go on elsewhere" if endpoint.requests else ""
    print(f"{printable(name)} was removed{moved}")
