"""Docker Compose, on one machine: one container with the gateway and all engines."""

from __future__ import annotations

from typing import Any

from shoal.plan.export.deployable import Deployable, ExportError, shared_memory
from shoal.plan.export.document import Export, comment, to_yaml
from shoal.plan.export.pods import environment, mount_path
from shoal.plan.export.shoal_files import (
    IMAGE,
    PORT,
    PROBE,
    engine_settings,
    head,
    listener,
    require_shoal,
    warnings_of,
)

TARGET = "compose"
_CONFIG = "/etc/shoal/fleet.yaml"
_SECRETS = "/run/secrets"


def export(d: Deployable) -> Export:
    require_shoal(d, TARGET)
    if d.spans_nodes or d.num_devices > d.devices_per_node:
        raise ExportError(
            f"--to compose: {d.num_devices} devices are more than a node's {d.devices_per_node}, and Compose is of "
            "one machine; use --to kubernetes, lws, slurm or ray"
        )
    if d.mig is not None:
        raise ExportError("--to compose: MIG slices are named by their UUIDs there; use --to kubernetes")
    warnings = warnings_of(d)
    if d.max_replicas is not None:
        warnings.append("Compose does not scale by load: max_replicas is left out.")
    if d.device.vendor == "amd":
        warnings.append("Compose counts NVIDIA's devices alone: the container sees all of the host's.")
    fleet = {
        **listener(d),
        "keys": f"{_SECRETS}/keys.json",
        **d.gateway,
        "models": [
            {
                "name": d.served_name,
                "model": d.model,
                **d.serving,
                "replicas": d.pool.replicas,
                **engine_settings(d, d.pool.layout),
            }
        ],
    }
    steps = [
        "First, beside this file; `probe-key` is what the second command prints:",
        "  shoal keys create --tenant default --file keys.json",
        "  shoal keys create --tenant ops --scope metrics --file keys.json",
        "  printf '%s' PRINTED_ABOVE > probe-key",
        "  chmod 640 keys.json probe-key",
        f"  MODELS=/where/the/model/is SHOAL_GID=$(id -g) docker compose up --detach   # then port {PORT}",
        f"MODELS is mounted at {mount_path(d)}, SHOAL_GID owns the two files.",
    ]
    files = {
        "compose.yaml": comment(head(d, TARGET, warnings, steps)) + to_yaml(_project(d)),
        "fleet.yaml": comment(head(d, TARGET, [], [])) + to_yaml(fleet),
    }
    return Export(target=TARGET, files=files, warnings=tuple(warnings))


def _project(d: Deployable) -> dict[str, Any]:
    ready = ["CMD", "python", "-c", PROBE, f"http://127.0.0.1:{PORT}/ready", f"{_SECRETS}/probe-key"]
    service: dict[str, Any] = {
        "image": d.image or IMAGE,
        "entrypoint": ["shoal"],
        "command": ["serve", "--deployment", _CONFIG],
        "user": "10001:${SHOAL_GID:?the group that may read keys.json}",
        "restart": "unless-stopped",
        "init": True,
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "tmpfs": ["/tmp:mode=1777"],
        "shm_size": shared_memory(d, d.num_devices),
        "ulimits": {"nofile": {"soft": 65536, "hard": 65536}},
        "environment": {one["name"]: one["value"] for one in environment(d)},
        "ports": [f"127.0.0.1:{PORT}:{PORT}"],
        "stop_grace_period": f"{int(d.drain_seconds) + 30}s",
        "healthcheck": {
            "test": ready,
            "interval": "10s",
            "timeout": "5s",
            "retries": 3,
            "start_period": f"{d.start_seconds}s",
        },
        "secrets": ["keys.json", "probe-key"],
        "configs": [{"source": "fleet", "target": _CONFIG}],
        "volumes": [
            {
                "type": "bind",
                "source": "${MODELS:?where the model is}",
                "target": mount_path(d),
                "read_only": d.is_path,
            },
        ],
        "labels": {"app.kubernetes.io/name": "shoal", "app.kubernetes.io/instance": d.name},
    }
    if d.device.vendor == "nvidia":
        device = {"driver": "nvidia", "count": d.num_devices, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    elif d.device.vendor == "amd":
        service |= {"devices": ["/dev/kfd:/dev/kfd", "/dev/dri:/dev/dri"], "group_add": ["video", "render"]}
    return {
        "name": d.name,
        "services": {"shoal": service},
        "configs": {"fleet": {"file": "./fleet.yaml"}},
        "secrets": {"keys.json": {"file": "./keys.json"}, "probe-key": {"file": "./probe-key"}},
    }
