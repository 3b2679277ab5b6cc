"""Tensors of a checkpoint by their Hugging Face names, read when asked for.

Everything that can be wrong with the files is found when they are opened, before any compute.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, cast

import msgspec
from torch import Tensor

from shoal.checkpoint.errors import CheckpointError
from shoal.core.sharding import Span

_FLOATS = ("F32", "F16", "BF16", "F64")
_TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
"""How multimodal checkpoints of both generations of transformers name the parts of their text model."""


class WeightSource(Protocol):
    path: Path

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises CheckpointError if the tensor's element type cannot be read, so that this is known beforehand."""

    def tensor(self, name: str, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        """A float tensor in whatever precision it is stored; the caller may keep it only for a moment (memory map).

        Of a part only that part is read: `rows` of the first dimension, `columns` of the second.
        """

    def close(self) -> None: ...


class SafetensorsWeights:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, Any] = {}
        self._place: dict[str, tuple[str, str]] = {}
        """By name: the shard, and the name within it."""
        try:
            for shard in _shards(path):
                handle = _open(path / shard)
                self._files[shard] = handle
                self._place.update({_text_name(key): (shard, key) for key in handle.keys()})  # noqa: SIM118
        except BaseException:
            self.close()
            raise

    def names(self) -> list[str]:
        return list(self._place)

    def shape(self, name: str) -> tuple[int, ...]:
        shard, key = self._place[name]
        header = self._files[shard].get_slice(key)
        if header.get_dtype() not in _FLOATS:
            raise CheckpointError(
                self.path / shard,
                f"tensor {key} is {header.get_dtype()}: quantised checkpoints are not read, only {', '.join(_FLOATS)}",
            )
        return tuple(header.get_shape())

    def tensor(self, name: str, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        shard, key = self._place[name]
        if rows is None and columns is None:
            return cast("Tensor", self._files[shard].get_tensor(key))
        part = self._files[shard].get_slice(key)
        at_rows = slice(None) if rows is None else rows.slice
        return cast("Tensor", part[at_rows] if columns is None else part[at_rows, columns.slice])

    def close(self) -> None:
        self._files.clear()


def _text_name(key: str) -> str:
    for prefix, replacement in _TEXT_PREFIXES.items():
        if key.startswith(prefix):
            return replacement + key.removeprefix(prefix)
    return key


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _shards(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = sorted(set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()))
        except (msgspec.DecodeError, OSError) as error:
            raise CheckpointError(index, f"not a weight index: {error}") from None
        for shard in shards:
            if Path(shard).name != shard:
                raise CheckpointError(index, f"names a shard outside of its directory: {shard!r}")
            if not (path / shard).exists():
                raise CheckpointError(path / shard, f"this shard is missing; {index.name} names {len(shards)} shards")
        return shards
    if (path / "model.safetensors").exists():
        return ["model.safetensors"]
    if list(path.glob("*.bin")) or list(path.glob("*.pth")):
        raise CheckpointError(path, "holds pickled weights only, which shoal does not load: convert to safetensors")
    raise CheckpointError(path, "holds neither model.safetensors nor model.safetensors.index.json")


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(path, f"cannot be read as safetensors (truncated or corrupt?): {error}") from None


def open_weights(path: str | Path) -> WeightSource:
    """The weights of a checkpoint directory or a `.gguf` file. Raises CheckpointError."""
    path = Path(path)
    if path.suffix == ".gguf":
        from shoal.engine.gguf_weights import GGUFWeights

        return GGUFWeights(path)
    if not path.is_dir():
        raise CheckpointError(path, "no such checkpoint directory or .gguf file")
    return SafetensorsWeights(path)
