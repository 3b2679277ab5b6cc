"""Pods of Kubernetes: containers, what they may take and do, how they are probed. For all targets that make some."""

from __future__ import annotations

from typing import Any

from shoal.plan.export.deployable import Deployable, ExportError, Pool, host_cpus, host_memory, shared_memory
from shoal.plan.export.shoal_files import FILL_IN, PORT, PROBE

GIB = 1 << 30
SECRETS = "/etc/shoal/secrets"
CONFIG = "/etc/shoal/config"
RUN = "/run/shoal"
"""Where the file with the key filled in lies: in memory."""
MODELS = "/models"
_USER = 10001


def labels(d: Deployable, component: str) -> dict[str, str]:
    """The recommended ones (kubernetes.io, Recommended Labels)."""
    return {
        **selector(d, component),
        "app.kubernetes.io/part-of": d.name,
        "app.kubernetes.io/managed-by": "shoal-export",
    }


def selector(d: Deployable, component: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "shoal",
        "app.kubernetes.io/instance": d.name,
        "app.kubernetes.io/component": component,
    }


def metadata(d: Deployable, name: str, component: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "namespace": d.namespace, "labels": labels(d, component), **more}


def device_resource(d: Deployable) -> str | None:
    """What the vendor's device plugin calls a device; None on a CPU."""
    if d.mig is not None:
        return f"nvidia.com/mig-{d.mig.replace('+', '.')}"
    if d.device.vendor == "intel":
        raise ExportError(f"device: there is no one name for {d.device.name} among device plugins; export to vllm")
    return {"nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu"}.get(d.device.vendor)


def resources(d: Deployable, devices: int, *, rdma: bool) -> dict[str, Any]:
    """Devices cannot be overcommitted, so requests equal limits; so does memory, that no engine is killed for a
    neighbour's. The CPU has no limit: throttling would delay steps."""
    memory = quantity(host_memory(d, devices))
    limits: dict[str, Any] = {"memory": memory}
    name = device_resource(d)
    if name is not None:
        limits[name] = str(devices)
    if rdma and d.rdma is not None:
        limits[d.rdma[0]] = str(d.rdma[1])
    return {"requests": {"cpu": str(host_cpus(d, devices)), **limits}, "limits": limits}


def quantity(size: int) -> str:
    return f"{-(-size // (1 << 20))}Mi" if size % GIB else f"{size // GIB}Gi"


def container_security(*, pinned: bool = False) -> dict[str, Any]:
    """`pinned`: RDMA registers memory that must not be swapped, which needs a capability."""
    capabilities: dict[str, Any] = {"drop": ["ALL"]}
    if pinned:
        capabilities["add"] = ["IPC_LOCK"]
    return {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": capabilities}


def pod_security() -> dict[str, Any]:
    """`fsGroup` makes secrets readable by the group alone, which shoal asks of them."""
    return {
        "runAsNonRoot": True,
        "runAsUser": _USER,
        "runAsGroup": _USER,
        "fsGroup": _USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def environment(d: Deployable) -> list[dict[str, Any]]:
    """With a read-only root everything that libraries keep goes to /tmp, and what is fetched to the model's volume."""
    values = {"HOME": "/tmp"}
    if not d.is_path:
        values |= {"HF_HOME": f"{MODELS}/.hub", "XDG_CACHE_HOME": f"{MODELS}/.cache"}
    return [{"name": name, "value": value} for name, value in values.items()]


def model_mount(d: Deployable) -> dict[str, Any]:
    """Of a path its first directory is the volume, so that the path is the same inside; a hub id is fetched into it."""
    if d.is_path:
        return {"name": "models", "mountPath": mount_path(d), "readOnly": True}
    return {"name": "models", "mountPath": MODELS}


def mount_path(d: Deployable) -> str:
    return "/" + d.model.split("/")[1] if d.is_path else MODELS


def model_volume(d: Deployable) -> dict[str, Any]:
    claim: dict[str, Any] = {"claimName": d.model_claim}
    if d.is_path:
        claim["readOnly"] = True
    return {"name": "models", "persistentVolumeClaim": claim}


def volumes(d: Deployable, config: str, items: list[str], devices: int) -> list[dict[str, Any]]:
    keys = [{"key": item, "path": item} for item in items]
    # 0440: with fsGroup the group of the pod reads it, and nobody else.
    secret = {"secretName": f"{d.name}-keys", "defaultMode": 0o440, "items": keys}
    found: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": config}},
        {"name": "secrets", "secret": secret},
        {"name": "run", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}},
        {"name": "tmp", "emptyDir": {}},
        model_volume(d),
    ]
    if devices:
        size = quantity(shared_memory(d, devices))
        found.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}})
    return found


