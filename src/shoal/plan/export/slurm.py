"""Slurm: one job with all engines, a task a rank, and the gateway on its first node."""

from __future__ import annotations

from shoal.plan.export.deployable import Deployable, host_cpus, host_memory
from shoal.plan.export.document import Export, comment, quote, to_yaml
from shoal.plan.export.shoal_files import (
    ENGINE_KEY,
    PORT,
    RANKS_PORT,
    engine_settings,
    gateway_file,
    head,
    listener,
    require_shoal,
    server_settings,
    warnings_of,
)

TARGET = "slurm"
_ADDRESSES = "@ENDPOINTS@"
"""Stands for what is known once Slurm has chosen the nodes."""


def export(d: Deployable) -> Export:
    require_shoal(d, TARGET)
    warnings = warnings_of(d, spares=False)
    if d.mig is not None:
        warnings.append(f"MIG: slices are asked for as gres gpu:{d.mig}; call them what the cluster's gres.conf does.")
    if d.max_replicas is not None:
        warnings.append("a job does not grow: max_replicas is left out.")
    place, pool = d.placement(d.pool), d.pool
    beside = 1 if place.nodes > 1 else min(d.replicas_per_node(pool), pool.replicas)
    nodes = place.nodes * pool.replicas if place.nodes > 1 else -(-pool.replicas // beside)
    text = "#!/usr/bin/env bash\n" + comment(head(d, TARGET, warnings, _steps(d)))
    text += _directives(d, nodes, beside * place.devices_per_node)
    text += _script(d, place.nodes, place.devices_per_node, beside)
    return Export(target=TARGET, files={f"{d.name}.sbatch": text}, warnings=tuple(warnings))


def _steps(d: Deployable) -> list[str]:
    return [
        "First, on a file system that all nodes share, with shoal installed there:",
        "  shoal keys create --tenant default --file keys.json",
        f"  sbatch {d.name}.sbatch    # the gateway is on the job's first node, port {PORT}",
    ]


def _gres(d: Deployable, devices: int) -> str:
    kind = f"gpu:{d.mig}:" if d.mig else "gpu:"
    return f"{kind}{devices}"


def _directives(d: Deployable, nodes: int, per_node: int) -> str:
    lines = [
        f"--job-name={d.name}",
        f"--nodes={nodes}",
        f"--ntasks-per-node={per_node}",
        f"--cpus-per-task={host_cpus(d, 1)}",
        f"--mem={-(-host_memory(d, per_node) >> 20)}M",
        "--output=%x-%j.log",
        # SIGTERM to the script ahead of the time limit, so that requests may end.
        f"--signal=B:TERM@{int(d.drain_seconds) + 30}",
    ]
    if d.is_gpu:
        # All tasks of a node see all of its job's devices: NCCL needs its neighbours', and each rank takes its own.
        lines.append(f"--gres={_gres(d, per_node)}")
    return "".join(f"#SBATCH {line}\n" for line in lines)


def _script(d: Deployable, nodes: int, per_node: int, beside: int) -> str:
    pool = d.pool
    ranks = pool.ranks
    launch = {"launcher": "env", "secret_file": "@DIR@/rank-secret", "join_seconds": float(d.start_seconds)}
    alone = ranks == 1
    serve = {
        **listener(d, 0),
        "api_key": ENGINE_KEY,
        "served_model_name": d.served_name,
        **server_settings(d),
        "engine": engine_settings(d, pool.layout, None if alone else launch),
    }
    del serve["port"]
    gateway = gateway_file(d, [], "@KEYS@", "@DIR@/cluster-secret")
    gateway["models"][0]["endpoints"] = _ADDRESSES
    gpus = f" --gres={_gres(d, per_node)}" if d.is_gpu else ""
    run = [
        f'    --nodes={nodes} --nodelist="$(IFS=,; echo "${{nodes[*]:first:{nodes}}}")"',
        f"    --ntasks={ranks} --ntasks-per-node={per_node}{gpus} --gpu-bind=none",
    ]
    if not d.is_gpu:
        run[1] = f"    --ntasks={ranks} --ntasks-per-node={per_node}"
    flags = "" if alone else ' --launch-host "$MASTER_ADDR"'
    return _BODY.format(
        secret=ENGINE_KEY,
        serve=to_yaml(serve),
        gateway=to_yaml(gateway).replace(f"'{_ADDRESSES}'", _ADDRESSES),
        addresses=_ADDRESSES,
        replicas=pool.replicas,
        nodes=nodes,
        beside=beside,
        port=PORT + 1,
        ranks_port=RANKS_PORT,
        run=" \\\n".join(run),
        model=quote(d.model),
        flags=flags,
        name=d.name,
        sequences=d.max_sequences,
        gateway_port=PORT,
    )


_BODY = """\
set -euo pipefail
umask 077
keys=$PWD/keys.json
dir=$(mktemp --directory "$PWD/.{name}-$SLURM_JOB_ID.XXXXXX")
trap 'rm -rf "$dir"' EXIT
openssl rand -hex 32 > "$dir/engine-key"
openssl rand -hex 32 > "$dir/rank-secret"
openssl rand -hex 32 > "$dir/cluster-secret"
fill() {{ sed -e "s|@DIR@|$dir|" -e "s|@KEYS@|$keys|" -e "s|{secret}|$(cat "$dir/engine-key")|"; }}

# Every rank of every engine reads this.
fill > "$dir/serve.yaml" <<'SERVE'
{serve}SERVE

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
endpoints=
for ((replica = 0; replica < {replicas}; replica++)); do
  first=$((replica / {beside} * {nodes}))
  # Engines beside each other on a node have ports of their own; so have the ranks of each, which take two.
  export MASTER_ADDR=${{nodes[first]}} MASTER_PORT=$((${{SHOAL_RANKS_PORT:-{ranks_port}}} + replica % {beside} * 2))
  export SHOAL_PORT=$((${{SHOAL_ENGINE_PORT:-{port}}} + replica % {beside})) SHOAL_DIR=$dir
  srun --exact --mem=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \\
{run} \\
    bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS exec shoal serve "$0" --config "$SHOAL_DIR/serve.yaml" \\
      --port "$SHOAL_PORT"{flags}' {model} &
  endpoints+="
      - {{name: {name}-$replica, openai: 'http://$MASTER_ADDR:$SHOAL_PORT', max_sequences: {sequences},
         api_key: $(cat "$dir/engine-key")}}"
done

# The gateway takes requests at once, and engines as they come.
fill > "$dir/gateway.yaml" <<'GATEWAY'
{gateway}GATEWAY
gateway=$(<"$dir/gateway.yaml")
printf '%s\\n' "${{gateway//{addresses}/$endpoints}}" > "$dir/gateway.yaml"
shoal serve --deployment "$dir/gateway.yaml" --port "${{SHOAL_GATEWAY_PORT:-{gateway_port}}}" &
front=$!
# First the gateway, whose requests end at the engines.
stop() {{ trap '' TERM; kill -TERM "$front"; wait "$front"; kill -TERM $(jobs -p) || true; wait; }}
trap stop TERM
echo "the gateway: http://$(hostname):${{SHOAL_GATEWAY_PORT:-{gateway_port}}}/v1"
wait -n   # an engine that ends for good, or the gateway, ends the job
"""
