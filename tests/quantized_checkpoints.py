"""Quantised twins of tiny checkpoints, laid out as the hub's files are, and the float checkpoints they stand for.

Packing is written out here number by number, so that it has nothing in common with what reads it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GROUP = 32
_MATRIX = re.compile(r"model\.layers\.\d+\..*_proj(_with_mqa)?\.weight|.*\.experts\.\d+\.w[123]\.weight")


def _ct(weights: dict[str, Any], inputs: dict[str, Any] | None, form: str) -> dict[str, Any]:
    plain = {"actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "symmetric": True}
    group = {"targets": ["Linear"], "weights": plain | weights, "output_activations": None}
    group["input_activations"] = None if inputs is None else {"symmetric": True, "dynamic": True} | inputs
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*gate$"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


_FP8, _INT8 = {"type": "float", "num_bits": 8}, {"type": "int", "num_bits": 8}
_INT4 = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": GROUP}
_TOKEN: dict[str, Any] = {"strategy": "token", "dynamic": True}
FORMS: dict[str, dict[str, Any]] = {
    "ct_fp8_channel": _ct(_FP8 | {"strategy": "channel"}, _FP8 | _TOKEN, "float-quantized"),
    "ct_fp8_static": _ct(
        _FP8 | {"strategy": "tensor"}, _FP8 | {"strategy": "tensor", "dynamic": False}, "float-quantized"
    ),
    "ct_fp8_block": _ct(
        _FP8 | {"strategy": "block", "block_structure": [32, 32]},
        _FP8 | {"strategy": "group", "group_size": 32},
        "float-quantized",
    ),
    "ct_int8": _ct(_INT8 | {"strategy": "channel"}, _INT8 | _TOKEN, "int-quantized"),
    "ct_int4": _ct(_INT4, None, "pack-quantized"),
    "ct_int4_zeros": _ct(_INT4 | {"symmetric": False}, None, "pack-quantized"),
    "ct_int4_channel": _ct(_INT4 | {"strategy": "channel", "group_size": None}, None, "pack-quantized"),
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "fp8_block": {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [32, 32]},
    "fp8_ue8m0": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [32, 32],
    },
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False},
    "gptq_v2": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": False,
        "checkpoint_format": "gptq_v2",
    },
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}
FLOAT_ACTIVATIONS = ("ct_int4", "ct_int4_zeros", "ct_int4_channel", "gptq", "gptq_v2", "awq")


def make_twins(source: Path, directory: Path, form: str) -> tuple[Path, Path]:
    """The checkpoint `source` quantised, and the float checkpoint with the weights that it has then."""
    from safetensors.torch import load_file, save_file

    quantised, floats = directory / f"{source.name}-{form}", directory / f"{source.name}-{form}-floats"
    for path in (quantised, floats):
        shutil.copytree(source, path)
    tensors = load_file(source / "model.safetensors")
    few_bits: dict[str, Tensor] = {}
    for name in list(tensors):
        if _MATRIX.fullmatch(name):
            stored, tensors[name] = _stored(form, tensors[name])
            few_bits |= {f"{name.removesuffix('.weight')}.{key}": value for key, value in stored.items()}
    save_file(tensors, floats / "model.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if not _MATRIX.fullmatch(name)}
    save_file(rest | few_bits, quantised / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": FORMS[form]}))
    return quantised, floats


def _stored(form: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    if form.startswith(("ct_fp8", "fp8")):
        return _fp8(form, weight)
    if form == "ct_int8":
        scale = (weight.abs().amax(dim=1, keepdim=True) / 127).bfloat16()
        values = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
        return {"weight": values, "weight_scale": scale}, values.float() * scale.float()
    return _int4(form, weight)


def _fp8(form: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    n, k = weight.shape
    if form in ("ct_fp8_block", "fp8_block", "fp8_ue8m0"):
        scale = torch.empty(-(-n // 32), -(-k // 32))
        wide = torch.empty(n, k)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                at = (slice(32 * i, 32 * i + 32), slice(32 * j, 32 * j + 32))
                scale[i, j] = weight[at].abs().max() / 448
                if form == "fp8_ue8m0":
                    scale[i, j] = 2.0 ** float(torch.ceil(torch.log2(scale[i, j])))
                wide[at] = scale[i, j]
        name = "weight_scale" if form.startswith("ct_") else "weight_scale_inv"
    else:
        scale = weight.abs().amax(dim=1, keepdim=True) / 448 if form == "ct_fp8_channel" else weight.abs().max() / 448
        scale = scale.bfloat16().float() if form == "ct_fp8_channel" else scale.reshape(() if form == "fp8" else (1,))
        wide, name = scale.expand(n, k), "weight_scale"
    values = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    stored = {"weight": values, name: scale.bfloat16() if form == "ct_fp8_channel" else scale}
    if form == "ct_fp8_static":
        stored["input_scale"] = torch.tensor([0.03])
    return stored, values.float() * wide


def _int4(form: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    n, k = weight.shape
    group = k if form == "ct_int4_channel" else GROUP
    grouped = weight.view(n, k // group, group)
    low, high = grouped.amin(dim=2).clamp_max(0), grouped.amax(dim=2).clamp_min(0)
    if form in ("ct_int4", "ct_int4_channel"):
        scale, zero = (torch.maximum(-low, high) / 7.5).half(), torch.full((n, k // group), 8.0)
    else:
        scale = ((high - low) / 15).half()
        zero = (-low / scale.float()).round().clamp(0, 15)
    if form == "gptq":
        zero = zero.clamp_min(1)
    values = ((grouped / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 15)
    floats = ((values - zero[..., None]) * scale.float()[..., None]).view(n, k)
    q, z = values.view(n, k).int(), zero.int()
    if form.startswith("ct_"):
        stored = {"weight_packed": _pack(q), "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
        if form == "ct_int4_zeros":
            stored["weight_zero_point"] = _pack(z.T).T.contiguous()
        return stored, floats
    transposed = {"scales": scale.T.contiguous()}
    if form == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)  # columns of eight in the order of nibbles
        return transposed | {"qweight": _pack(q.T, order), "qzeros": _pack(z.T, order)}, floats
    offset = 1 if form == "gptq" else 0
    index = torch.arange(k, dtype=torch.int32) // group
    packed = {"qweight": _pack(q).T.contiguous(), "qzeros": _pack(z.T - offset), "g_idx": index}
    return transposed | packed, floats


def _pack(numbers: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight of a row's numbers in each int32, the first of `order` in its lowest bits."""
    rows, columns = numbers.shape
    words = np.zeros((rows, columns // 8), np.uint32)
    wide = numbers.numpy().astype(np.uint32)
    for nibble, column in enumerate(order):
        words |= wide[:, column::8] << np.uint32(4 * nibble)
    return torch.from_numpy(words.view(np.int32).copy())
