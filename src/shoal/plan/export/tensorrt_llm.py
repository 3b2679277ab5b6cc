"""TensorRT-LLM: the command of each server with its YAML, and the file of what is in front of them."""

from __future__ import annotations

from typing import Any

from shoal.plan.export.deployable import Deployable, ExportError, Pool
from shoal.plan.export.document import Export, comment, to_yaml
from shoal.plan.export.front import front_file, front_warnings
from shoal.plan.export.replica_script import replica_script
from shoal.plan.export.shoal_files import head

TARGET = "tensorrt-llm"
_WEIGHTS = ("float32", "bfloat16", "float16", "float8", "float8-block", "int8", "int4", "float4")
_PLAIN = ("float32", "bfloat16", "float16")
_CACHE = {"auto": "auto", "bfloat16": "auto", "float16": "auto", "float8": "fp8", "int8": "int8"}


def export(d: Deployable) -> Export:
    _require(d)
    warnings = _warnings(d) + front_warnings(d)
    steps = ["For TensorRT-LLM 1.2. One engine each time; further ones on a node get the next devices and port."]
    if d.spans_nodes:
        steps.append("An engine of several nodes is one MPI job: start it once, on its first node; HOSTFILE names all.")
    text = replica_script(d, "trtllm.sh", head(d, TARGET, warnings, steps), lambda pool: _command(d, pool))
    files = {"trtllm.sh": text}
    for pool in d.pools:
        lines = comment([f"For trtllm-serve --config, of {pool}."])
        files[f"{pool.role}.yaml"] = lines + to_yaml(_settings(d, pool))
    if d.is_disaggregated:
        first = ["Put the servers' addresses in: trtllm-serve disaggregated --config disaggregated.yaml."]
        files["disaggregated.yaml"] = comment(first) + to_yaml(_orchestrator(d))
    else:
        first = ["Put the servers' addresses in: shoal serve --deployment gateway.yaml (docs/fleet.md)."]
        files["gateway.yaml"] = comment(head(d, TARGET, [], first)) + to_yaml(front_file(d, 8000))
    return Export(target=TARGET, files=files, warnings=tuple(warnings))


def _require(d: Deployable) -> None:
    if d.device.vendor != "nvidia":
        raise ExportError(f"device: TensorRT-LLM runs on NVIDIA's devices, and {d.device.name} is none; use --to vllm")
    if d.dtype not in _WEIGHTS:
        raise ExportError(f"dtype: TensorRT-LLM has no weights of {d.dtype}; there are {', '.join(_WEIGHTS)}")
    if d.kv_dtype not in _CACHE and (d.kv_dtype, d.dtype) != ("float32", "float32"):
        raise ExportError(f"kv_dtype: TensorRT-LLM has no KV cache of {d.kv_dtype}; there are {', '.join(_CACHE)}")
    for pool in d.pools:
        if pool.layout.cp > 1:
            raise ExportError(
                f"layout.cp: trtllm-serve has no flag for context parallelism, {pool.layout} splits sequences over "
                f"{pool.layout.cp}; take a plan without it, or use --to vllm or sglang"
            )
        if pool.attention_dp > 1 and pool.layout.tensor_ranks > 1:
            raise ExportError(
                f"attention-dp: TensorRT-LLM has groups of one rank alone, these are of {pool.layout.tensor_ranks}; "
                "take tp 1 and ep 1 in a group, or use --to vllm or sglang"
            )


def _command(d: Deployable, pool: Pool) -> tuple[list[str], list[str]]:
    place = d.placement(pool)
    words = ["trtllm-serve", "serve", d.model]
    if place.nodes > 1:
        launcher = ["mpirun", "-np", str(pool.ranks), "--npernode", str(place.devices_per_node)]
        words = [*launcher, "--hostfile", "${HOSTFILE:?names the nodes}", "trtllm-llmapi-launch", *words]
    layout = pool.layout
    arguments = ["--host", "${HOST}", "--port", "${PORT}", "--tp_size", str(layout.tensor_ranks * pool.attention_dp)]
    if layout.pp > 1:
        arguments += ["--pp_size", str(layout.pp)]
    if layout.ep * pool.attention_dp > 1:
        arguments += ["--ep_size", str(layout.ep * pool.attention_dp)]
    arguments += ["--max_batch_size", str(d.max_sequences), "--max_num_tokens", str(d.max_batch_tokens)]
    if d.max_len is not None:
        arguments += ["--max_seq_len", str(d.max_len)]
    return words, [*arguments, "--config", f"{pool.role}.yaml"]


def _settings(d: Deployable, pool: Pool) -> dict[str, Any]:
    cache: dict[str, Any] = {"dtype": _CACHE.get(d.kv_dtype, "auto"), "enable_block_reuse": d.prefix_caching}
    if d.block_size is not None:
        cache["tokens_per_block"] = d.block_size
    settings: dict[str, Any] = {"kv_cache_config": cache, "enable_chunked_prefill": True}
    if pool.attention_dp > 1:
        settings["enable_attention_dp"] = True
    if pool.role != "serve":
        settings["cache_transceiver_config"] = {"backend": "NIXL"}
    if pool.role == "prefill":
        settings["disable_overlap_scheduler"] = True  # which a context server does not support
    return settings


def _orchestrator(d: Deployable) -> dict[str, Any]:
    found: dict[str, Any] = {"hostname": "0.0.0.0", "port": 8300, "backend": "pytorch"}
    for number, pool in enumerate(d.pools):
        base, beside = 8000 + 100 * number, d.replicas_per_node(pool)
        urls = [f"{pool.role}-{replica}:{base + replica % beside}" for replica in range(pool.replicas)]
        name = "context_servers" if pool.role == "prefill" else "generation_servers"
        found[name] = {"num_instances": pool.replicas, "urls": urls}
    return found


def _warnings(d: Deployable) -> list[str]:
    found = list(d.notes)
    if d.dtype not in _PLAIN and not d.quantised:
        found.append(f"{d.dtype} weights need a checkpoint that is quantised already: give it as the model.")
    elif d.dtype in ("float32", "float16"):
        found.append(f"weights are loaded as the checkpoint has them: see that they are {d.dtype}.")
    if d.kv_cache_bytes is not None:
        found.append("the KV cache's size is a share there (free_gpu_memory_fraction): kv_cache_bytes is left out.")
    if d.served_name != d.model:
        found.append(f"clients ask for the model as {d.model.rstrip('/').rpartition('/')[2]}: not every version has "
                     "--served_model_name, so put shoal's gateway in front.")  # fmt: skip
    left = sorted(set(d.engine) - {"threads", "launch"})
    if left:
        found.append(f"these settings are of shoal's engine alone and are left out: {', '.join(left)}.")
    if d.mig is not None:
        found.append("MIG: set CUDA_VISIBLE_DEVICES to the slice's UUID (nvidia-smi -L) before the script.")
    return found
