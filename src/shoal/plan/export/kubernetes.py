"""Kubernetes, where an engine fits on one node: a StatefulSet of engines behind a gateway."""

from __future__ import annotations

from typing import Any

from shoal.plan.export.cluster_objects import (
    Part,
    autoscaling,
    config_map,
    disruption_budget,
    engine_policy,
    gateway,
    secret_steps,
    service,
)
from shoal.plan.export.deployable import Deployable, ExportError
from shoal.plan.export.document import Export, documents
from shoal.plan.export.pods import (
    LINGER,
    RUN,
    container_security,
    environment,
    fill_in,
    labels,
    metadata,
    mounts,
    pod_basics,
    probes,
    resources,
    scheduling,
    selector,
    spread,
    volumes,
)
from shoal.plan.export.shoal_files import IMAGE, PORT, engine_file, head, require_shoal, warnings_of

TARGET = "kubernetes"


def export(d: Deployable) -> Export:
    require_shoal(d, TARGET)
    if d.spans_nodes:
        nodes = d.placement(d.pool).nodes
        raise ExportError(
            f"--to kubernetes: an engine of {d.pool.layout} is on {nodes} nodes of {d.devices_per_node} devices, and a "
            "pod is on one; use --to lws"
        )
    warnings = warnings_of(d)
    name = f"{d.name}-engine"
    # Stable names: the gateway knows each engine, also one that is gone, and those that an autoscaler may yet start.
    addresses = [
        f"http://{name}-{number}.{name}.{d.namespace}.svc:{PORT}"
        for number in range(max(d.pool.replicas, d.max_replicas or 0))
    ]
    parts: list[Part] = [
        ("", config_map(d, name, "engine", {"engine.yaml": engine_file(d, d.pool)})),
        ("", _engines(d, name)),
        ("Gives every engine a name of its own.", service(d, name, "engine", headless=True)),
        ("", disruption_budget(d, "engine")),
        ("", engine_policy(d)),
        *gateway(d, addresses),
        *autoscaling(d, {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": name}),
    ]
    text = documents(head(d, TARGET, warnings, secret_steps(d, ranks=False)), parts)
    return Export(target=TARGET, files={f"{d.name}.yaml": text}, warnings=tuple(warnings))


def _engines(d: Deployable, name: str) -> dict[str, Any]:
    devices, image = d.pool.ranks, d.image or IMAGE
    container = {
        "name": "shoal",
        "image": image,
        "command": ["shoal"],
        "args": ["serve", "--deployment", f"{RUN}/engine.yaml"],
        "env": environment(d),
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": resources(d, devices, rdma=False),
        "securityContext": container_security(),
        "lifecycle": LINGER,
        **probes(d, "engine-key", d.start_seconds),
        "volumeMounts": mounts(d, devices),
    }
    pod = {
        **pod_basics(d),
        **spread(d, "engine"),
        **scheduling(d, "engine", devices=devices),
        "initContainers": [fill_in(d, image, "engine.yaml")],
        "containers": [container],
        "volumes": volumes(d, name, ["engine-key"], devices),
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": metadata(d, name, "engine"),
        "spec": {
            "serviceName": name,
            "replicas": d.pool.replicas,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": selector(d, "engine")},
            "template": {"metadata": {"labels": labels(d, "engine")}, "spec": pod},
        },
    }
