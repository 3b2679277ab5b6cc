"""The deployment file that `shoal serve --deployment` takes, of a setup; or why serve cannot run it yet."""

from __future__ import annotations

from typing import Any

import yaml

from shoal.core.cost.types import CachePrecision, WeightPrecision
from shoal.core.hardware import Cluster
from shoal.plan.setups import Pool, Setup

WEIGHTS: tuple[WeightPrecision, ...] = ("float32", "bfloat16", "int8")
CACHES: tuple[CachePrecision, ...] = ("float32", "bfloat16", "float8", "int8")
"""That the engine keeps. A test compares them with its configuration."""


class NotServable(ValueError):
    """The message names what serve cannot do and what would."""


def check(setup: Setup) -> Pool:
    """The one pool of a setup that serve can run. Raises NotServable."""
    if len(setup.pools) > 1:
        raise NotServable(
            f"shoal serve has no prefill and decode pools yet, and this plan is {setup}; plan with --no-pools"
        )
    pool = setup.pools[0]
    engine = pool.engine
    if engine.weights not in WEIGHTS:
        near = "int8" if engine.weights.startswith("float8") else "bfloat16"
        raise NotServable(
            f"shoal serve keeps weights in {', '.join(WEIGHTS)}, and this plan has {engine.weights};"
            f" plan with --precision {near}, or give the plan to another engine with shoal export"
        )
    if engine.shape.attention_dp > 1:
        raise NotServable(
            f"shoal serve has no attention-dp, and this plan is {engine.shape};"
            " plan with --no-attention-dp, or give the plan to another engine with shoal export"
        )
    return pool


def deployment(setup: Setup, cluster: Cluster, *, name: str, model: str, max_len: int) -> dict[str, Any]:
    """As the loader of `shoal serve --deployment` reads it. Raises NotServable."""
    pool = check(setup)
    engine, shape = pool.engine, pool.engine.shape
    entry: dict[str, Any] = {"name": name, "model": model, "replicas": pool.replicas, "dtype": engine.weights}
    entry["kv_dtype"] = engine.cache
    entry["device"] = "cpu" if cluster.device.vendor == "cpu" else "cuda"
    if entry["device"] == "cpu" and engine.cache in ("float8", "int8"):
        raise NotServable(f"shoal serve keeps KV in {engine.cache} on GPUs alone; plan with --kv bfloat16")
    layout = {axis: getattr(shape, axis) for axis in ("tp", "pp", "ep", "cp") if getattr(shape, axis) > 1}
    if layout:
        entry["layout"] = layout
    entry |= {
        "max_len": max_len,
        "max_sequences": engine.max_sequences,
        "max_batch_tokens": engine.max_batch_tokens,
    }
    if setup.devices > cluster.devices_per_node:
        entry["launch"] = {"launcher": "ray"}
    return {"models": [entry]}


def as_yaml(content: dict[str, Any], comment: str) -> str:
    """With a comment at its head, a line each."""
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return head + yaml.safe_dump(content, sort_keys=False, default_flow_style=False, width=100)
