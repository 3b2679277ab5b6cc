"""GGUF files as llama.cpp's converter would make them, small enough to build in a test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | tuple[np.ndarray, Any]] | None = None,
    *,
    arch: str = "llama",
) -> Path:
    """Write a file with the `gguf` library's own writer. A tensor is an array, or raw bytes (rows) and their type."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, arch)
    for key, value in (metadata or {}).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, value in (tensors or {}).items():
        array, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_metadata(layers: int = 1, hidden: int = 64, heads: int = 4, kv_heads: int = 2) -> dict[str, Any]:
    return {
        "llama.block_count": layers,
        "llama.context_length": 128,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }


def sentencepiece_metadata(words: list[str], scores: list[float] | None = None, **settings: Any) -> dict[str, Any]:
    """Vocabulary of the kind of Llama 2: <unk>, <s>, </s>, the bytes, then `words`, best first unless scored."""
    tokens = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, *words]
    word_scores = scores if scores is not None else [-float(rank) for rank in range(len(words))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + word_scores,
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in settings.items()}


def byte_level_metadata(pre: str, merges: list[str], specials: list[str], **settings: Any) -> dict[str, Any]:
    """Vocabulary of the kind of GPT-2: specials, the 256 bytes, then what the merges make."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*specials, *alphabet, *(merge.replace(" ", "") for merge in merges)]
    kinds = [CONTROL] * len(specials) + [NORMAL] * (len(tokens) - len(specials))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in settings.items()}
