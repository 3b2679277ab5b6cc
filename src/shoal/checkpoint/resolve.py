"""From what a user calls MODEL to files on disk: a built-in name, a directory, a .gguf file, or a hub id."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

import msgspec

from shoal.checkpoint.builtin import BUILTINS, Progress, cached_path, pull
from shoal.checkpoint.errors import CheckpointError, ModelNotFound
from shoal.checkpoint.gguf_file import GGUFFile
from shoal.core.model_config import spec_from_config, spec_from_gguf
from shoal.core.model_spec import ModelSpec, UnsupportedModel
from shoal.core.quantization_config import scheme_from_config

_HUB_WEIGHTS = ["model*.safetensors"]
"""Not every *.safetensors: some repositories hold the same weights a second time under another name."""
_HUB_TOKENIZER = ["*.json", "*.jinja"]
"""And configuration: enough for who has the model run elsewhere."""


class ModelFiles(msgspec.Struct, frozen=True):
    name: str
    """What clients ask for, unless told otherwise."""
    path: Path
    """A checkpoint directory or a .gguf file."""


def resolve(model: str, *, download: bool = True, weights: bool = True, progress: Progress | None = None) -> ModelFiles:
    """Find a model: a built-in name, a directory, a .gguf file, or a hub id, in this order.

    Without `download` only what is on this machine is found, without `weights` none are fetched from a hub. `progress`
    hears of a built-in model's download. Raises ModelNotFound, PullError or CheckpointError.
    """
    if model in BUILTINS:
        path = pull(model, progress) if download else cached_path(BUILTINS[model])
        if path is None:
            raise ModelNotFound(f"{model} has not been fetched: run `shoal pull {model}`")
        return ModelFiles(model, path)
    path = Path(model or "no name").expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if files and not (path / "config.json").exists():
            raise CheckpointError(path, f"is a directory of GGUF files: give the file itself, such as {files[0]}")
        return ModelFiles(path.resolve().name, path.resolve())
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(path, "is not a .gguf file; give the directory of a safetensors checkpoint")
        return ModelFiles(path.stem, path.resolve())
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not path.parent.is_dir():
        return ModelFiles(model, _from_hub(model, download, weights))
    raise ModelNotFound(
        f"{model!r} is no built-in model, directory, .gguf file or hub id (organisation/name); "
        f"the nearest built-in model is {_nearest(model)}"
    )


def _nearest(name: str) -> str:
    return get_close_matches(name.lower(), BUILTINS, n=1, cutoff=0.0)[0]


def _from_hub(model: str, download: bool, weights: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelNotFound(f"{model}: fetching from the hub needs `pip install huggingface_hub`") from None
    try:
        patterns = [*(_HUB_WEIGHTS if weights else []), *_HUB_TOKENIZER]
        return Path(snapshot_download(model, allow_patterns=patterns, local_files_only=not download))
    except Exception as error:  # the hub's, the HTTP library's and the disk's errors have no common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFound(
            f"{model}: not in the local hub cache and the hub gave nothing ({reason}); "
            f"check the name and the network, or give a local directory, a .gguf file or a built-in model, such as "
            f"{_nearest(model.rpartition('/')[2])}"
        ) from None


def load_spec(path: Path) -> ModelSpec:
    """ModelSpec of a checkpoint directory or .gguf file. Raises CheckpointError naming the file and the reason."""
    try:
        if path.suffix == ".gguf":
            return _gguf_spec(path)
        config = path / "config.json"
        if not config.exists():
            raise CheckpointError(config, "is missing")
        content = msgspec.json.decode(config.read_bytes(), type=dict)
        return msgspec.structs.replace(spec_from_config(content), quantization=scheme_from_config(content))
    except UnsupportedModel as error:
        raise CheckpointError(path, str(error)) from None
    except msgspec.DecodeError as error:
        raise CheckpointError(path / "config.json", f"is not valid JSON: {error}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(path, f"the model's configuration makes no sense: {error}") from None


def _gguf_spec(path: Path) -> ModelSpec:
    file = GGUFFile(path)
    try:
        embedding = file.tensors.get("token_embd.weight")
        if embedding is None:
            raise CheckpointError(path, "tensor token_embd.weight is missing")
        facts = {
            "shoal.vocab_size": embedding.shape[0],
            "shoal.tied_embeddings": "output.weight" not in file.tensors,
            "shoal.qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        }
        factors = file.tensors.get("rope_freqs.weight")
        if factors is not None:
            # Llama 3.1 and later: one divisor for each rotation pair; the largest is the scaling factor itself.
            values = memoryview(file.data)[factors.offset : factors.offset + 4 * factors.shape[-1]].cast("f").tolist()
            facts["shoal.rope_factor"] = max(values)
        return spec_from_gguf(file.metadata | facts)
    finally:
        file.close()
