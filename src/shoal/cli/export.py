"""`shoal export`: its flags and their help. What it does is in export_files.py and shoal.plan.export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from shoal.config import parse_bytes

_PODS = "Kubernetes"


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _complete_target(incomplete: str) -> list[str]:
    from shoal.plan.export import TARGETS

    return [name for name in TARGETS if name.startswith(incomplete)]


def export(
    deployment: Annotated[
        Path | None,
        typer.Argument(
            metavar="DEPLOYMENT",
            help="File of `shoal serve --deployment`, or what `shoal plan --json` printed.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="TARGET", help="See --list.", autocompletion=_complete_target)
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(metavar="CLUSTER", help="As 8xH100, 2x8xH100:ndr or 7xH100:1g.10gb. [default: the plan's]"),
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR|-", help="- prints everything.")] = "-",
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which of the deployment's models. [default: its only one]")
    ] = None,
    model_path: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="What is loaded, where it runs. [default: as in the file]"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What objects are named after. [default: the model's name]")] = None,
    image: Annotated[str | None, typer.Option(help="Container image. [default: the target's]")] = None,
    namespace: Annotated[str, typer.Option(help="Of Kubernetes.", rich_help_panel=_PODS)] = "default",
    claim: Annotated[
        str | None,
        typer.Option(help="PersistentVolumeClaim with the model. [default: NAME-models]", rich_help_panel=_PODS),
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Scale by load up to so many engines.", rich_help_panel=_PODS)
    ] = None,
    scaling: Annotated[
        Literal["keda", "hpa"], typer.Option(help="What scales, with --max-replicas.", rich_help_panel=_PODS)
    ] = "keda",
    prometheus: Annotated[
        str | None, typer.Option(metavar="URL", help="Which KEDA asks.", rich_help_panel=_PODS)
    ] = None,
    gateways: Annotated[int, typer.Option(min=1, help="Pods of the gateway.", rich_help_panel=_PODS)] = 2,
    rdma: Annotated[
        str | None,
        typer.Option(
            metavar="RESOURCE=N", help="RDMA devices of a pod. [default: by the network]", rich_help_panel=_PODS
        ),
    ] = None,
    topology_key: Annotated[
        str | None, typer.Option(metavar="LABEL", help="Node label of zones or racks.", rich_help_panel=_PODS)
    ] = None,
    node_selector: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL=VALUE", help="Nodes for engines; repeat for more.", rich_help_panel=_PODS),
    ] = None,
    priority_class: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the pods.", rich_help_panel=_PODS)
    ] = None,
    shared_memory: Annotated[
        int | None,
        typer.Option(
            parser=_size, metavar="SIZE", help="Of /dev/shm. [default: by the devices]", rich_help_panel=_PODS
        ),
    ] = None,
    host_memory: Annotated[
        int | None,
        typer.Option(parser=_size, metavar="SIZE", help="Of an engine's pod or node. [default: by the devices]"),
    ] = None,
    start_seconds: Annotated[int, typer.Option(min=1, help="An engine may take so long to start.")] = 1800,
    show: Annotated[bool, typer.Option("--list", help="List the targets and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print files and warnings as JSON.")] = False,
) -> int:
    """Write a deployment as manifests or commands for whoever runs it.

    What the target cannot express is said in the files and on standard error; what would be another deployment is
    refused.

    **Examples**

    - `shoal export --list`
    - `shoal export fleet.yaml --to kubernetes --on 8xH100 --image registry.local/shoal:1 | kubectl apply -f -`
    - `shoal export fleet.yaml --to lws --on 2x8xH100:ndr --max-replicas 4 --output deploy/`
    - `shoal export fleet.yaml --to vllm --on 4xL40S --output vllm/`
    """
    from shoal.cli.export_files import list_targets, write

    if show:
        list_targets(as_json=as_json)
        return 0
    if deployment is None:
        raise typer.BadParameter("name a deployment file, or see --list", param_hint="DEPLOYMENT")
    if to is None:
        raise typer.BadParameter("name a target; see --list", param_hint="--to")
    given = {
        "name": name,
        "model": model_path,
        "image": image,
        "namespace": namespace,
        "claim": claim,
        "max_replicas": max_replicas,
        "scaling": scaling,
        "prometheus": prometheus,
        "gateways": gateways,
        "topology_key": topology_key,
        "priority_class": priority_class,
        "shared_memory_bytes": shared_memory,
        "host_memory_bytes": host_memory,
        "start_seconds": start_seconds,
    }
    write(
        deployment,
        to,
        output,
        on=on,
        model=model,
        rdma=rdma,
        node_selector=node_selector or [],
        given={key: value for key, value in given.items() if value is not None},
        as_json=as_json,
    )
    return 0
