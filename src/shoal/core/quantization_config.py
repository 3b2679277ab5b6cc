"""QuantScheme from what a checkpoint says of itself: `quantization_config` of a Hugging Face `config.json`."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, get_args

from shoal.core.model_spec import UnsupportedModel
from shoal.core.quantization import ActivationScale, Form, QuantScheme

READABLE = (
    "compressed-tensors: FP8 (tensor, channel, block), INT8 W8A8 and W4A16 pack-quantized",
    "fp8: e4m3 by tensor or in blocks (DeepSeek, Qwen3)",
    "gptq: 4 bits without desc_act",
    "awq: 4 bits, version gemm",
)


def scheme_from_config(config: dict[str, Any]) -> QuantScheme | None:
    """The scheme of a Hugging Face `config.json`; None for one that is not quantised.

    Raises UnsupportedModel naming the key, its value and what can be read.
    """
    inner = config.get("text_config") or {}
    quantization = config.get("quantization_config") or (
        inner.get("quantization_config") if isinstance(inner, dict) else None
    )
    if not quantization:
        return None
    if not isinstance(quantization, dict):
        raise UnsupportedModel(f"config.json: quantization_config must be an object, not {quantization!r:.80}")
    method = quantization.get("quant_method")
    parse = _METHODS.get(method) if isinstance(method, str) else None
    if parse is None:
        near = get_close_matches(str(method), _METHODS, n=1)
        raise _refused("quant_method", method, f"nearest: {near[0]}" if near else "")
    try:
        return parse(quantization)
    except UnsupportedModel:
        raise
    except KeyError as missing:
        raise UnsupportedModel(f"config.json: quantization_config lacks {missing.args[0]!r}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UnsupportedModel(f"config.json: quantization_config holds a value of the wrong kind: {error}") from None


def _refused(key: str, value: object, hint: str = "") -> UnsupportedModel:
    because = f" ({hint})" if hint else ""
    return UnsupportedModel(
        f"config.json: quantization_config.{key} is {value!r}, which is not supported{because}; "
        f"supported: {'; '.join(READABLE)}"
    )


def _must_be(found: dict[str, Any], key: str, *allowed: object) -> None:
    """A key that is left out has the first value."""
    value = found.get(key, allowed[0])
    if value not in allowed:
        raise _refused(key, value, "only " + " or ".join(repr(each) for each in allowed))


def _group(value: Any, key: str) -> int:
    """GPTQ and AWQ say -1 for one group."""
    if value in (None, -1, 0):
        return 0
    if type(value) is not int or value < 1 or value % 8:
        raise _refused(key, value, "a multiple of 8, or -1")
    return value


def _awq(c: dict[str, Any]) -> QuantScheme:
    _must_be(c, "bits", 4)
    _must_be(c, "version", "gemm", "GEMM")
    _must_be(c, "zero_point", True)
    return QuantScheme(weights="int4", form="awq", group=_group(c["group_size"], "group_size"), symmetric=False)


def _gptq(c: dict[str, Any]) -> QuantScheme:
    _must_be(c, "bits", 4)
    if c.get("desc_act"):
        raise _refused("desc_act", True, "groups of scattered features; take a checkpoint with desc_act false")
    if c.get("dynamic"):
        raise _refused("dynamic", c["dynamic"], "one form for all layers")
    _must_be(c, "checkpoint_format", "gptq", "gptq_v2")
    offset = 0 if c.get("checkpoint_format") == "gptq_v2" else 1
    # Symmetric files have zero points all the same, all alike: what is in the file is what counts.
    return QuantScheme(
        weights="int4",
        form="gptq",
        group=_group(c["group_size"], "group_size"),
        symmetric=False,
        zero_offset=offset,
    )


def _fp8(c: dict[str, Any]) -> QuantScheme:
    _must_be(c, "fmt", "e4m3", None)
    _must_be(c, "activation_scheme", "dynamic", "static")
    _must_be(c, "scale_fmt", None, "ue8m0", "float")
    static = c.get("activation_scheme") == "static"
    block = c.get("weight_block_size")
    if block is None:
        return QuantScheme(weights="fp8", form="fp8", rows=0, activations="tensor" if static else "token")
    if static:
        raise _refused("activation_scheme", "static", "with weight_block_size only 'dynamic'")
    rows, group = _block(block, "weight_block_size")
    return QuantScheme(
        weights="fp8",
        form="fp8",
        group=group,
        rows=rows,
        activations="group",
        scales_are_powers_of_two=c.get("scale_fmt") == "ue8m0",
    )


def _block(value: Any, key: str) -> tuple[int, int]:
    """[rows, columns], or "128x128" as early files have it."""
    sizes = [int(part) for part in value.split("x")] if isinstance(value, str) else value
    if not isinstance(sizes, list) or len(sizes) != 2 or any(type(n) is not int or n < 16 or n % 16 for n in sizes):
        raise _refused(key, value, "two multiples of 16, such as [128, 128]")
    return sizes[0], sizes[1]


def _compressed_tensors(c: dict[str, Any]) -> QuantScheme | None:
    groups = c["config_groups"]
    sparsity = (c.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise _refused("sparsity_config.format", sparsity, "only 'dense'")
    _check_cache(c.get("kv_cache_scheme"))
    if not groups and c.get("kv_cache_scheme"):
        return None  # the file has floats, and scales of a KV cache
    if not groups:
        raise _refused("config_groups", groups)
    schemes = [_of_group(f"config_groups.{name}", group) for name, group in groups.items()]
    if any(scheme != schemes[0] for scheme in schemes):
        raise _refused("config_groups", sorted(groups), "one form for all layers")
    return schemes[0]


def _check_cache(c: dict[str, Any] | None) -> None:
    """What the file says of a KV cache: which precision its scales are for. Scales found on the way are in no file."""
    if c is None or c.get("dynamic"):
        return
    found = f"{c['type']} of {c['num_bits']} bits by {c['strategy']}"
    if found not in ("float of 8 bits by tensor", "float of 8 bits by attn_head") or not c.get("symmetric", True):
        raise _refused("kv_cache_scheme", found, "scales of a KV cache only for symmetric FP8, by tensor or attn_head")


def _of_group(key: str, c: dict[str, Any]) -> QuantScheme:
    """Of one entry of config_groups, whose key is for messages."""
    weights, inputs = c["weights"], c.get("input_activations")
    if c.get("output_activations"):
        raise _refused(f"{key}.output_activations", c["output_activations"], "only null")
    if weights.get("actorder") in ("group", "dynamic"):
        raise _refused(f"{key}.weights.actorder", weights["actorder"], "groups of scattered features; only 'weight'")
    kind, bits, strategy = weights["type"], weights["num_bits"], weights["strategy"]
    symmetric = bool(weights.get("symmetric", True))
    activations = _activations(f"{key}.input_activations", inputs, kind, bits)
    form: Form = "compressed-tensors"
    if (kind, bits) == ("int", 4) and inputs is None and strategy in ("group", "channel"):
        group = _group(weights.get("group_size"), f"{key}.weights.group_size") if strategy == "group" else 0
        return QuantScheme(weights="int4", form=form, group=group, symmetric=symmetric)
    if not symmetric:
        raise _refused(f"{key}.weights.symmetric", False, "zero points only with 4 bits")
    rows = {"tensor": 0, "channel": 1}.get(strategy)
    if (kind, bits) == ("float", 8):
        if strategy == "block":
            found = weights.get("block_structure") or weights.get("block_size")
            rows, group = _block(found, f"{key}.weights.block_structure")
            if activations in ("tensor", "token"):
                raise _refused(f"{key}.input_activations.strategy", activations, "with block weights only 'group'")
            if inputs is not None and inputs.get("group_size") != group:
                raise _refused(f"{key}.input_activations.group_size", inputs.get("group_size"), f"only {group}")
            return QuantScheme(weights="fp8", form=form, group=group, rows=rows, activations=activations)
        if rows is not None and activations != "group":
            return QuantScheme(weights="fp8", form=form, rows=rows, activations=activations)
    elif (kind, bits) == ("int", 8) and rows is not None and inputs is not None and activations != "group":
        return QuantScheme(weights="int8", form=form, rows=rows, activations=activations)
    raise _refused(f"{key}.weights", f"{kind} of {bits} bits by {strategy}, inputs {activations}")


def _activations(key: str, c: dict[str, Any] | None, kind: str, bits: int) -> ActivationScale:
    if c is None:
        return "none"
    if (c["type"], c["num_bits"]) != (kind, bits):
        raise _refused(key, f"{c['type']} of {c['num_bits']} bits", f"only {kind} of {bits} bits, as the weights")
    if not c.get("symmetric", True):
        raise _refused(f"{key}.symmetric", False, "only true")
    strategy = c["strategy"]
    if not c.get("dynamic"):
        if strategy != "tensor":
            raise _refused(f"{key}.strategy", strategy, "without dynamic only 'tensor'")
        return "tensor"
    if strategy not in ("tensor", "token", "group"):
        raise _refused(f"{key}.strategy", strategy, f"one of {', '.join(get_args(ActivationScale)[1:])}")
    # A row's own scale is finer than one for the whole batch, and does not depend on what else is in the batch.
    return "token" if strategy == "tensor" else strategy


_METHODS = {"compressed-tensors": _compressed_tensors, "fp8": _fp8, "gptq": _gptq, "awq": _awq}
