"""NVIDIA NIM: a container's environment, and the command that starts one a replica."""

from __future__ import annotations

import shlex

from shoal.plan.export.deployable import Deployable, ExportError
from shoal.plan.export.document import Export, comment, to_yaml
from shoal.plan.export.front import front_file, front_warnings
from shoal.plan.export.shoal_files import head
from shoal.plan.export.vllm_arguments import vllm_arguments, vllm_warnings

TARGET = "nim"
IMAGE = "nvcr.io/nim/nvidia/llm-nim:latest"
_OWN = {
    "--tensor-parallel-size": "NIM_TENSOR_PARALLEL_SIZE",
    "--pipeline-parallel-size": "NIM_PIPELINE_PARALLEL_SIZE",
    "--max-model-len": "NIM_MAX_MODEL_LEN",
}
"""Flags of the engine that have a variable; all others go through NIM_PASSTHROUGH_ARGS."""


def export(d: Deployable) -> Export:
    _require(d)
    warnings = vllm_warnings(d) + front_warnings(d)
    warnings.append("a NIM of one model has profiles of its own: NIM_MODEL_PROFILE there goes before these sizes.")
    steps = ["For NIM 2.x for LLMs, whose engine is vLLM. Take it with ./nim.sh REPLICA; NGC_API_KEY has to be set."]
    files = {
        "nim.env": comment(head(d, TARGET, warnings, steps)) + _environment(d),
        "nim.sh": "#!/usr/bin/env bash\n" + comment(head(d, TARGET, [], [])) + _script(d),
        "gateway.yaml": comment(
            ["Put the servers' addresses in: shoal serve --deployment gateway.yaml (docs/fleet.md)."]
        )
        + to_yaml(front_file(d, 8000)),
    }
    return Export(target=TARGET, files=files, warnings=tuple(warnings))


def _require(d: Deployable) -> None:
    if d.device.vendor != "nvidia":
        raise ExportError(f"device: NIM runs on NVIDIA's devices, and {d.device.name} is none; use --to vllm")
    if d.is_disaggregated:
        raise ExportError("--to nim: a NIM has no separate prefill and decode pools; use --to dynamo, vllm or sglang")
    if d.spans_nodes:
        raise ExportError(
            f"--to nim: an engine of {d.pool} is on {d.placement(d.pool).nodes} nodes, and a container is on one; use "
            "--to dynamo or vllm"
        )


def _environment(d: Deployable) -> str:
    """One variable a line, as `docker run --env-file` reads them: without quotes around a value."""
    values = {"NIM_MODEL_PATH": d.model if d.is_path else f"hf://{d.model}", "NIM_SERVED_MODEL_NAME": d.served_name}
    rest: list[str] = []
    arguments = vllm_arguments(d, d.pool)
    for at, word in enumerate(arguments):
        if word in _OWN:
            values[_OWN[word]] = arguments[at + 1]
        elif at == 0 or arguments[at - 1] not in _OWN:
            rest.append(word)
    values["NIM_PASSTHROUGH_ARGS"] = shlex.join(rest)
    values["NIM_SERVER_PORT"] = "8000"
    return "".join(f"{name}={value}\n" for name, value in values.items())


def _script(d: Deployable) -> str:
    place, beside = d.placement(d.pool), d.replicas_per_node(d.pool)
    first = f"$((REPLICA % {beside} * {place.devices_per_node}))"
    model = (
        f'  --volume "${{MODELS:?where the model is}}:{shlex.quote("/" + d.model.split("/")[1])}:ro" \\\n'
        if d.is_path
        else ""
    )
    devices = (
        '  --gpus "\\"device=${MIG_UUID:?of the slice, from nvidia-smi -L}\\"" \\'
        if d.mig
        else f'  --gpus "\\"device=$(seq -s, {first} $(({first} + {place.devices_per_node - 1})))\\"" \\'
    )
    return f"""\
set -euo pipefail
REPLICA=${{1:-0}}
((REPLICA < {d.pool.replicas})) || {{ echo "usage: ./nim.sh REPLICA; {d.pool.replicas}, from 0" >&2; exit 2; }}
exec docker run --rm --name {d.name}-"$REPLICA" \\
{devices}
  --shm-size {(place.devices_per_node + 1)}g \\
  --env-file nim.env --env NGC_API_KEY --env HF_TOKEN \\
  --volume "${{LOCAL_NIM_CACHE:-$HOME/.cache/nim}}:/opt/nim/.cache" \\
{model}  --publish $((8000 + REPLICA % {beside})):8000 \\
  {shlex.quote(d.image or IMAGE)}
"""
