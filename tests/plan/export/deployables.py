"""Deployments to export: a few by hand, and every kind by hypothesis."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import strategies as st

from shoal.core.layout import Layout
from shoal.plan import catalogue
from shoal.plan.export import TARGETS, Deployable, Export, ExportError, export
from shoal.plan.export.deployable import Pool, with_cluster

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
CLUSTERS = (
    "8xH100",
    "2x8xH100:ndr",
    "4x8xH200:efa",
    "8xMI300X",
    "4xL40S",
    "7xH100:1g.10gb",
    "4xcpu",
    "4x8xMI300X:roce",
)


def deployable(cluster: str = "8xH100", *, pools: tuple[Pool, ...] = (), **changes: Any) -> Deployable:
    values: dict[str, Any] = {
        "name": "llama",
        "model": "/models/llama-70b",
        "served_name": "llama-70b",
        "pools": pools or (Pool(layout=Layout(tp=4), replicas=2),),
        "max_len": 8192,
    }
    return Deployable(**(values | with_cluster(catalogue.cluster(cluster)) | changes))


def spanning(**changes: Any) -> Deployable:
    return deployable("4x8xH100:ndr", pools=(Pool(layout=Layout(tp=8, pp=2), replicas=2),), **changes)


def disaggregated(**changes: Any) -> Deployable:
    pools = (
        Pool(layout=Layout(tp=2), replicas=3, role="prefill"),
        Pool(layout=Layout(tp=4), replicas=2, role="decode"),
    )
    return deployable("4x8xH100:ndr", pools=pools, **changes)


def documents(made: Export) -> list[dict[str, Any]]:
    """Of all its YAML files."""
    texts = [text for name, text in made.files.items() if name.endswith(".yaml")]
    return [document for text in texts for document in yaml.load_all(text, _Loader)]


def of_kind(made: Export, kind: str, name: str | None = None) -> dict[str, Any]:
    (found,) = [
        document
        for document in documents(made)
        if document.get("kind") == kind and name in (None, document["metadata"]["name"])
    ]
    return found


def exports(deployment: Deployable) -> dict[str, Export]:
    """Of all targets that can have it."""
    found = {}
    for target in TARGETS:
        try:
            found[target] = export(deployment, target)
        except ExportError:
            continue
    return found


_SIZES = st.sampled_from([1, 2, 4, 8])
_NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=40).filter(
    lambda text: text[0].isalpha() and text[-1] != "-"
)
_TEXTS = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=60)
_LAYOUTS = st.builds(
    Layout, tp=_SIZES, pp=st.sampled_from([1, 2, 3]), ep=st.sampled_from([1, 2]), cp=st.sampled_from([1, 2])
)


@st.composite
def deployables(draw: st.DrawFn) -> Deployable:
    """Also those that many targets refuse; the parts always fit each other."""
    cluster = catalogue.cluster(draw(st.sampled_from(CLUSTERS)))
    sliced = ":" in cluster.device.name
    layouts = st.just(Layout()) if sliced else _LAYOUTS
    replicas = st.integers(1, 4)
    if draw(st.booleans()) and not sliced:
        pools = tuple(Pool(layout=draw(layouts), replicas=draw(replicas), role=role) for role in ("prefill", "decode"))
        more = None
    else:
        groups = 1 if sliced else draw(st.sampled_from([1, 1, 2]))
        pools = (Pool(layout=draw(layouts), replicas=draw(replicas), attention_dp=groups),)
        more = draw(st.none() | st.integers(pools[0].replicas, 8))
    values: dict[str, Any] = with_cluster(cluster)
    if cluster.network is None and any(p.ranks > cluster.devices_per_node for p in pools):
        values["network"] = catalogue.link("infiniband-ndr")
    return Deployable(
        name=draw(_NAMES),
        model=draw(st.sampled_from(["/models/m", "org/model", "/m/a b'c", "smollm2-135m"])),
        served_name=draw(_TEXTS),
        pools=pools,
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16", "float8", "int8", "int4", "float4"])),
        kv_dtype=draw(st.sampled_from(["auto", "float32", "bfloat16", "float8", "int8"])),
        max_len=draw(st.none() | st.integers(1, 1 << 20)),
        max_sequences=draw(st.integers(1, 1024)),
        max_batch_tokens=draw(st.integers(1, 16384)),
        prefix_caching=draw(st.booleans()),
        kv_cache_bytes=draw(st.none() | st.integers(1, 1 << 40)),
        namespace=draw(_NAMES),
        max_replicas=more,
        scaling=draw(st.sampled_from(["keda", "hpa"])),
        priority_class=draw(st.none() | st.just("serving")),
        topology_key=draw(st.none() | st.just("example.com/rack")),
        notes=tuple(draw(st.lists(_TEXTS, max_size=2))),
        **values,
    )
