"""NVIDIA Dynamo on Kubernetes: a DynamoGraphDeployment whose workers are vLLM."""

from __future__ import annotations

import re
from typing import Any

from shoal.plan.export.cluster_objects import label_value
from shoal.plan.export.deployable import Deployable, Pool, shared_memory
from shoal.plan.export.document import Export, documents
from shoal.plan.export.pods import environment, model_mount, model_volume, quantity, rdma_pod, resources, scheduling
from shoal.plan.export.shoal_files import head
from shoal.plan.export.vllm_arguments import kv_transfer, vllm_arguments, vllm_warnings

TARGET = "dynamo"
RUNTIME = "1.4.0"
IMAGE = f"nvcr.io/nvidia/ai-dynamo/vllm-runtime:{RUNTIME}"
_MAIN = "main"
"""The container that the operator adds its own settings to."""


def export(d: Deployable) -> Export:
    warnings = vllm_warnings(d)
    if d.device.vendor != "nvidia" and d.image is None:
        warnings.append(f"the usual image is for NVIDIA's devices: give --image one for {d.device.name}.")
    if d.serving or d.gateway:
        warnings.append(
            "settings of shoal's gateway (routing, limits, tenants, ...) have no counterpart and are left out."
        )
    if d.max_replicas is not None:
        warnings.append(
            "workers get a scaling adapter; what drives it (HPA, KEDA, Dynamo's planner) is not here: it scales "
            f"the DynamoGraphDeploymentScalingAdapter up to {d.max_replicas}."
        )
    graph = {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": d.name, "namespace": d.namespace, "labels": _labels(d)},
        "spec": {
            "backendFramework": "vllm",
            **({"priorityClassName": d.priority_class} if d.priority_class is not None else {}),
            "components": [_frontend(d), *(_worker(d, pool) for pool in d.pools)],
        },
    }
    steps = [
        f"For Dynamo {RUNTIME}, whose operator adds probes, ports and services. HF_TOKEN comes from a secret:",
        f"  kubectl --namespace {d.namespace} create secret generic {d.name}-hub --from-literal=HF_TOKEN=...",
        f"The model: a claim {d.model_claim}.",
    ]
    text = documents(head(d, TARGET, warnings, steps), [("", graph)])
    return Export(target=TARGET, files={f"{d.name}.yaml": text}, warnings=tuple(warnings))


def _labels(d: Deployable) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": label_value(d.served_name) or d.name,
        "app.kubernetes.io/instance": d.name,
        "app.kubernetes.io/part-of": d.name,
        "app.kubernetes.io/managed-by": "shoal-export",
    }


def _override(d: Deployable) -> dict[str, str]:
    """The operator wants to know the runtime's version where the image's tag is none."""
    tag = (d.image or IMAGE).rpartition(":")[2]
    return {} if re.fullmatch(r"v?\d+\.\d+\.\d+", tag) else {"runtimeVersionOverride": RUNTIME}


def _frontend(d: Deployable) -> dict[str, Any]:
    container = {
        "name": _MAIN,
        "image": d.image or IMAGE,
        "resources": {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "4Gi"}},
        "volumeMounts": [model_mount(d)],
    }
    pod = {"containers": [container], "volumes": [model_volume(d)]}
    return {
        "name": "Frontend",
        "type": "frontend",
        **_override(d),
        "replicas": d.gateways,
        "podTemplate": {"metadata": {"labels": _labels(d)}, "spec": pod},
    }


def _worker(d: Deployable, pool: Pool) -> dict[str, Any]:
    place = d.placement(pool)
    arguments = ["--model", d.model, "--served-model-name", d.served_name, *vllm_arguments(d, pool)]
    if pool.role != "serve":
        arguments += ["--disaggregation-mode", pool.role, *kv_transfer()]
    rdma = rdma_pod(d, pool)
    container: dict[str, Any] = {
        "name": _MAIN,
        "image": d.image or IMAGE,
        "command": ["python3", "-m", "dynamo.vllm"],
        "args": arguments,
        "env": environment(d),
        "envFrom": [{"secretRef": {"name": f"{d.name}-hub", "optional": True}}],
        "resources": resources(d, place.devices_per_node, rdma=rdma),
        "volumeMounts": [model_mount(d)],
    }
    if rdma:
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    placing = scheduling(d, pool.role, devices=place.devices_per_node)
    placing.pop("priorityClassName", None)  # of the graph
    pod = {
        **placing,
        "terminationGracePeriodSeconds": int(d.drain_seconds) + 35,
        "containers": [container],
        "volumes": [model_volume(d)],
    }
    component: dict[str, Any] = {
        "name": {"serve": "Worker", "prefill": "PrefillWorker", "decode": "DecodeWorker"}[pool.role],
        "type": {"serve": "worker"}.get(pool.role, pool.role),
        **_override(d),
        "replicas": pool.replicas,
    }
    if place.nodes > 1:
        component["multinode"] = {"nodeCount": place.nodes}
    component["sharedMemorySize"] = quantity(shared_memory(d, place.devices_per_node))
    if d.max_replicas is not None and d.max_replicas > pool.replicas:
        component["scalingAdapter"] = {}
    return {**component, "podTemplate": {"metadata": {"labels": _labels(d)}, "spec": pod}}
