"""What a checkpoint must hold: every tensor of the model by name and shape, held against the file before it is read."""

from __future__ import annotations

import re

from shoal.checkpoint.errors import CheckpointError
from shoal.core.model_spec import ModelSpec
from shoal.engine.latent_attention import latent_shapes
from shoal.engine.moe import mlp_shapes
from shoal.engine.quantization.stored import CACHE_SCALES, IGNORED_TENSORS, is_quantized, stored_kinds, stored_shapes
from shoal.engine.weights import TensorSource


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model must hold."""
    h = spec.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, h), "model.norm.weight": (h,)}
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, h)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if spec.sandwich_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for number in range(spec.num_layers):
        shapes |= _heads_shapes(spec, number) if spec.mla is None else latent_shapes(spec, spec.mla, number)
        shapes |= mlp_shapes(spec, number)
        shapes |= {f"model.layers.{number}.{norm}.weight": (h,) for norm in norms}
    return shapes


def _heads_shapes(spec: ModelSpec, number: int) -> dict[str, tuple[int, ...]]:
    """Of layer `number`'s attention."""
    prefix, h, d = f"model.layers.{number}.self_attn.", spec.hidden_size, spec.head_dim
    q, kv = spec.num_heads * d, spec.num_kv_heads * d
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        shapes[f"{prefix}{name}_proj.weight"] = (rows, h)
        if spec.qkv_bias:
            shapes[f"{prefix}{name}_proj.bias"] = (rows,)
    shapes[f"{prefix}o_proj.weight"] = (h, q)
    if spec.output_bias:
        shapes[f"{prefix}o_proj.bias"] = (h,)
    if spec.qk_norm:
        shapes[f"{prefix}q_norm.weight"] = shapes[f"{prefix}k_norm.weight"] = (d,)
    return shapes


_QUANTISED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")
"""What GPTQ, AWQ, compressed-tensors and fp8 files have in the place of `.weight` or beside it."""
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")


def check_shapes(source: TensorSource, spec: ModelSpec) -> None:
    """Raise CheckpointError for the first tensor that is missing, has another shape, or has no place in the model."""
    scheme, present = spec.quantization, dict.fromkeys(source.names())
    plain = expected_shapes(spec)
    stored: dict[str, tuple[tuple[int, ...], ...]] = {}
    for name in list(plain):
        module = name.removesuffix(".weight")
        if scheme is not None and len(plain[name]) == 2 and is_quantized(present, scheme, module):
            n, k = plain.pop(name)
            if scheme.weights == "int4" and (n % 8 or k % 8):
                raise CheckpointError(source.path, f"matrix {module} of ({n}, {k}) is not made of words of 8 numbers")
            stored |= stored_shapes(scheme, module, (n, k))
    shapes = {name: (shape,) for name, shape in plain.items()} | stored
    quantised = scheme is None and any(name.endswith(_QUANTISED) for name in present)
    hint = ": the file holds quantised weights, and no quantization_config says how" if quantised else ""
    missing = [name for name in shapes if name not in present]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(source.path, f"tensor {missing[0]} is missing{more}{hint}")
    for name in present:
        # Leaving out a bias or a norm computes another model.
        if name not in shapes and not _may_be_left_out(name, spec):
            raise CheckpointError(source.path, f"the model's configuration has no place for tensor {name}{hint}")
    for name, allowed in shapes.items():
        found = source.shape(name, stored_kinds(scheme, name)) if scheme and name in stored else source.shape(name)
        if found not in allowed:
            says = " or ".join(str(shape) for shape in allowed)
            raise CheckpointError(
                source.path, f"tensor {name} has shape {found}, the model's configuration says {says}"
            )


def _may_be_left_out(name: str, spec: ModelSpec) -> bool:
    """What is not of a layer; rotary frequencies, which old files hold and which are derived; layers for drafting."""
    layer = _LAYER.match(name)
    if layer is None or name.endswith("rotary_emb.inv_freq"):
        return True
    if name.endswith(CACHE_SCALES if spec.quantization is None else IGNORED_TENSORS):
        return True
    return spec.num_layers <= int(layer[1]) < spec.num_layers + spec.num_draft_layers
