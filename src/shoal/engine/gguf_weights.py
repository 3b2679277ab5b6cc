"""Weights of a GGUF file under their Hugging Face names, dequantised to float32 by the `gguf` library.

Shapes: N output features, K input features, D head size.
"""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.checkpoint.errors import CheckpointError
from shoal.checkpoint.gguf_file import GGUFFile, TensorEntry
from shoal.core.sharding import Span
from shoal.engine.read_ahead import Extent
from shoal.engine.weights import FLOATS, Part, read_part

SUPPORTED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")

_ELEMENTS_AT_ONCE = 1 << 17
"""What is made of them on the way stays in a core's second-level cache."""
_GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class GGUFWeights:
    """A WeightSource. When opened, raises CheckpointError for a truncated file or an unsupported element type.

    Tensors that have no Hugging Face name (rotary factors, which the ModelSpec holds) are left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GGUFFile(path)
        self._entries: dict[str, tuple[TensorEntry, int]] = {}
        """By name: where it is, and heads whose rows are permuted, 0 for none."""
        try:
            self._index()
        except BaseException:
            self.close()
            raise

    def _index(self) -> None:
        metadata = self._file.metadata
        arch = metadata.get("general.architecture")
        layer_names = _LAYER | _SANDWICH if arch == "gemma3" else _LAYER
        permuted: dict[str, int] = {}
        if arch == "llama":
            # llama.cpp reorders query and key rows of this family for interleaved rotation; see `_unpermute`.
            heads = metadata.get("llama.attention.head_count")
            if not isinstance(heads, int) or heads < 1:
                raise CheckpointError(
                    self.path, f"llama.attention.head_count must be a positive integer, not {heads!r}"
                )
            permuted = {"attn_q": heads, "attn_k": metadata.get("llama.attention.head_count_kv", heads)}
        for name, entry in self._file.tensors.items():
            stem, _, suffix = name.rpartition(".")
            match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
            target = f"model.layers.{match[1]}.{layer_names.get(match[2], '')}" if match else _GLOBAL.get(stem, "")
            if target and not target.endswith("."):
                heads = permuted.get(match[2], 0) if match else 0
                self._check(entry, heads)
                self._entries[f"{target}.{suffix}"] = (entry, heads)

    def _check(self, entry: TensorEntry, heads: int) -> None:
        if not entry.shape:
            raise CheckpointError(self.path, f"tensor {entry.name} has no dimensions")
        kind = _kind_name(entry.kind)
        if kind not in SUPPORTED:
            raise CheckpointError(
                self.path, f"tensor {entry.name} is {kind}, which is not supported; supported: {', '.join(SUPPORTED)}"
            )
        if heads and (entry.shape[0] % (2 * heads)):
            raise CheckpointError(self.path, f"tensor {entry.name} has {entry.shape[0]} rows, for {heads} heads")
        if entry.shape[-1] % _block(entry)[0]:
            raise CheckpointError(self.path, f"tensor {entry.name} of shape {entry.shape} is not made of whole blocks")
        if entry.offset + _num_bytes(entry) > len(self._file.data):
            raise CheckpointError(self.path, f"is truncated: tensor {entry.name} reaches beyond the end of the file")

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str, kinds: tuple[str, ...] = FLOATS) -> tuple[int, ...]:
        """Whatever the file's element type is, floats are made of it."""
        return self._entries[name][0].shape

    def extent(self, part: Part) -> Extent:
        entry, _ = self._entries[part.name]
        offset, length = entry.offset, _num_bytes(entry)
        if part.rows is not None:
            row_bytes = length // entry.shape[0]
            offset, length = offset + part.rows.start * row_bytes, len(part.rows) * row_bytes
        return Extent(self.path, self._file.descriptor, offset, length)

    def decoded(self, part: Part, data: Tensor) -> Tensor:
        """A new float32 tensor, in the row order of Hugging Face checkpoints. Only the columns asked for are
        dequantised.

        Rows of a permuted tensor (llama's queries and keys) are cut between heads.
        """
        entry, heads = self._entries[part.name]
        per_block, block_bytes = _block(entry)
        shape, columns = entry.shape, part.columns
        if part.rows is not None:
            heads = heads * len(part.rows) // shape[0]
            shape = (len(part.rows), *shape[1:])
        blocks = data.numpy().reshape(*shape[:-1], shape[-1] // per_block, block_bytes)
        first = 0
        if columns is not None:
            # Whole blocks that cover the columns; what sticks out is cut off below.
            first = columns.start // per_block * per_block
            blocks = blocks[..., columns.start // per_block : -(-columns.stop // per_block), :]
        tensor = torch.from_numpy(_dequantised(blocks, entry))
        if columns is not None:
            tensor = tensor[:, columns.start - first : columns.stop - first].contiguous()
        return _unpermute(tensor, heads) if heads else tensor

    def tensor(self, name: str, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        return read_part(self, Part(name, rows, columns))

    def close(self) -> None:
        self._file.close()


def _dequantised(blocks: NDArray[np.uint8], entry: TensorEntry) -> NDArray[np.float32]:
    """New float32 array of blocks (..., number, bytes of one); the last dimension counts elements."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(entry.kind)
    per_block, block_bytes = _block(entry)
    flat = np.ascontiguousarray(blocks).reshape(-1)
    shape = (*blocks.shape[:-2], blocks.shape[-2] * per_block)
    if kind == GGMLQuantizationType.F32:
        return flat.view(np.float32).reshape(shape).copy()
    if kind == GGMLQuantizationType.F16:
        return flat.view(np.float16).reshape(shape).astype(np.float32)
    values = np.empty(flat.size // block_bytes * per_block, np.float32)
    # The library itself takes 16 rows at a time: rows may be so short that most of its time went into the calls.
    step = _ELEMENTS_AT_ONCE // per_block
    for first in range(0, flat.size // block_bytes, step):
        part = flat[first * block_bytes : (first + step) * block_bytes]
        values[first * per_block : (first + step) * per_block] = dequantize(part.reshape(1, -1), kind)[0]
    return values.reshape(shape)


def _unpermute(rows: Tensor, num_heads: int) -> Tensor:
    """From interleaved rotation pairs (0, D/2, 1, D/2 + 1, ...) of each head back to halves."""
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape).contiguous()


def _kind_name(kind: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return str(GGMLQuantizationType(kind).name)
    except ValueError:
        return f"of unknown type {kind}"


def _block(entry: TensorEntry) -> tuple[int, int]:
    """Elements and bytes of one block of the element type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(entry.kind)]
    return int(per_block), int(block_bytes)


def _num_bytes(entry: TensorEntry) -> int:
    per_block, block_bytes = _block(entry)
    return prod(entry.shape) // per_block * block_bytes
