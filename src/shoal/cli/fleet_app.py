"""`shoal fleet`: its commands, their flags and their help. What they do is in fleet.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shoal.cli.gateway_client import GatewayClient

DEFAULT_URL = "http://127.0.0.1:8000"
_COMPLETION_SECONDS = 1.0

fleet_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)


@fleet_app.callback()
def fleet() -> None:
    """See and change the fleet behind a running gateway.

    **Examples**

    - `shoal fleet status --watch`
    - `shoal fleet drain smollm2-135m-0`
    """


def _gateway(url: str, api_key: str | None) -> GatewayClient:
    from shoal.cli.gateway_client import GatewayClient

    return GatewayClient(url, api_key)


def _names(context: typer.Context, incomplete: str, *, of_models: bool) -> list[str]:
    """Asked of the gateway; where that fails there is nothing to offer, and a shell's prompt is no place to say why."""
    from shoal.cli.errors import CommandError
    from shoal.cli.gateway_client import GatewayClient

    url, api_key = context.params.get("url") or DEFAULT_URL, context.params.get("api_key")
    try:
        models = GatewayClient(url, api_key, seconds=_COMPLETION_SECONDS).status().models
    except CommandError:
        return []
    names = [m.name for m in models] if of_models else [e.name for m in models for e in m.endpoints]
    return [name for name in names if name.startswith(incomplete)]


def _complete_endpoint(ctx: typer.Context, incomplete: str) -> list[str]:
    return _names(ctx, incomplete, of_models=False)


def _complete_model(ctx: typer.Context, incomplete: str) -> list[str]:
    return _names(ctx, incomplete, of_models=True)


Url = Annotated[
    str, typer.Option(metavar="URL", envvar="SHOAL_URL", help="Of the gateway.", is_eager=True, show_envvar=True)
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY", envvar="SHOAL_API_KEY", help="Better in the environment than here, where `ps` shows it."
    ),
]
EndpointName = Annotated[
    str, typer.Argument(help="As `shoal fleet status` names it.", autocompletion=_complete_endpoint, show_default=False)
]
ModelName = Annotated[
    str, typer.Argument(help="What clients ask for.", autocompletion=_complete_model, show_default=False)
]


@fleet_app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it live, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; with --watch, a line each second.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Show models and endpoints: state, layout, requests, KV use, queue, speeds, latencies and N+1.

    **Examples**

    - `shoal fleet status`
    - `shoal fleet status --watch`
    - `shoal fleet status --json --url http://10.0.0.5:8000`
    """
    from shoal.cli.fleet import print_status

    print_status(_gateway(url, api_key), as_json=as_json, watch=watch)


@fleet_app.command()
def drain(
    endpoint: EndpointName,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has no request left.")] = True,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Give an endpoint no new requests, and wait until it has none left.

    **Examples**

    - `shoal fleet drain smollm2-135m-0`
    - `shoal fleet drain smollm2-135m-0 --no-wait`
    """
    from shoal.cli.fleet import drain_endpoint

    drain_endpoint(_gateway(url, api_key), endpoint, until_empty=wait)


@fleet_app.command()
def undrain(endpoint: EndpointName, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Give a drained endpoint requests again.

    **Examples**

    - `shoal fleet undrain smollm2-135m-0`
    """
    from shoal.cli.fleet import undrain_endpoint

    undrain_endpoint(_gateway(url, api_key), endpoint)


@fleet_app.command()
def restart(endpoint: EndpointName, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Drain an endpoint, stop it and start it anew. One after the other, that is a rolling restart.

    **Examples**

    - `shoal fleet restart smollm2-135m-0`
    """
    from shoal.cli.fleet import restart_endpoint

    restart_endpoint(_gateway(url, api_key), endpoint)


@fleet_app.command()
def add(
    model: ModelName,
    openai: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Of a server that runs already. [default: start an engine]"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the endpoint; with --openai.")] = None,
    remote_model: Annotated[
        str | None, typer.Option(help="What that server calls the model. [default: as it is called here]")
    ] = None,
    endpoint_key: Annotated[
        str | None, typer.Option(envvar="SHOAL_ENDPOINT_KEY", help="API key that that server asks for.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Add an endpoint to a model: a server that runs already, or an engine that the gateway starts now.

    **Examples**

    - `shoal fleet add smollm2-135m`
    - `shoal fleet add llama-70b --openai http://127.0.0.1:8003`
    """
    from shoal.cli.fleet import add_endpoint

    named = {"name": name, "remote_model": remote_model}
    if openai is None and any(named.values()):
        raise typer.BadParameter("--name and --remote-model describe a server: name it with --openai")
    given = {"openai": openai, **named, "api_key": endpoint_key} if openai is not None else {}
    add_endpoint(_gateway(url, api_key), model, {key: value for key, value in given.items() if value is not None})


@fleet_app.command()
def remove(endpoint: EndpointName, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Take an endpoint out of the fleet now; the requests that it has go on elsewhere.

    **Examples**

    - `shoal fleet remove smollm2-135m-0`
    """
    from shoal.cli.fleet import remove_endpoint

    remove_endpoint(_gateway(url, api_key), endpoint)
