"""Files that shoal itself takes, for the targets that run shoal's own engine: of an engine, and of the gateway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shoal.core.layout import Layout
from shoal.plan.export.deployable import Deployable, ExportError, Pool

IMAGE = "shoal:latest"
"""Built of this package by whoever runs it (docs/export.md); `--image` says where it is."""
PORT = 8000
RANKS_PORT = 29500
"""torchrun's; the ranks' driver takes the next."""
ENGINE_KEY = "@ENGINE_KEY@"
"""Stands in files for the key that gateways show to engines, until it is put in where they run."""
_DTYPES = ("float32", "bfloat16", "int8")
_KV_DTYPES = ("auto", "float32", "bfloat16", "float8", "int8")


def require_shoal(d: Deployable, target: str) -> None:
    """Raise ExportError for what shoal's own engine does not do."""
    others = "vllm, sglang, tensorrt-llm or dynamo"
    if d.is_disaggregated:
        raise ExportError(
            f"--to {target}: shoal's engine has no separate prefill and decode pools yet; take one with engines that "
            f"do both, or export to {others}"
        )
    if any(pool.attention_dp > 1 for pool in d.pools):
        raise ExportError(
            f"--to {target}: shoal's engine has no data-parallel attention; plan without it, or export to {others}"
        )
    if d.dtype not in _DTYPES:
        raise ExportError(
            f"dtype: {d.dtype} is none of shoal's engine, which has {', '.join(_DTYPES)}; take one of them, or export "
            f"to {others}"
        )
    if d.kv_dtype not in _KV_DTYPES:
        raise ExportError(
            f"kv_dtype: {d.kv_dtype} is none of shoal's engine, which has {', '.join(_KV_DTYPES)}; take one of them, "
            f"or export to {others}"
        )
    if d.kv_dtype in ("float8", "int8") and not d.is_gpu:
        raise ExportError(f"kv_dtype: shoal's engine keeps {d.kv_dtype} on GPUs alone; take bfloat16")
    if d.device.vendor == "intel":
        raise ExportError(f"device: shoal's engine does not run on {d.device.name}; export to vllm")


def engine_settings(d: Deployable, layout: Layout, launch: dict[str, Any] | None = None) -> dict[str, Any]:
    """Keys of EngineConfig. The device is said: where it is not, ranks take each other for CPU ranks."""
    settings: dict[str, Any] = {"dtype": d.dtype, "device": "cuda" if d.is_gpu else "cpu"}
    if d.kv_dtype != "auto":
        settings["kv_dtype"] = d.kv_dtype
    sizes = {name: getattr(layout, name) for name in ("tp", "pp", "ep", "cp")}
    if layout.ranks > 1:
        settings["layout"] = {name: size for name, size in sizes.items() if size > 1}
    limits = {"max_len": d.max_len, "kv_cache_bytes": d.kv_cache_bytes}
    settings |= {name: value for name, value in limits.items() if value is not None}
    settings |= {"max_sequences": d.max_sequences, "max_batch_tokens": d.max_batch_tokens}
    if d.block_size is not None:
        settings["block_size"] = d.block_size
    if not d.prefix_caching:
        settings["prefix_caching"] = False
    left = {"launch"} if launch is None else {"launch", "warm_spares"}  # spares are started by the local launcher alone
    settings |= {name: value for name, value in d.engine.items() if name not in left}
    launching = {**d.engine.get("launch", {}), **(launch or {})}
    return settings | ({"launch": launching} if launching else {})


def listener(d: Deployable, port: int = PORT) -> dict[str, Any]:
    """For a server that others reach. Whoever uses it adds its keys: without keys it refuses to start."""
    return {"host": "0.0.0.0", "port": port, "allow_remote": True, "drain_seconds": d.drain_seconds}


def engine_file(d: Deployable, pool: Pool) -> dict[str, Any]:
    """A deployment of one engine on one machine, for a gateway elsewhere."""
    model = {"name": d.served_name, "model": d.model, **engine_settings(d, pool.layout)}
    return {**listener(d), "api_key": ENGINE_KEY, **server_settings(d), "models": [model]}


def server_settings(d: Deployable) -> dict[str, Any]:
    """Of the gateway's, what an engine's own server has to hold too: it must not refuse what the gateway took."""
    return {name: d.gateway[name] for name in ("limits", "health", "supervision") if name in d.gateway}


def rank_file(d: Deployable, pool: Pool, secret_file: str) -> dict[str, Any]:
    """For `shoal serve MODEL --config`, of an engine with ranks on several machines: every rank has the same. Where the
    driver listens is known on its machine, so that is a flag (--launch-host)."""
    launch = {"launcher": "env", "secret_file": secret_file, "join_seconds": float(d.start_seconds)}
    return {
        **listener(d),
        "api_key": ENGINE_KEY,
        "served_model_name": d.served_name,
        **server_settings(d),
        "engine": engine_settings(d, pool.layout, launch),
    }


def gateway_file(
    d: Deployable, addresses: Sequence[str], keys: str, cluster_secret: str, api_key: str = ENGINE_KEY
) -> dict[str, Any]:
    """The front of engines that run elsewhere."""
    endpoints = [
        {"name": f"{d.name}-{number}", "openai": address, "api_key": api_key, "max_sequences": d.max_sequences}
        for number, address in enumerate(addresses)
    ]
    model = {"name": d.served_name, "model": d.model, **d.serving, "endpoints": endpoints}
    secrets = {"keys": keys, "cluster_secret": cluster_secret}
    return {**listener(d), **secrets, **d.gateway, "models": [model]}


def head(d: Deployable, target: str, warnings: Sequence[str], steps: Sequence[str]) -> list[str]:
    """The first lines of every file: what it is of, what it lacks, and what has to be done first."""
    engines = " and ".join(map(str, d.pools))
    lines = [
        f"{d.served_name}: {engines}; {d.num_devices} {d.device.name}, {d.dtype} weights, {d.kv_dtype} KV cache. "
        f"Written by `shoal export --to {target}`."
    ]
    return [*lines, *(f"Note: {warning}" for warning in warnings), *([""] if steps else []), *steps]


def warnings_of(d: Deployable, *, spares: bool = True) -> list[str]:
    """What shoal's targets have to say of any deployment. `spares`: they can have warm ones."""
    found = list(d.notes)
    if not spares and d.engine.get("warm_spares"):
        found.append("warm_spares are of ranks that start on one machine, and are left out.")
    if d.is_gpu:
        found.append("shoal's engine has not run on GPUs yet (docs/parallelism.md): try this on one node first.")
    return found


PROBE = (
    "import sys,urllib.request as u;"
    "k=open(sys.argv[2]).read().strip();"
    "u.urlopen(u.Request(sys.argv[1],headers={'Authorization':'Bearer '+k}),timeout=4)"
)
"""A program that asks /ready with a key: the kubelet's own HTTP probe cannot take one from a secret. urlopen raises,
and the program fails, for any status but 2xx and where nobody answers."""
FILL_IN = (
    "import pathlib,sys;"
    "t,o=map(pathlib.Path,sys.argv[1:3]);"
    "k=pathlib.Path(sys.argv[3]).read_text().strip();"
    f"o.write_text(t.read_text().replace('{ENGINE_KEY}',k));o.chmod(0o600)"
)
"""A program that puts the engines' key into a file, so that no ConfigMap holds it and no command line shows it."""
