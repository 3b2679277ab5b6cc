"""Published schemas: of Kubernetes' own kinds from `kubernetes-validate`, of others from crds.json beside this."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

VERSION = "1.34"
CRDS = json.loads((Path(__file__).parent / "crds.json").read_text(encoding="utf-8"))


def require_valid(document: dict[str, Any]) -> None:
    """Strictly: a field that there is not is an error. Pods inside of other kinds are looked at, too."""
    kind = document["kind"]
    if kind in CRDS:
        jsonschema.validate(document, CRDS[kind])
        for pod in pod_templates(document):
            _core({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": pod["spec"]})
    else:
        _core(document)


def _core(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, VERSION, strict=True)


def pod_templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Every pod template, wherever in a document."""
    found: list[dict[str, Any]] = []
    if isinstance(document, dict):
        spec = document.get("spec")
        if isinstance(spec, dict) and isinstance(spec.get("containers"), list):
            found.append(document)
        else:
            for value in document.values():
                found += pod_templates(value)
    elif isinstance(document, list):
        for value in document:
            found += pod_templates(value)
    return found


def gpus(resources: dict[str, str]) -> int:
    names = ("nvidia.com/gpu", "amd.com/gpu", "nvidia.com/mig-")
    return sum(int(count) for name, count in resources.items() if name.startswith(names))


def labels_of(document: dict[str, Any]) -> dict[str, str]:
    return document["metadata"]["labels"]
