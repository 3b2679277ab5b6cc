"""vLLM's flags for an engine, for the targets that run vLLM: its own server, NIM and Dynamo. As of vLLM 0.32."""

from __future__ import annotations

import json

from shoal.plan.export.deployable import Deployable, ExportError, Pool

_WEIGHTS: dict[str, tuple[str, str | None]] = {
    # The type that is computed in, and how weights of a wider checkpoint are quantised as they are loaded.
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "float16": ("float16", None),
    "float8": ("bfloat16", "fp8"),
    "float8-block": ("bfloat16", "fp8_per_block"),
    "int8": ("bfloat16", "int8_per_channel_weight_only"),
    "float4": ("bfloat16", "nvfp4_per_token"),
    "int4": ("bfloat16", None),
}
_CACHE = {"auto": "auto", "bfloat16": "bfloat16", "float16": "float16", "float8": "fp8", "int8": "int8_per_token_head"}
_EXPRESSED = {"threads", "launch"}
"""Settings of shoal's engine that have no counterpart because nothing is lost with them."""


def vllm_arguments(d: Deployable, pool: Pool) -> list[str]:
    """Without the model, the address, and what says which node this is."""
    dtype, quantization = _WEIGHTS.get(d.dtype, (None, None))
    if dtype is None:
        raise ExportError(f"dtype: vLLM has no weights of {d.dtype}; there are {', '.join(_WEIGHTS)}")
    layout = pool.layout
    arguments = ["--dtype", dtype]
    if quantization is not None and not d.quantised:
        arguments += ["--quantization", quantization]
    arguments += ["--kv-cache-dtype", _cache(d)]
    # Its attention is split over all of a group's ranks, as shoal's is over tp and ep.
    sizes = (
        ("tensor", layout.tensor_ranks),
        ("pipeline", layout.pp),
        ("data", pool.attention_dp),
    )
    arguments += [word for axis, size in sizes if size > 1 for word in (f"--{axis}-parallel-size", str(size))]
    if layout.cp > 1:
        for phase in ("prefill", "decode"):  # prefill alone would leave the whole cache on every rank
            arguments += [f"--{phase}-context-parallel-size", str(layout.cp)]
    if layout.ep > 1 or pool.attention_dp > 1:
        arguments.append("--enable-expert-parallel")
    if d.max_len is not None:
        arguments += ["--max-model-len", str(d.max_len)]
    arguments += ["--max-num-seqs", str(d.max_sequences), "--max-num-batched-tokens", str(d.max_batch_tokens)]
    if d.block_size is not None:
        arguments += ["--block-size", str(d.block_size)]
    if d.kv_cache_bytes is not None:
        arguments += ["--kv-cache-memory-bytes", str(d.kv_cache_bytes)]
    arguments.append("--enable-prefix-caching" if d.prefix_caching else "--no-enable-prefix-caching")
    return arguments


def _cache(d: Deployable) -> str:
    if d.kv_dtype == "float32" and d.dtype == "float32":
        return "auto"
    if d.kv_dtype not in _CACHE:
        raise ExportError(f"kv_dtype: vLLM has no KV cache of {d.kv_dtype}; there are {', '.join(_CACHE)}")
    return _CACHE[d.kv_dtype]


def kv_transfer() -> list[str]:
    """Both pools say the same: who sends follows from the request."""
    return ["--kv-transfer-config", json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_both"})]


def vllm_warnings(d: Deployable) -> list[str]:
    """What is otherwise with vLLM than planned."""
    found = list(d.notes)
    if any(pool.layout.ep > 1 and pool.layout.tp > 1 for pool in d.pools):
        found.append("vLLM splits experts whole over all ranks of a group (tp x ep); none is cut by tp as planned.")
    if any(pool.layout.cp > 1 for pool in d.pools):
        found.append("context parallelism is by --prefill- and --decode-context-parallel-size: not every backend "
                     "of vLLM has them.")  # fmt: skip
    # How a checkpoint is quantised that is so already vLLM reads from it.
    if not d.quantised and d.dtype == "int4":
        found.append("int4 weights need a checkpoint that is quantised already (AWQ, GPTQ): give it as the model.")
    elif not d.quantised and d.dtype not in ("float32", "bfloat16", "float16"):
        found.append("--quantization is for a checkpoint in 16 bits; leave it out if the model is quantised already.")
    left = sorted(set(d.engine) - _EXPRESSED)
    if left:
        found.append(f"these settings are of shoal's engine alone and are left out: {', '.join(left)}.")
    return found
