"""Ray: a cluster of the plan's machines, and a job in it that runs the gateway and engines whose ranks Ray places."""

from __future__ import annotations

from typing import Any

from shoal.plan.export.deployable import Deployable, ExportError
from shoal.plan.export.document import Export, comment, to_yaml
from shoal.plan.export.shoal_files import PORT, engine_settings, head, listener, require_shoal, warnings_of

TARGET = "ray"


def export(d: Deployable) -> Export:
    require_shoal(d, TARGET)
    if d.pool.ranks == 1:
        raise ExportError(
            "--to ray: shoal has Ray place the ranks of an engine, and an engine of one rank runs beside the gateway; "
            "use --to kubernetes, slurm or compose"
        )
    warnings = warnings_of(d, spares=False)
    if d.mig is not None:
        warnings.append("MIG: Ray counts slices as GPUs; give each node its slices in CUDA_VISIBLE_DEVICES.")
    if d.max_replicas is not None:
        warnings.append(
            "the deployment does not grow by itself: `shoal fleet add` does that; max_replicas is left out."
        )
    if d.device.vendor == "cpu":
        warnings.append("ranks are placed by their CPUs: see that each node has `threads` of them for each.")
    engine = engine_settings(d, d.pool.layout, _launch(d))
    if d.is_gpu:
        # Ray gives each rank a device of its own, which is the first one that it sees.
        engine["device"] = "auto"
    model = {
        "name": d.served_name,
        "model": d.model,
        **d.serving,
        "replicas": d.pool.replicas,
        **engine,
    }
    fleet = {**listener(d), "keys": "@DIR@/keys.json", **d.gateway, "models": [model]}
    steps = [
        "Every node needs shoal[ray] and the model at the same path. On the machine that will be Ray's head:",
        "  shoal keys create --tenant default --file keys.json",
        "  ./start.sh head",
        "and on every other one:",
        "  ./start.sh node HEAD:6379",
        f"then, on the head again, when `ray status` shows {d.num_devices} devices:",
        "  ./start.sh serve",
    ]
    lines = comment(head(d, TARGET, warnings, steps))
    files = {
        "start.sh": "#!/usr/bin/env bash\n" + lines + _script(d),
        "fleet.yaml": comment(head(d, TARGET, [], [])) + to_yaml(fleet),
        "ray-job.yaml": comment(
            ["For `ray job submit --working-dir . --runtime-env ray-job.yaml -- ./start.sh serve`."]
        )
        + to_yaml(_runtime_environment(d)),
    }
    return Export(target=TARGET, files=files, warnings=tuple(warnings))


def _launch(d: Deployable) -> dict[str, Any]:
    launch = {"launcher": "ray", "host": "@HOST@", "join_seconds": float(d.start_seconds)}
    return {**launch, "comm": "nccl"} if d.is_gpu else launch


def _runtime_environment(d: Deployable) -> dict[str, Any]:
    """What a job brings to Ray: the variables of its driver. Ranks are found places for by the driver itself."""
    return {"env_vars": {"RAY_USAGE_STATS_ENABLED": "0"}, "excludes": ["*.log"]}


def _script(d: Deployable) -> str:
    gpus = f" --num-gpus={d.devices_per_node}" if d.is_gpu else ""
    return _BODY.format(gpus=gpus, port=PORT)


_BODY = """\
set -euo pipefail
cd "$(dirname "$0")"
export RAY_USAGE_STATS_ENABLED=0
case "${{1:-}}" in
  head) exec ray start --head --port=6379 --include-dashboard=false{gpus} --block ;;
  node) exec ray start --address="${{2:?the address of the head, as HEAD:6379}}"{gpus} --block ;;
  serve)
    # The driver has to say which of this machine's addresses the others reach: ranks come back to it.
    host=${{SHOAL_HOST:-$(hostname -I | cut -d' ' -f1)}}
    umask 077
    file=$(mktemp)
    trap 'rm -f "$file"' EXIT
    sed -e "s|@HOST@|$host|" -e "s|@DIR@|$PWD|" fleet.yaml > "$file"
    shoal serve --deployment "$file" --port "${{SHOAL_PORT:-{port}}}" &
    trap 'kill -TERM $!; wait $!; rm -f "$file"' TERM INT
    wait $!
    ;;
  *) echo "usage: $0 head | node HEAD:6379 | serve" >&2; exit 2 ;;
esac
"""
