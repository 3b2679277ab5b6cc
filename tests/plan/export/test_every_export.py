"""Whatever is exported parses, is named properly, and asks for the devices of the plan, no more and no less."""

from __future__ import annotations

import itertools
import re
import subprocess

import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from shoal.core.layout import Layout
from shoal.plan.export import TARGETS, Deployable, Export, ExportError, export
from shoal.plan.export.deployable import MAX_NAME, Pool, is_label, label
from tests.plan.export.deployables import deployable, deployables, disaggregated, documents, exports, spanning
from tests.plan.export.schemas import gpus, pod_templates, require_valid

KUBERNETES = ("kubernetes", "lws", "dynamo")
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FEW
@given(deployables())
def test_every_export_parses_and_has_its_names(deployment: Deployable) -> None:
    for target, made in exports(deployment).items():
        assert made.files and made.target == target
        for document in documents(made):
            assert document
            if target in KUBERNETES:
                assert is_label(document["metadata"]["name"]), document["metadata"]["name"]
                assert document["metadata"]["namespace"] == deployment.namespace
                for key, value in document["metadata"]["labels"].items():
                    assert re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?", value), (key, value)
        for note in deployment.notes:
            assert note in made.warnings


@FEW
@given(deployables())
def test_devices_are_those_of_the_plan(deployment: Deployable) -> None:
    for target, made in exports(deployment).items():
        if target in KUBERNETES and deployment.is_gpu:
            assert requested(made) == deployment.num_devices
        for template in (t for d in documents(made) for t in pod_templates(d)):
            for container in template["spec"]["containers"]:
                asked = container["resources"]
                for name, value in asked["limits"].items():
                    assert asked["requests"][name] == value


def requested(made: Export) -> int:
    """Over all pods of all replicas."""
    total = 0
    for document in documents(made):
        spec = document.get("spec", {})
        if document["kind"] == "StatefulSet":
            total += spec["replicas"] * devices_of(spec["template"])
        elif document["kind"] == "LeaderWorkerSet":
            group = spec["leaderWorkerTemplate"]
            workers = (group["size"] - 1) * devices_of(group["workerTemplate"])
            total += spec["replicas"] * (devices_of(group["leaderTemplate"]) + workers)
        elif document["kind"] == "DynamoGraphDeployment":
            for component in spec["components"]:
                nodes = component.get("multinode", {}).get("nodeCount", 1)
                total += component["replicas"] * nodes * devices_of(component["podTemplate"])
    return total


def devices_of(template: dict[str, dict[str, list[dict[str, dict[str, dict[str, str]]]]]]) -> int:
    return sum(gpus(container["resources"]["limits"]) for container in template["spec"]["containers"])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(deployables())
def test_manifests_are_valid(deployment: Deployable) -> None:
    for target, made in exports(deployment).items():
        if target in KUBERNETES:
            for document in documents(made):
                require_valid(document)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(deployables())
def test_scripts_parse(deployment: Deployable) -> None:
    for made in exports(deployment).values():
        for name, text in made.files.items():
            if text.startswith("#!"):
                done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
                assert done.returncode == 0, f"{made.target}/{name}: {done.stderr}"


@pytest.mark.parametrize("target", TARGETS)
def test_the_same_deployment_gives_the_same_bytes(target: str) -> None:
    for deployment in (
        deployable(),
        spanning(),
        disaggregated(),
        deployable("4xL40S", pools=(Pool(layout=Layout(tp=2)),)),
    ):
        try:
            first = export(deployment, target)
        except ExportError:
            continue
        assert first == export(deployment, target)
        for text in first.files.values():
            assert text.endswith("\n") and "\t" not in text
            assert all(line == line.rstrip() for line in text.splitlines())


def test_what_a_target_cannot_have_is_refused_with_what_can() -> None:
    cases = {
        "kubernetes": (spanning(), "use --to lws"),
        "compose": (spanning(), "use --to kubernetes, lws, slurm or ray"),
        "nim": (spanning(), "use --to dynamo or vllm"),
        "slurm": (disaggregated(), "no separate prefill and decode pools"),
        "ray": (deployable(pools=(Pool(layout=Layout()),)), "runs beside the gateway"),
        "tensorrt-llm": (deployable(pools=(Pool(layout=Layout(tp=2, cp=2)),)), "no flag for context parallelism"),
        "lws": (deployable(dtype="float8"), "float8 is none of shoal's engine, which has float32, bfloat16, int8"),
    }
    for target, (deployment, said) in cases.items():
        with pytest.raises(ExportError, match=re.escape(said)):
            export(deployment, target)


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [("k8s", "kubernetes"), ("kubernets", "kubernetes"), ("trtllm", "tensorrt-llm"), ("vllms", "vllm"), ("", "nim")],
)
def test_an_unknown_target_names_the_nearest(asked: str, nearest: str) -> None:
    with pytest.raises(ExportError, match=f"nearest is {nearest}" if asked else "nearest is"):
        export(deployable(), asked)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "Llama_70B"}, "use llama-70b"),
        ({"namespace": "a.b"}, "use a-b"),
        ({"served_name": "a\nb"}, "served_name"),
        ({"max_replicas": 1}, "less than the 2 replicas"),
        ({"pools": (Pool(layout=Layout(dp=2)),)}, "layout.dp"),
        ({"pools": (Pool(layout=Layout(tp=16)),)}, "the cluster has no network"),
        ({"pools": (Pool(layout=Layout(), role="decode"),)}, "pools:"),
    ],
)
def test_parts_that_contradict_each_other(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ExportError, match=said):
        export(deployable(**changes), "kubernetes")  # type: ignore[arg-type]


def test_a_slice_is_one_rank() -> None:
    with pytest.raises(ExportError, match="MIG slice"):
        export(deployable("7xH100:1g.10gb", pools=(Pool(layout=Layout(tp=2)),)), "kubernetes")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("405B", "m-405b"),
        ("a" * 60, "a" * MAX_NAME),
        ("/models/x_y/", "x-y"),
        ("é", "m"),
    ],
)
def test_labels(text: str, found: str) -> None:
    assert label(text) == found and is_label(found)


def test_an_engine_is_split_evenly_over_as_few_nodes_as_can_be() -> None:
    for ranks, per_node in itertools.product((1, 2, 4, 6, 8, 12, 16, 24), (1, 4, 6, 8)):
        pool = Pool(layout=Layout(pp=ranks))
        place = deployable("8xH100", pools=(pool,), devices_per_node=per_node).placement(pool)
        assert place.nodes * place.devices_per_node == ranks and place.devices_per_node <= per_node
        assert all(ranks % more or more > per_node for more in range(place.devices_per_node + 1, ranks + 1))


def test_comments_say_what_was_lost() -> None:
    made = export(deployable(notes=("spares are left out.",), max_replicas=4), "compose")
    assert "spares are left out." in made.warnings
    for text in (made.files["compose.yaml"],):
        assert "# Note: spares are left out." in text and "max_replicas is left out" in text
        assert yaml.safe_load(text)["name"] == "llama"
