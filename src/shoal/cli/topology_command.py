"""The flags and the help of `shoal topology`. What it does is in `cli.topology`, imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def topology(
    cluster: Annotated[
        str | None,
        typer.Argument(metavar="[CLUSTER]", help="8xH100, 2x8xH100:ndr, a YAML file. [default: this host]"),
    ] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Write what was detected as a topology file.")
    ] = None,
    hardware: Annotated[
        list[Path] | None, typer.Option(metavar="FILE.yaml", help="Devices, links and nodes of your own. Repeatable.")
    ] = None,
    ray: Annotated[str | None, typer.Option(metavar="ADDRESS", help="A Ray cluster whose nodes are meant.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show this host's devices and the links between them, or what a cluster's name or file means.

    Reads NVML (NVLink, PCIe, MIG), InfiniBand and RoCE ports, NUMA nodes, and the nodes of the Slurm job or Ray cluster
    that it runs in. What it writes is what other commands take as a cluster, and may be edited.

    **Examples**

    - `shoal topology`
    - `shoal topology --write cluster.yaml`
    - `shoal topology 2x8xH100:ndr`
    - `shoal topology cluster.yaml --json`
    """
    from shoal.cli.topology import show_cluster, show_detected

    files = tuple(hardware or ())
    if cluster is not None:
        show_cluster(cluster, files, as_json=as_json, write=write)
    else:
        show_detected(files, ray, as_json=as_json, write=write)
