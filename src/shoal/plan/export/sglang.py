"""SGLang: the command of each server, and in front of them the file of a shoal gateway or the command of its router."""

from __future__ import annotations

from shoal.plan.export.deployable import Deployable, ExportError, Pool
from shoal.plan.export.document import Export, command, comment, to_yaml
from shoal.plan.export.front import front_file, front_warnings
from shoal.plan.export.replica_script import replica_script
from shoal.plan.export.shoal_files import head

TARGET = "sglang"
_WEIGHTS: dict[str, tuple[str, str | None]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "float16": ("float16", None),
    "float8": ("bfloat16", "fp8"),
    "float8-block": ("bfloat16", None),
    "int8": ("bfloat16", None),
    "int4": ("bfloat16", None),
    "float4": ("bfloat16", None),
}
_CACHE = {"auto": "auto", "bfloat16": "bfloat16", "float16": "auto", "float8": "fp8_e4m3"}
_BOOTSTRAP = 998
"""Added to a prefill server's port: where decode servers ask for the cache."""


def export(d: Deployable) -> Export:
    warnings = _warnings(d) + front_warnings(d)
    steps = ["For SGLang 0.5. One engine each time; further ones on a node get the next devices and port."]
    words = ["python3", "-m", "sglang.launch_server"]
    text = replica_script(
        d,
        "sglang.sh",
        head(d, TARGET, warnings, steps),
        lambda pool: (words, _arguments(d, pool)),
        None,
        lambda pool: f"BOOTSTRAP=$((PORT + {_BOOTSTRAP}))\n" if pool.role == "prefill" else "",
    )
    files = {"sglang.sh": text}
    if d.is_disaggregated:
        files["router.sh"] = _router(d)
    else:
        first = ["Put the servers' addresses in: shoal serve --deployment gateway.yaml (docs/fleet.md)."]
        files["gateway.yaml"] = comment(head(d, TARGET, [], first)) + to_yaml(front_file(d, 8000))
    return Export(target=TARGET, files=files, warnings=tuple(warnings))


def _arguments(d: Deployable, pool: Pool) -> list[str]:
    if d.dtype not in _WEIGHTS:
        raise ExportError(f"dtype: SGLang has no weights of {d.dtype}; there are {', '.join(_WEIGHTS)}")
    if d.kv_dtype not in _CACHE and (d.kv_dtype, d.dtype) != ("float32", "float32"):
        raise ExportError(f"kv_dtype: SGLang has no KV cache of {d.kv_dtype}; there are {', '.join(_CACHE)}")
    dtype, quantization = _WEIGHTS[d.dtype]
    arguments = [
        "--model-path",
        d.model,
        "--served-model-name",
        d.served_name,
        "--host",
        "${HOST}",
        "--port",
        "${PORT}",
    ]
    arguments += ["--dtype", dtype, *(["--quantization", quantization] if quantization and not d.quantised else [])]
    arguments += ["--kv-cache-dtype", _CACHE.get(d.kv_dtype, "auto")]
    arguments += _sizes(pool)
    if d.max_len is not None:
        arguments += ["--context-length", str(d.max_len)]
    arguments += ["--max-running-requests", str(d.max_sequences), "--chunked-prefill-size", str(d.max_batch_tokens)]
    arguments.append("--enable-metrics")
    if d.block_size is not None:
        arguments += ["--page-size", str(d.block_size)]
    if not d.prefix_caching:
        arguments.append("--disable-radix-cache")
    place = d.placement(pool)
    if place.nodes > 1:
        arguments += ["--nnodes", str(place.nodes), "--node-rank", "${NODE_RANK}"]
        arguments += ["--dist-init-addr", "${MASTER_ADDR}:29500"]
    if pool.role != "serve":
        arguments += ["--disaggregation-mode", pool.role, "--disaggregation-transfer-backend", "nixl"]
    if pool.role == "prefill":
        arguments += ["--disaggregation-bootstrap-port", "${BOOTSTRAP}"]
    return arguments


def _sizes(pool: Pool) -> list[str]:
    """Its tensor size counts every rank of a stage; expert, context and attention groups are shares of them."""
    layout = pool.layout
    tensor = layout.tensor_ranks * layout.cp * pool.attention_dp
    found = ["--tp-size", str(tensor)]
    if layout.pp > 1:
        found += ["--pp-size", str(layout.pp)]
    if layout.ep * pool.attention_dp > 1:
        found += ["--ep-size", str(layout.ep * pool.attention_dp)]
    if pool.attention_dp > 1:
        found += ["--dp-size", str(pool.attention_dp), "--enable-dp-attention"]
    if layout.cp > 1:
        found += ["--attn-cp-size", str(layout.cp)]
    return found


def _warnings(d: Deployable) -> list[str]:
    found = list(d.notes)
    if any(pool.layout.cp > 1 for pool in d.pools):
        found.append("SGLang has context parallelism (--attn-cp-size) for a few models alone; check that this is one.")
    # How a checkpoint is quantised that is so already SGLang reads from it.
    unknown = _WEIGHTS.get(d.dtype, ("", ""))[1] is None and d.dtype not in ("float32", "bfloat16", "float16")
    if not d.quantised and unknown:
        found.append(f"{d.dtype} weights need a checkpoint that is quantised already: give it as the model.")
    elif not d.quantised and d.dtype == "float8":
        found.append(
            "--quantization fp8 is for a checkpoint in 16 bits; leave it out if the model is quantised already."
        )
    if d.kv_cache_bytes is not None:
        found.append("the KV cache's size is a share there (--mem-fraction-static): kv_cache_bytes is left out.")
    found.append("--chunked-prefill-size bounds a step's prompt tokens; those of decodes come on top.")
    left = sorted(set(d.engine) - {"threads", "launch"})
    if left:
        found.append(f"these settings are of shoal's engine alone and are left out: {', '.join(left)}.")
    if d.mig is not None:
        found.append("MIG: set CUDA_VISIBLE_DEVICES to the slice's UUID (nvidia-smi -L) before the script.")
    return found


def _router(d: Deployable) -> str:
    arguments = ["--pd-disaggregation", "--host", "${HOST:-0.0.0.0}", "--port", "${PORT:-8300}"]
    for number, pool in enumerate(d.pools):
        for replica in range(pool.replicas):
            port = 8000 + 100 * number + replica % d.replicas_per_node(pool)
            arguments += [f"--{pool.role}", f"http://{pool.role}-{replica}:{port}"]
            if pool.role == "prefill":
                arguments.append(str(port + _BOOTSTRAP))
    words = ["python3", "-m", "sglang_router.launch_router"]
    lines = comment(["Put the servers' addresses in. pip install sglang-router."])
    return "#!/usr/bin/env bash\n" + lines + "set -euo pipefail\nexec " + command(words, arguments) + "\n"
