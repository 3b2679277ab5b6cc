"""Tensors of a checkpoint by their Hugging Face names, read when asked for.

Everything that can be wrong with the files is found when they are opened, before any compute.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import torch
from torch import Tensor

from shoal.checkpoint.errors import CheckpointError
from shoal.checkpoint.safetensors_file import SafetensorsFile, StoredTensor
from shoal.core.sharding import Span
from shoal.engine.read_ahead import Extent, read_extent

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
FLOATS = tuple(_TYPES)
_TYPES |= {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "I32": torch.int32}
ANY_KIND = tuple(_TYPES)
"""Element types as safetensors calls them. Those that are no plain floats are of quantised matrices."""
_TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
"""How multimodal checkpoints of both generations of transformers name the parts of their text model."""


class Part(NamedTuple):
    """A tensor of the checkpoint, or the rows of its first dimension and the columns of its second that are wanted."""

    name: str
    rows: Span | None = None
    columns: Span | None = None


class TensorSource(Protocol):
    """Tensors of a checkpoint by name, wherever they come from."""

    path: Path

    def names(self) -> list[str]: ...

    def shape(self, name: str, kinds: tuple[str, ...] = FLOATS) -> tuple[int, ...]:
        """Raises CheckpointError if the tensor's element type is none of these, so that this is known beforehand."""

    def tensor(self, name: str, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        """Made or read now, by itself. Raises CheckpointError."""

    def close(self) -> None: ...


class WeightSource(TensorSource, Protocol):
    """Tensors that lie in files, so that they can be read ahead."""

    def extent(self, part: Part) -> Extent:
        """The bytes to read for it. Of columns that is all that lies between the first and the last of them."""

    def decoded(self, part: Part, data: Tensor) -> Tensor:
        """A tensor in whatever precision it is stored, of the bytes of its extent: a view of them or new."""


def read_part(source: WeightSource, part: Part) -> Tensor:
    """In memory of its own."""
    return source.decoded(part, read_extent(source.extent(part)))


class SafetensorsWeights:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: list[SafetensorsFile] = []
        self._places: dict[str, tuple[SafetensorsFile, StoredTensor]] = {}
        try:
            for shard in _shards(path):
                file = SafetensorsFile(path / shard)
                self._files.append(file)
                self._places.update({_text_name(key): (file, stored) for key, stored in file.tensors.items()})
        except BaseException:
            self.close()
            raise

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str, kinds: tuple[str, ...] = FLOATS) -> tuple[int, ...]:
        file, stored = self._places[name]
        if stored.dtype not in kinds:
            because = f": quantised, and nothing says how; only {', '.join(FLOATS)} are read as they are"
            because = because if kinds == FLOATS else f", and its quantization_config says {' or '.join(kinds)}"
            raise CheckpointError(file.path, f"tensor {name} is {stored.dtype}{because}")
        return stored.shape

    def extent(self, part: Part) -> Extent:
        file, stored = self._places[part.name]
        if part.rows is None:
            return Extent(file.path, file.descriptor, stored.offset, stored.length)
        row_bytes = stored.length // stored.shape[0] if stored.shape[0] else 0
        offset = stored.offset + part.rows.start * row_bytes
        return Extent(file.path, file.descriptor, offset, len(part.rows) * row_bytes)

    def decoded(self, part: Part, data: Tensor) -> Tensor:
        _, stored = self._places[part.name]
        num_rows = stored.shape[:1] if part.rows is None else (len(part.rows),)
        tensor = data.view(_TYPES[stored.dtype]).view((*num_rows, *stored.shape[1:]))
        return tensor if part.columns is None else tensor[:, part.columns.slice]

    def tensor(self, name: str, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        return read_part(self, Part(name, rows, columns))

    def close(self) -> None:
        for file in self._files:
            file.close()


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


def open_weights(path: str | Path) -> WeightSource:
    """The weights of a checkpoint directory or a `.gguf` file. Raises CheckpointError."""
    path = Path(path)
    if path.suffix == ".gguf":
        from shoal.engine.gguf_weights import GGUFWeights

        return GGUFWeights(path)
    if not path.is_dir():
        raise CheckpointError(path, "no such checkpoint directory or .gguf file")
    return SafetensorsWeights(path)
