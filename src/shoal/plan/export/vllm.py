"""vLLM: the command of each server, and the file of a shoal gateway in front of them."""

from __future__ import annotations

from shoal.plan.export.deployable import Deployable, ExportError, Pool
from shoal.plan.export.document import Export, command, comment, to_yaml
from shoal.plan.export.front import front_file, front_warnings
from shoal.plan.export.replica_script import replica_script
from shoal.plan.export.shoal_files import head
from shoal.plan.export.vllm_arguments import kv_transfer, vllm_arguments, vllm_warnings

TARGET = "vllm"
VERSION = "0.32"


def export(d: Deployable) -> Export:
    warnings = vllm_warnings(d) + front_warnings(d)
    if d.mig is not None:
        warnings.append("MIG: set CUDA_VISIBLE_DEVICES to the slice's UUID (nvidia-smi -L) before the script.")
    steps = [f"For vLLM {VERSION}. One engine each time; further ones on a node get the next devices and port."]
    if d.is_disaggregated:
        steps.append("HOST must be this machine's address: the pools exchange KV cache over it (NIXL).")
    text = replica_script(
        d,
        "vllm.sh",
        head(d, TARGET, warnings, steps),
        lambda pool: (["vllm", "serve", d.model], _arguments(d, pool)),
        lambda pool: (["vllm", "serve", d.model], _arguments(d, pool, leads=False)),
        lambda pool: _before(d, pool),
    )
    files = {"vllm.sh": text}
    if d.is_disaggregated:
        files["router.sh"] = _router(d)
    else:
        files["gateway.yaml"] = comment(head(d, TARGET, [], _front_steps())) + to_yaml(front_file(d, 8000))
    return Export(target=TARGET, files=files, warnings=tuple(warnings))


def _before(d: Deployable, pool: Pool) -> str:
    lines = ""
    if pool.attention_dp > 1:  # the first group of data-parallel attention on a node
        groups = d.placement(pool).devices_per_node // pool.layout.ranks
        lines += f"START_RANK=$((NODE_RANK * {groups}))\n"
    if pool.role != "serve":
        lines += "export VLLM_NIXL_SIDE_CHANNEL_HOST=$HOST VLLM_NIXL_SIDE_CHANNEL_PORT=$((PORT - 2400))\n"
    return lines


def _front_steps() -> list[str]:
    return [
        "The gateway: shoal serve --deployment gateway.yaml. Put the servers' addresses in, and docs/fleet.md's keys."
    ]


def _arguments(d: Deployable, pool: Pool, *, leads: bool = True) -> list[str]:
    place = d.placement(pool)
    arguments = ["--served-model-name", d.served_name, "--host", "${HOST}", "--port", "${PORT}"]
    arguments += vllm_arguments(d, pool)
    if pool.role != "serve":
        arguments += kv_transfer()
    if place.nodes > 1:
        arguments += _nodes(pool, place.nodes, place.devices_per_node, leads=leads)
    return arguments


def _nodes(pool: Pool, nodes: int, devices: int, *, leads: bool) -> list[str]:
    """Where an engine spans nodes: ranks are numbered over them, or groups of data-parallel attention are."""
    if pool.attention_dp == 1:
        words = ["--nnodes", str(nodes), "--node-rank", "${NODE_RANK}", "--master-addr", "${MASTER_ADDR}"]
        words += ["--master-port", "29500"]
    else:
        groups, rest = divmod(devices, pool.layout.ranks)
        if rest or not groups:
            raise ExportError(
                f"--to vllm: a group of {pool.layout} has {pool.layout.ranks} devices and does not divide a node's "
                f"{devices}; take a layout that divides it"
            )
        words = ["--data-parallel-size-local", str(groups), "--data-parallel-address", "${MASTER_ADDR}"]
        words += ["--data-parallel-rpc-port", "29500"]
        if not leads:
            words += ["--data-parallel-start-rank", "${START_RANK}"]
    return words if leads else [*words, "--headless"]


def _router(d: Deployable) -> str:
    """The proxy of vLLM's own project: shoal's gateway does not hand a request from one pool to another."""
    arguments = ["--vllm-pd-disaggregation", "--host", "${HOST:-0.0.0.0}", "--port", "${PORT:-8300}"]
    for number, pool in enumerate(d.pools):
        for replica in range(pool.replicas):
            port = 8000 + 100 * number + replica % d.replicas_per_node(pool)
            arguments += [f"--{pool.role}", f"http://{pool.role}-{replica}:{port}"]
    lines = comment(["Put the servers' addresses in. pip install vllm-router."])
    return "#!/usr/bin/env bash\n" + lines + "set -euo pipefail\nexec " + command(["vllm-router"], arguments) + "\n"
