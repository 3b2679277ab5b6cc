"""LeaderWorkerSet on Kubernetes, where an engine spans nodes: each is a group of pods, one a node, behind a gateway."""

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
)
from shoal.plan.export.deployable import Deployable
from shoal.plan.export.document import Export, documents
from shoal.plan.export.pods import (
    LINGER,
    RUN,
    SECRETS,
    container_security,
    environment,
    fill_in,
    labels,
    metadata,
    mounts,
    pod_basics,
    probes,
    rdma_pod,
    resources,
    scheduling,
    selector,
    volumes,
)
from shoal.plan.export.shoal_files import IMAGE, PORT, RANKS_PORT, head, rank_file, require_shoal, warnings_of

TARGET = "lws"


def export(d: Deployable) -> Export:
    require_shoal(d, TARGET)
    place, name = d.placement(d.pool), f"{d.name}-engine"
    warnings = warnings_of(d, spares=False)
    if place.nodes == 1:
        warnings.append("an engine fits on one node here: --to kubernetes needs no LeaderWorkerSet controller.")
    if place.nodes > 1 and d.rdma is None:
        warnings.append("the network has no RDMA devices that pods would ask for: ranks talk over TCP.")
    # The controller makes a service of the set's name, in which each group's leader is called SET-GROUP.
    addresses = [
        f"http://{name}-{number}.{name}.{d.namespace}.svc:{PORT}"
        for number in range(max(d.pool.replicas, d.max_replicas or 0))
    ]
    if place.nodes > 1 and d.topology_key is None:
        warnings.append(
            "nothing keeps the pods of a group near each other: give --topology-key, the node label of a rack or what "
            "a fast network connects."
        )
    parts: list[Part] = [
        ("Every rank reads the same file.",
         config_map(d, name, "engine", {"serve.yaml": rank_file(d, d.pool, f"{SECRETS}/rank-secret")})),
        (f"Needs the LeaderWorkerSet controller. A group is {place.nodes} pods of {place.devices_per_node}.",
         _set(d, name)),
        ("", disruption_budget(d, "engine")),
        ("", engine_policy(d)),
        *gateway(d, addresses),
        *autoscaling(d, {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet", "name": name}),
    ]  # fmt: skip
    text = documents(head(d, TARGET, warnings, secret_steps(d, ranks=True)), parts)
    return Export(target=TARGET, files={f"{d.name}.yaml": text}, warnings=tuple(warnings))


def _set(d: Deployable, name: str) -> dict[str, Any]:
    place = d.placement(d.pool)
    own: dict[str, Any] = {}
    if d.topology_key is not None:
        own = {"annotations": {"leaderworkerset.sigs.k8s.io/exclusive-topology": d.topology_key}}
    leader = {"metadata": {"labels": {**labels(d, "engine"), "shoal/role": "leader"}}, "spec": _pod(d, leads=True)}
    worker = {"metadata": {"labels": {**labels(d, "engine"), "shoal/role": "worker"}}, "spec": _pod(d, leads=False)}
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": metadata(d, name, "engine", **own),
        "spec": {
            "replicas": d.pool.replicas,
            "startupPolicy": "LeaderCreated",
            "networkConfig": {"subdomainPolicy": "Shared"},
            "rolloutStrategy": {
                "type": "RollingUpdate",
                "rollingUpdateConfiguration": {"maxUnavailable": 1, "maxSurge": 0},
            },
            "leaderWorkerTemplate": {
                "size": place.nodes,
                # A rank alone is of no use: ranks meet once, when they start.
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": leader,
                "workerTemplate": worker,
            },
        },
    }


def _pod(d: Deployable, *, leads: bool) -> dict[str, Any]:
    place, image = d.placement(d.pool), d.image or IMAGE
    rdma = rdma_pod(d, d.pool)
    container: dict[str, Any] = {
        "name": "shoal",
        "image": image,
        "command": ["torchrun"],
        "args": _ranks(d),
        "env": [*environment(d), {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "resources": resources(d, place.devices_per_node, rdma=rdma),
        "securityContext": container_security(pinned=rdma),
        "volumeMounts": mounts(d, place.devices_per_node),
    }
    if leads:
        container |= {"ports": [{"name": "http", "containerPort": PORT}], "lifecycle": LINGER}
        container |= probes(d, "engine-key", d.start_seconds)
    return {
        **pod_basics(d),
        **scheduling(d, "engine", devices=place.devices_per_node),
        **(_one_a_node(d) if place.nodes > 1 else {}),
        "initContainers": [fill_in(d, image, "serve.yaml")],
        "containers": [container],
        "volumes": volumes(d, f"{d.name}-engine", ["engine-key", "rank-secret"], place.devices_per_node),
    }


def _one_a_node(d: Deployable) -> dict[str, Any]:
    """Ranks that share a kernel take each other for processes that share memory and devices, which pods do not."""
    term = {"labelSelector": {"matchLabels": selector(d, "engine")}, "topologyKey": "kubernetes.io/hostname"}
    return {"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}}


def _ranks(d: Deployable) -> list[str]:
    """torchrun numbers the ranks of a pod; the controller numbers the pods. `$(...)` is filled in by Kubernetes."""
    place = d.placement(d.pool)
    return [
        "--nnodes=$(LWS_GROUP_SIZE)",
        f"--nproc-per-node={place.devices_per_node}",
        "--node-rank=$(LWS_WORKER_INDEX)",
        "--master-addr=$(LWS_LEADER_ADDRESS)",
        f"--master-port={RANKS_PORT}",
        "-m",
        "shoal",
        "serve",
        d.model,
        f"--config={RUN}/serve.yaml",
        "--launch-host=$(POD_IP)",
    ]