def mounts(d: Deployable, devices: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": "run", "mountPath": RUN, "readOnly": True},
        {"name": "secrets", "mountPath": SECRETS, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
        model_mount(d),
    ]
    if devices:
        found.append({"name": "shm", "mountPath": "/dev/shm"})
    return found


def fill_in(d: Deployable, image: str, file: str) -> dict[str, Any]:
    """The init container that puts the engines' key into the file of a server."""
    return {
        "name": "config",
        "image": image,
        "command": ["python", "-c", FILL_IN, f"{CONFIG}/{file}", f"{RUN}/{file}", f"{SECRETS}/engine-key"],
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"memory": "64Mi"}},
        "securityContext": container_security(),
        "volumeMounts": [
            {"name": "config", "mountPath": CONFIG, "readOnly": True},
            {"name": "secrets", "mountPath": SECRETS, "readOnly": True},
            {"name": "run", "mountPath": RUN},
        ],
    }


def probes(d: Deployable, key: str, start_seconds: int) -> dict[str, Any]:
    """The listener takes connections once the model is loaded, so /health is the start; /ready asks whether requests
    are of use here, and /health again whether the process still answers."""
    health = {"path": "/health", "port": "http"}
    ask = ["python", "-c", PROBE, f"http://127.0.0.1:{PORT}/ready", f"{SECRETS}/{key}"]
    return {
        "startupProbe": {"httpGet": health, "periodSeconds": 10, "failureThreshold": max(3, -(-start_seconds // 10))},
        "readinessProbe": {"exec": {"command": ask}, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 2},
        "livenessProbe": {"httpGet": health, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6},
    }


def scheduling(d: Deployable, component: str, *, devices: int) -> dict[str, Any]:
    """Where pods go, and before whom."""
    found: dict[str, Any] = {}
    if d.priority_class is not None:
        found["priorityClassName"] = d.priority_class
    if devices and d.node_selector:
        found["nodeSelector"] = dict(d.node_selector)
    name = device_resource(d)
    if devices and name is not None:
        # What clouds and GPU operators put on such nodes, to keep everything else away.
        taint = "nvidia.com/gpu" if d.device.vendor == "nvidia" else name
        found["tolerations"] = [{"key": taint, "operator": "Exists", "effect": "NoSchedule"}]
    return found


def spread(d: Deployable, component: str) -> dict[str, Any]:
    """Over zones and hosts, but run rather than wait for evenness."""
    constraints = [
        {
            "maxSkew": 1,
            "topologyKey": key,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": selector(d, component)},
        }
        for key in (d.topology_key or "topology.kubernetes.io/zone", "kubernetes.io/hostname")
    ]
    return {"topologySpreadConstraints": constraints}


def pod_basics(d: Deployable) -> dict[str, Any]:
    """`terminationGracePeriodSeconds`: what runs may end (drain_seconds), and the engine itself."""
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        "terminationGracePeriodSeconds": int(d.drain_seconds) + 35,
    }


LINGER = {"preStop": {"sleep": {"seconds": 5}}}
"""Until proxies have heard that the pod is going. Kubernetes 1.30 and later."""


def rdma_pod(d: Deployable, pool: Pool) -> bool:
    """Whether a pod of this pool talks to others over RDMA."""
    return d.rdma is not None and (d.placement(pool).nodes > 1 or d.is_disaggregated)
