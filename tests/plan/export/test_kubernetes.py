"""What manifests say beyond being valid: probes that exist, secrets that are made, scaling on a metric there is."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from shoal.core import metrics
from shoal.core.layout import Layout
from shoal.plan.export import Deployable, export
from shoal.plan.export.deployable import Pool
from shoal.serve.access import ROUTES
from tests.plan.export.deployables import deployable, disaggregated, documents, of_kind, spanning
from tests.plan.export.schemas import labels_of, pod_templates, require_valid


@pytest.fixture(params=["kubernetes", "lws"])
def manifests(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    deployment = deployable(max_replicas=4) if request.param == "kubernetes" else spanning(max_replicas=3)
    return documents(export(deployment, request.param))


def containers(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [c for document in manifests for t in pod_templates(document) for c in t["spec"]["containers"]]


def test_the_schemas_catch_what_is_wrong() -> None:
    good = of_kind(export(deployable(), "kubernetes"), "StatefulSet")
    require_valid(good)
    bad = {**good, "spec": {**good["spec"], "replica": 2}}
    with pytest.raises(Exception, match="replica"):
        require_valid(bad)
    group = of_kind(export(spanning(), "lws"), "LeaderWorkerSet")
    require_valid(group)
    with pytest.raises(Exception, match="sizes"):
        require_valid({**group, "spec": {**group["spec"], "sizes": 2}})
    group["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["container"] = []
    with pytest.raises(Exception, match="container"):
        require_valid(group)


def test_probes_ask_for_routes_that_there_are(manifests: list[dict[str, Any]]) -> None:
    probed = [container for container in containers(manifests) if "startupProbe" in container]
    assert len(probed) == 2  # of an engine (or its leader) and of the gateway
    for container in probed:
        for probe in ("startupProbe", "livenessProbe"):
            get = container[probe]["httpGet"]
            assert ROUTES[("GET", get["path"])] == ()  # open: the kubelet has no key
            assert get["port"] in [port["name"] for port in container["ports"]]
        *_, address, key = container["readinessProbe"]["exec"]["command"]
        assert ROUTES[("GET", re.sub("http://[^/]+", "", address))]
        assert key.rpartition("/")[0] in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_everything_that_is_mounted_is_there(manifests: list[dict[str, Any]]) -> None:
    maps = {d["metadata"]["name"]: d["data"] for d in manifests if d["kind"] == "ConfigMap"}
    for template in (t for document in manifests for t in pod_templates(document)):
        spec = template["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for container in [*spec["initContainers"], *spec["containers"]]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
        file = spec["initContainers"][0]["command"][3].rpartition("/")[2]
        assert file in maps[volumes["config"]["configMap"]["name"]]
        assert any(word.endswith(file) for word in spec["containers"][0]["args"])


def test_secrets_are_those_that_the_head_makes() -> None:
    for target, deployment in (("kubernetes", deployable()), ("lws", spanning())):
        made = export(deployment, target)
        (text,) = made.files.values()
        head = text.partition("---")[0]
        created = set(re.findall(r"--from-(?:file|literal)=([\w.-]+)", head))
        wanted = {
            item["key"]
            for document in documents(made)
            for template in pod_templates(document)
            for volume in template["spec"]["volumes"]
            for item in volume.get("secret", {}).get("items", [])
        }
        assert wanted == created
        assert f"create secret generic {deployment.name}-keys" in head


def test_no_secret_is_in_a_manifest(manifests: list[dict[str, Any]]) -> None:
    assert not [document for document in manifests if document["kind"] == "Secret"]
    for document in manifests:
        if document["kind"] == "ConfigMap":
            (text,) = document["data"].values()
            assert set(re.findall(r"api_key: (.*)", text)) == {"'@ENGINE_KEY@'"}


def test_pods_are_confined(manifests: list[dict[str, Any]]) -> None:
    for template in (t for document in manifests for t in pod_templates(document)):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        assert spec["automountServiceAccountToken"] is False
        for container in [*spec["initContainers"], *spec["containers"]]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
            assert security["capabilities"]["drop"] == ["ALL"]


def test_labels_and_selectors(manifests: list[dict[str, Any]]) -> None:
    for document in manifests:
        labels = labels_of(document)
        assert labels["app.kubernetes.io/name"] == "shoal"
        assert labels["app.kubernetes.io/instance"] == "llama"
        assert labels["app.kubernetes.io/component"] in ("engine", "gateway")
    pods = [t["metadata"]["labels"] for document in manifests for t in pod_templates(document)]
    for document in manifests:
        if document["kind"] in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
            spec = document["spec"]
            chosen = spec.get(
                "podSelector", spec["selector"] if document["kind"] == "Service" else spec.get("selector")
            )
            wanted = chosen.get("matchLabels", chosen)
            assert [labels for labels in pods if wanted.items() <= labels.items()], document["metadata"]["name"]


def test_kinds_that_operators_expect(manifests: list[dict[str, Any]]) -> None:
    kinds = [document["kind"] for document in manifests]
    assert kinds.count("PodDisruptionBudget") == kinds.count("NetworkPolicy") == 2
    assert {"Service", "Deployment", "ScaledObject", "ServiceMonitor", "ConfigMap"} <= set(kinds)


def test_scaling_asks_for_metrics_that_there_are(manifests: list[dict[str, Any]]) -> None:
    (scaled,) = [document for document in manifests if document["kind"] == "ScaledObject"]
    query = scaled["spec"]["triggers"][0]["metadata"]["query"]
    asked = set(re.findall(r"shoal:\w+", query))
    assert asked == {metrics.FLEET_WAITING.name, metrics.FLEET_RUNNING.name}
    assert set(re.findall(r"(\w+)=", query)) - {"namespace", "service"} <= set(metrics.FLEET_WAITING.labels)
    target = scaled["spec"]["scaleTargetRef"]
    assert [d for d in manifests if (d["kind"], d["metadata"]["name"]) == (target["kind"], target["name"])]


def test_the_gateway_knows_every_engine_that_there_may_be(manifests: list[dict[str, Any]]) -> None:
    (scaled,) = [document for document in manifests if document["kind"] == "ScaledObject"]
    gateway = next(d for d in manifests if d["kind"] == "ConfigMap" and d["metadata"]["name"] == "llama-gateway")
    endpoints = yaml.safe_load(gateway["data"]["gateway.yaml"])["models"][0]["endpoints"]
    assert len(endpoints) == scaled["spec"]["maxReplicaCount"]
    first, second = (endpoint["openai"] for endpoint in endpoints[:2])
    assert first == "http://llama-engine-0.llama-engine.default.svc:8000" and "llama-engine-1." in second


def test_hpa_where_there_is_no_keda() -> None:
    made = export(deployable(max_replicas=3, scaling="hpa"), "kubernetes")
    scaler = of_kind(made, "HorizontalPodAutoscaler")
    require_valid(scaler)
    assert (scaler["spec"]["minReplicas"], scaler["spec"]["maxReplicas"]) == (2, 3)
    assert not [document for document in documents(made) if document["kind"] == "ScaledObject"]


@pytest.mark.parametrize("most", [None, 2])
def test_without_room_to_grow_nothing_scales(most: int | None) -> None:
    kinds = {document["kind"] for document in documents(export(deployable(max_replicas=most), "kubernetes"))}
    assert not kinds & {"ScaledObject", "HorizontalPodAutoscaler", "ServiceMonitor"}


def limits(deployment: Deployable, target: str) -> dict[str, str]:
    kind = {"kubernetes": "StatefulSet", "lws": "LeaderWorkerSet", "dynamo": "DynamoGraphDeployment"}[target]
    template = pod_templates(of_kind(export(deployment, target), kind))[-1]
    found: dict[str, str] = template["spec"]["containers"][0]["resources"]["limits"]
    return found


@pytest.mark.parametrize(
    ("cluster", "resource", "count"),
    [
        ("8xH100", "nvidia.com/gpu", "4"),
        ("8xMI300X", "amd.com/gpu", "4"),
        ("4xcpu", None, None),
    ],
)
def test_devices_by_vendor(cluster: str, resource: str | None, count: str | None) -> None:
    asked = limits(deployable(cluster, pools=(Pool(layout=Layout(tp=4)),), dtype="bfloat16"), "kubernetes")
    assert asked.get(resource or "") == count
    assert set(asked) == {"memory"} | ({resource} if resource else set())


def test_slices_of_a_device() -> None:
    deployment = deployable("7xH100:1g.10gb", pools=(Pool(layout=Layout(), replicas=7),))
    assert limits(deployment, "kubernetes")["nvidia.com/mig-1g.10gb"] == "1"
    assert deployment.num_devices == 7


@pytest.mark.parametrize(
    ("cluster", "resource", "count"),
    [
        ("4x8xH100:ndr", "rdma/hca", "1"),
        ("4x8xH200:efa", "vpc.amazonaws.com/efa", "4"),
        ("4x8xMI300X:tcp-100", None, None),
    ],
)
def test_rdma(cluster: str, resource: str | None, count: str | None) -> None:
    deployment = deployable(cluster, pools=(Pool(layout=Layout(tp=8, pp=2)),))
    made = export(deployment, "lws")
    for template in pod_templates(of_kind(made, "LeaderWorkerSet")):
        (container,) = template["spec"]["containers"]
        assert container["resources"]["limits"].get(resource or "") == count
        pinned = container["securityContext"]["capabilities"].get("add") == ["IPC_LOCK"]
        assert pinned == (resource is not None)
    assert bool([w for w in made.warnings if "no RDMA" in w]) == (resource is None)


def test_a_group_is_a_pod_a_node_and_meets_at_its_leader() -> None:
    group = of_kind(export(spanning(), "lws"), "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    assert group["size"] == 2 and group["restartPolicy"] == "RecreateGroupOnPodRestart"
    leader, worker = (group[f"{role}Template"]["spec"] for role in ("leader", "worker"))
    for pod in (leader, worker):
        (container,) = pod["containers"]
        assert "--nproc-per-node=8" in container["args"] and "--nnodes=$(LWS_GROUP_SIZE)" in container["args"]
        assert {"--node-rank=$(LWS_WORKER_INDEX)", "--master-addr=$(LWS_LEADER_ADDRESS)"} <= set(container["args"])
        (term,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["topologyKey"] == "kubernetes.io/hostname"
    assert "startupProbe" in leader["containers"][0] and "startupProbe" not in worker["containers"][0]


def test_hooks_for_scheduling() -> None:
    deployment = spanning(priority_class="serving", topology_key="example.com/rack", node_selector={"pool": "h100"})
    group = of_kind(export(deployment, "lws"), "LeaderWorkerSet")
    assert group["metadata"]["annotations"]["leaderworkerset.sigs.k8s.io/exclusive-topology"] == "example.com/rack"
    for template in pod_templates(group):
        assert template["spec"]["priorityClassName"] == "serving"
        assert template["spec"]["nodeSelector"] == {"pool": "h100"}


def test_shared_memory_is_in_memory_and_counted() -> None:
    engines = of_kind(export(deployable(shared_memory_bytes=3 << 30), "kubernetes"), "StatefulSet")
    volumes = {volume["name"]: volume for volume in engines["spec"]["template"]["spec"]["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "3Gi"}


@pytest.mark.parametrize(("model", "mounted"), [("/data/llama/70b", "/data"), ("org/llama", "/models")])
def test_the_model_is_read_from_its_volume_or_fetched_into_it(model: str, mounted: str) -> None:
    engines = of_kind(export(deployable(model=model, claim="weights"), "kubernetes"), "StatefulSet")
    pod = engines["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "models"]
    is_path = model.startswith("/")
    assert mount["mountPath"] == mounted and mount.get("readOnly", False) == is_path
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert variables.get("HF_HOME", mounted).startswith(mounted) and ("HF_HOME" in variables) != is_path
    policy = of_kind(export(deployable(model=model), "kubernetes"), "NetworkPolicy", "llama-engine")
    ports = [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]]
    assert (443 in ports) != is_path  # the hub


def test_dynamo_has_a_component_a_pool() -> None:
    made = export(disaggregated(), "dynamo")
    graph = of_kind(made, "DynamoGraphDeployment")
    components = {component["type"]: component for component in graph["spec"]["components"]}
    assert set(components) == {"frontend", "prefill", "decode"}
    for role, replicas in (("prefill", 3), ("decode", 2)):
        (container,) = components[role]["podTemplate"]["spec"]["containers"]
        assert components[role]["replicas"] == replicas
        assert container["args"][container["args"].index("--disaggregation-mode") + 1] == role
    wide = of_kind(export(spanning(), "dynamo"), "DynamoGraphDeployment")["spec"]["components"][1]
    assert wide["multinode"] == {"nodeCount": 2}
    assert limits(spanning(), "dynamo")["nvidia.com/gpu"] == "8"


def test_an_image_without_a_version_is_told_its_runtime() -> None:
    (frontend, worker) = of_kind(export(deployable(image="me/dynamo:mine"), "dynamo"), "DynamoGraphDeployment")["spec"][
        "components"
    ]
    assert frontend["runtimeVersionOverride"] == worker["runtimeVersionOverride"] == "1.4.0"
