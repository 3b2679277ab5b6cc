"""What the commands of `shoal fleet` do."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import nullcontext
from typing import TypeVar

import msgspec
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from shoal.cli.fleet_table import fleet_console, fleet_table
from shoal.cli.gateway_client import GatewayClient, GatewayUnreachable
from shoal.cli.terminal import error_console, print_json, printable
from shoal.core.fleet_types import EndpointStatus, FleetStatus

T = TypeVar("T")

WATCH_SECONDS = 1.0
FOLLOW_SECONDS = 0.5


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


def drain_endpoint(gateway: GatewayClient, name: str, *, until_empty: bool) -> None:
    gateway.endpoint(name)
    asked = _begin(lambda: gateway.drain(name))

    def still(status: FleetStatus) -> str | None:
        endpoint = _find(status, name)
        if endpoint is not None and endpoint.state == "draining" and not until_empty:
            return None
        return f"draining {_left(endpoint)}"

    if _follow(gateway, asked, still, f"{name} goes on draining"):
        print(f"{printable(name)} is drained")
    else:
        print(f"{printable(name)} gets no new requests; `shoal fleet status` says when it has none left")


def restart_endpoint(gateway: GatewayClient, name: str) -> None:
    gateway.endpoint(name)
    asked = _begin(lambda: gateway.restart(name))
    _follow(gateway, asked, lambda status: f"restarting {_left(_find(status, name))}", f"{name} goes on restarting")
    print(f"{printable(name)} was restarted")


def add_endpoint(gateway: GatewayClient, model: str, address: dict[str, str]) -> None:
    """`address` is of a server that runs already; without it an engine is started. Raises CommandError."""
    gateway.check_model(model)
    asked = _begin(lambda: gateway.add({"model": model} | address))
    _follow(gateway, asked, lambda status: f"adding to {model}", f"{model} gets its endpoint all the same")
    print(f"{printable(asked.result())} was added to {printable(model)}")


def undrain_endpoint(gateway: GatewayClient, name: str) -> None:
    gateway.endpoint(name)
    gateway.undrain(name)
    print(f"{printable(name)} gets requests again")


def remove_endpoint(gateway: GatewayClient, name: str) -> None:
    endpoint = gateway.endpoint(name)
    asked = _begin(lambda: gateway.remove(name))
    _follow(gateway, asked, lambda status: f"removing {name}", f"{name} is removed all the same")
    moved = f"; its {endpoint.requests:,} requests go on elsewhere" if endpoint.requests else ""
    print(f"{printable(name)} was removed{moved}")


# --- what takes its time ----------------------------------------------------------------------------------------------


def _begin(action: Callable[[], T]) -> Future[T]:
    """In a thread that nothing waits for at the end of the command: the gateway goes on without us."""
    asked: Future[T] = Future()

    def run() -> None:
        try:
            asked.set_result(action())
        except BaseException as error:
            asked.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return asked


def _follow(gateway: GatewayClient, asked: Future[T], tell: Callable[[FleetStatus], str | None], if_left: str) -> bool:
    """Show what `tell` makes of the status until the gateway has answered; False if `tell` had enough before.

    Raises what the request raised.
    """
    console = error_console()
    try:
        with console.status("") if console.is_terminal else nullcontext() as line:
            while not asked.done():
                told = tell(gateway.status())
                if told is None:
                    return False
                if line is not None:
                    line.update(escape(printable(told)))
                wait([asked], timeout=FOLLOW_SECONDS)
        asked.result()
    except KeyboardInterrupt:
        console.print(printable(if_left), markup=False)
        raise
    return True


def _find(status: FleetStatus, name: str) -> EndpointStatus | None:
    return next((e for model in status.models for e in model.endpoints if e.name == name), None)


def _left(endpoint: EndpointStatus | None) -> str:
    if endpoint is None:
        return "what is gone"
    return f"{endpoint.name} ({endpoint.state}): {endpoint.requests:,} requests, {endpoint.tokens:,} tokens left"
