"""Objects beside the pods, which targets on Kubernetes share: the gateway, services, budgets, policies, scaling."""

from __future__ import annotations

from typing import Any

from shoal.plan.export.deployable import Deployable
from shoal.plan.export.document import to_yaml
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
    scheduling,
    selector,
    spread,
    volumes,
)
from shoal.plan.export.shoal_files import IMAGE, PORT, gateway_file

_LOAD = 0.8
"""Of the sequences that an engine runs at once, what an autoscaler aims at: the rest is for bursts until it is up."""
Part = tuple[str, dict[str, Any]]
"""Why it is there, and the object."""


def config_map(d: Deployable, name: str, component: str, files: dict[str, Any]) -> dict[str, Any]:
    data = {file: to_yaml(content) for file, content in files.items()}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(d, name, component), "data": data}


def service(d: Deployable, name: str, component: str, *, headless: bool = False) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "selector": selector(d, component),
        "ports": [{"name": "http", "port": PORT, "targetPort": "http", "protocol": "TCP"}],
    }
    if headless:
        # Whether an engine is of use the gateway finds out itself, and better than a probe does.
        spec = {"clusterIP": "None", "publishNotReadyAddresses": True, **spec}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata(d, name, component), "spec": spec}


def gateway(d: Deployable, addresses: list[str]) -> list[Part]:
    """The front: its file, its pods and their service."""
    image, name = d.image or IMAGE, f"{d.name}-gateway"
    file = gateway_file(d, addresses, f"{SECRETS}/keys.json", f"{SECRETS}/cluster-secret")
    container = {
        "name": "shoal",
        "image": image,
        "args": ["serve", "--deployment", f"{RUN}/gateway.yaml"],
        "command": ["shoal"],
        "env": environment(d),
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": {"requests": {"cpu": "2", "memory": "2Gi"}, "limits": {"memory": "2Gi"}},
        "securityContext": container_security(),
        "lifecycle": LINGER,
        **probes(d, "probe-key", 300),
        "volumeMounts": mounts(d, 0),
    }
    items = ["engine-key", "probe-key", "keys.json", "cluster-secret"]
    pod = {
        **pod_basics(d),
        **spread(d, "gateway"),
        **scheduling(d, "gateway", devices=0),
        "initContainers": [fill_in(d, image, "gateway.yaml")],
        "containers": [container],
        "volumes": volumes(d, name, items, 0),
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(d, name, "gateway"),
        "spec": {
            "replicas": d.gateways,
            "selector": {"matchLabels": selector(d, "gateway")},
            "strategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": {"metadata": {"labels": labels(d, "gateway")}, "spec": pod},
        },
    }
    return [
        ("What the gateway serves. Engines that are not there yet are tried again until they are.",
         config_map(d, name, "gateway", {"gateway.yaml": file})),
        ("", deployment),
        ("Where clients go.", service(d, d.name, "gateway")),
        ("", disruption_budget(d, "gateway")),
        ("Clients may come from anywhere in the cluster: narrow `from` to those that should.", gateway_policy(d)),
    ]  # fmt: skip


def disruption_budget(d: Deployable, component: str) -> dict[str, Any]:
    """Drains of nodes take one pod after another."""
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": selector(d, component)}}
    name = f"{d.name}-{component}"
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(d, name, component),
        "spec": spec,
    }


def _policy(d: Deployable, component: str, ingress: list[Any], egress: list[Any]) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(d, f"{d.name}-{component}", component),
        "spec": {
            "podSelector": {"matchLabels": selector(d, component)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            "egress": egress,
        },
    }


def _to_http() -> list[dict[str, Any]]:
    return [{"protocol": "TCP", "port": PORT}]


def _outside(d: Deployable) -> list[Any]:
    """Names, and the hub where the model is fetched from it."""
    kube_dns = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}
    found: list[Any] = [{"to": [kube_dns], "ports": [{"protocol": p, "port": 53} for p in ("UDP", "TCP")]}]
    if not d.is_path:
        found.append({"ports": [{"protocol": "TCP", "port": 443}]})
    return found


def gateway_policy(d: Deployable) -> dict[str, Any]:
    anywhere = {"from": [{"namespaceSelector": {}}], "ports": _to_http()}
    engines = {"to": [{"podSelector": {"matchLabels": selector(d, "engine")}}], "ports": _to_http()}
    return _policy(d, "gateway", [anywhere], [engines, *_outside(d)])


