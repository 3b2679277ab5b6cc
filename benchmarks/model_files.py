"""The same weights for every engine: the built-in GGUF, dequantised to float32, as safetensors and as Q8_0 GGUF."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file

from shoal.checkpoint.builtin import pull
from shoal.checkpoint.gguf_tokenizer import tokenizer_from_gguf
from shoal.checkpoint.resolve import load_spec
from shoal.core.model_spec import ModelSpec
from shoal.engine.checkpoint_shapes import expected_shapes
from shoal.engine.weights import open_weights

MODEL = "smollm2-135m"
VOCAB_SIZE = 49152
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 384,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "torch_dtype": "float32",
}
"""A mixture of experts with about as many parameters at work on a token as MODEL has in its layers' half."""
EVEN = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "torch_dtype": "float32",
}
"""As large as MODEL, with heads that two ranks can share evenly: vLLM refuses MODEL's nine on two."""


@dataclass(frozen=True)
class ModelPaths:
    original: Path
    """As fetched; its tokenizer is used, its weights are not."""
    float32: Path
    """Hugging Face checkpoint directory: config.json and model.safetensors. For shoal, vLLM and transformers."""
    q8_0: Path
    """GGUF for llama.cpp: matrices in Q8_0, quantised from those float32 values; norms in float32."""
    spec: ModelSpec


def prepare(directory: Path) -> ModelPaths:
    """Fetch the model and make both forms below `directory`, unless they are there. A few seconds, 700 MB."""
    original = pull(MODEL)
    paths = ModelPaths(
        original, directory / original.stem / "float32", directory / original.stem / "q8_0.gguf", load_spec(original)
    )
    paths.float32.parent.mkdir(parents=True, exist_ok=True)
    if not paths.float32.exists():
        with tempfile.TemporaryDirectory(dir=paths.float32.parent) as scratch:
            _write_safetensors(paths, Path(scratch) / "float32")
            shutil.move(Path(scratch) / "float32", paths.float32)  # whole or not at all
    if not paths.q8_0.exists():
        partial = paths.q8_0.with_suffix(".partial")
        _write_q8_0(original, partial)
        partial.rename(paths.q8_0)
    return paths


def with_tokenizer(paths: ModelPaths, target: Path) -> Path:
    """A checkpoint directory in `target`, which must not exist: the float32 weights (links), and their tokenizer."""
    target.mkdir()
    for file in paths.float32.iterdir():
        (target / file.name).symlink_to(file)
    tokenizer = tokenizer_from_gguf(paths.original)
    (target / "tokenizer.json").write_text(tokenizer.to_json())
    eos = tokenizer.token_text(tokenizer.eos_ids[0])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return target


def prepare_random(config: dict[str, Any], target: Path) -> Path:
    """A checkpoint with random weights, fixed by seed, unless it is there. A few seconds."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            write_random(config, Path(scratch) / "model")
            shutil.move(Path(scratch) / "model", target)
    return target


def write_random(config: dict[str, Any], target: Path) -> None:
    """A checkpoint directory of a config.json's content. Matrices are normal with 1 / sqrt(columns), norms are 1."""
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in expected_shapes(load_spec(target)).items():
        values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * shape[1] ** -0.5
        tensors[name] = values
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def _write_safetensors(paths: ModelPaths, target: Path) -> None:
    target.mkdir()
    source = open_weights(paths.original)
    try:
        tensors = {name: source.tensor(name).float().contiguous() for name in source.names()}
    finally:
        source.close()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(_hf_config(paths.spec), indent=2))


def _hf_config(spec: ModelSpec) -> dict[str, Any]:
    """No end-of-text id: no engine is to stop on one."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_len,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope.theta,
        "tie_word_embeddings": spec.tied_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float32",
    }


def _write_q8_0(original: Path, target: Path) -> None:
    """Same metadata, same row order as llama.cpp expects it; only the element types change."""
    reader = gguf.GGUFReader(original)
    architecture = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    if architecture is None:
        raise ValueError(f"{original}: general.architecture is missing")
    writer = gguf.GGUFWriter(target, architecture.contents())
    written_by_writer = (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in written_by_writer:
            continue
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if is_array else None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, quantize(values, q8_0), raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
