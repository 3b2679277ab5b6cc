"""shoal's gateway in front of other makers' servers."""

from __future__ import annotations

from typing import Any

from shoal.plan.export.deployable import Deployable


def front_file(d: Deployable, port: int) -> dict[str, Any]:
    """A deployment over one server a replica. Names of the form NODE-n stand for addresses that only the user knows."""
    beside, nodes = d.replicas_per_node(d.pool), d.placement(d.pool).nodes
    addresses = [f"http://node-{r // beside * nodes}:{port + r % beside}" for r in range(d.pool.replicas)]
    endpoints = [
        {"name": f"{d.name}-{number}", "openai": address, "max_sequences": d.max_sequences}
        for number, address in enumerate(addresses)
    ]
    model = {"name": d.served_name, "model": d.model, **d.serving, "endpoints": endpoints}
    return {"drain_seconds": d.drain_seconds, **d.gateway, "models": [model]}


def front_warnings(d: Deployable) -> list[str]:
    """What command lines cannot say."""
    return ["command lines do not scale by load: max_replicas is left out."] if d.max_replicas is not None else []