def engine_policy(d: Deployable) -> dict[str, Any]:
    """Only the gateway asks engines. Ranks of one engine choose their ports, so among themselves all are open. RDMA
    passes by network policies altogether."""
    pods = {"podSelector": {"matchLabels": selector(d, "gateway")}}
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": d.monitoring_namespace}}}
    ingress: list[Any] = [{"from": [pods, monitoring], "ports": _to_http()}]
    egress: list[Any] = []
    if d.spans_nodes:
        siblings = {"podSelector": {"matchLabels": selector(d, "engine")}}
        ingress.append({"from": [siblings]})
        egress.append({"to": [siblings]})
    return _policy(d, "engine", ingress, [*egress, *_outside(d)])


def autoscaling(d: Deployable, target: dict[str, str]) -> list[Part]:
    """Nothing unless more replicas are allowed than there are. What scales is the load of the queue and of the engines
    together: the queue alone would forget what the running engines hold."""
    least = d.pool.replicas
    if d.max_replicas is None or d.max_replicas <= least:
        return []
    threshold = max(1, int(d.max_sequences * _LOAD))
    name = d.served_name.replace("\\", "\\\\").replace('"', '\\"')
    where = f'{{namespace="{d.namespace}",service="{d.name}",model="{name}"}}'
    query = f"sum(shoal:fleet_requests_waiting{where}) + sum(shoal:fleet_requests_running{where})"
    behaviour = {
        "scaleUp": {"stabilizationWindowSeconds": 30, "policies": [{"type": "Pods", "value": 2, "periodSeconds": 60}]},
        "scaleDown": {
            "stabilizationWindowSeconds": 600,
            "policies": [{"type": "Pods", "value": 1, "periodSeconds": 300}],
        },
    }
    parts: list[Part] = [("Needs the Prometheus operator. The key is the one of scope `metrics`.", _monitor(d))]
    bounds = {"minReplicaCount": least, "maxReplicaCount": d.max_replicas}
    if d.scaling == "keda":
        trigger = {
            "type": "prometheus",
            "metricType": "AverageValue",
            "metadata": {"serverAddress": d.prometheus, "query": query, "threshold": str(threshold)},
        }
        spec: dict[str, Any] = {
            "scaleTargetRef": target,
            "pollingInterval": 15,
            **bounds,
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behaviour}},
            "triggers": [trigger],
        }
        scaled = {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject"}
        why = f"{threshold} requests an engine, in the queue or running: 80% of max_sequences."
        return [*parts, (why, {**scaled, "metadata": metadata(d, f"{d.name}-engine", "engine"), "spec": spec})]
    metric = {
        "type": "External",
        "external": {
            "metric": {"name": "shoal_fleet_load", "selector": {"matchLabels": {"model": label_value(d.served_name)}}},
            "target": {"type": "AverageValue", "averageValue": str(threshold)},
        },
    }
    spec = {
        "scaleTargetRef": target,
        "minReplicas": least,
        "maxReplicas": d.max_replicas,
        "metrics": [metric],
        "behavior": behaviour,
    }
    why = f"shoal_fleet_load is the metrics adapter's to serve, from: {query}"
    scaler = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler"}
    return [*parts, (why, {**scaler, "metadata": metadata(d, f"{d.name}-engine", "engine"), "spec": spec})]


def label_value(text: str) -> str:
    """Labels have no slash, and at most 63 characters."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in text)
    return plain[:63].strip("-_.")


def _monitor(d: Deployable) -> dict[str, Any]:
    credentials = {"name": f"{d.name}-keys", "key": "probe-key"}
    endpoint = {"port": "http", "path": "/metrics", "interval": "15s"}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "ServiceMonitor",
        "metadata": metadata(d, f"{d.name}-gateway", "gateway"),
        "spec": {
            "selector": {"matchLabels": selector(d, "gateway")},
            "endpoints": [{**endpoint, "authorization": {"credentials": credentials}}],
        },
    }


def secret_steps(d: Deployable, *, ranks: bool) -> list[str]:
    """The commands that make what the pods mount, as comments: secrets are not written into files here."""
    drawn = ["engine-key", "cluster-secret", *(["rank-secret"] if ranks else [])]
    literals = [f"    --from-literal={name}=$(openssl rand -hex 32)" for name in drawn]
    mounted = f"/{d.model.split('/')[1]}" if d.is_path else "/models"
    return [
        "Its secret, once; `probe-key` is what the second command prints:",
        "  shoal keys create --tenant default --file keys.json",
        "  shoal keys create --tenant ops --scope metrics --file keys.json",
        f"  kubectl --namespace {d.namespace} create secret generic {d.name}-keys \\",
        "    --from-file=keys.json --from-literal=probe-key=PRINTED_ABOVE \\",
        *(f"{literal} \\" for literal in literals[:-1]),
        literals[-1],
        f"The model: a claim {d.model_claim}, which the pods mount at {mounted}"
        + (" and only read." if d.is_path else " and fetch the model into: ReadWriteMany."),
    ]
