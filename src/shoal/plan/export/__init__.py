"""Exporters: a deployment in the dialect of whoever runs it. One module a target; they do not know each other."""

from __future__ import annotations

import importlib
from difflib import get_close_matches

from shoal.plan.export.deployable import Deployable, ExportError, require
from shoal.plan.export.document import Export

TARGETS: dict[str, tuple[str, str]] = {
    "kubernetes": ("kubernetes", "shoal: a StatefulSet of engines behind a gateway, one pod an engine"),
    "lws": ("lws", "shoal: a LeaderWorkerSet of engines that span nodes, behind a gateway"),
    "slurm": ("slurm", "shoal: one sbatch script, a task a rank, with the gateway"),
    "ray": ("ray", "shoal: a Ray cluster, in which engines have their ranks placed"),
    "compose": ("compose", "shoal: Docker Compose on one machine"),
    "vllm": ("vllm", "vllm serve commands, with shoal's gateway or vllm-router in front"),
    "sglang": ("sglang", "SGLang commands, with shoal's gateway or its router in front"),
    "tensorrt-llm": ("tensorrt_llm", "trtllm-serve commands and their YAML"),
    "nim": ("nim", "environment and docker command of NVIDIA NIM"),
    "dynamo": ("dynamo", "NVIDIA Dynamo: a DynamoGraphDeployment of vLLM workers"),
}
"""By name: the module, and what it writes."""

__all__ = ["TARGETS", "Deployable", "Export", "ExportError", "export"]


def export(deployable: Deployable, target: str) -> Export:
    """Raises ExportError for a target that there is not, and for what it cannot have."""
    if target not in TARGETS:
        near = get_close_matches(target.lower(), [*TARGETS, *_OTHER_NAMES], n=1, cutoff=0.0)[0]
        raise ExportError(
            f"--to: there is no target {target!r}; the nearest is {_OTHER_NAMES.get(near, near)}, and there are "
            f"{', '.join(TARGETS)}"
        )
    require(deployable)
    module = importlib.import_module(f"shoal.plan.export.{TARGETS[target][0]}")
    found: Export = module.export(deployable)
    return found


_OTHER_NAMES = {
    "k8s": "kubernetes",
    "leaderworkerset": "lws",
    "sbatch": "slurm",
    "docker": "compose",
    "docker-compose": "compose",
    "trtllm": "tensorrt-llm",
    "trt-llm": "tensorrt-llm",
}
