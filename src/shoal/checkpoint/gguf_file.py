"""The head of a GGUF file: metadata and tensor index, decoded in one pass over a memory map.

The `gguf` library's reader builds an array for each element and takes 2.6 s for a vocabulary of 49,152 tokens; this
takes about 40 ms, and both the front and the engine read the file at every start. Dequantisation stays the library's.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Any

import msgspec

from shoal.checkpoint.errors import CheckpointError

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_COUNT = 1 << 28
"""No real file has more elements in an array, tensors or keys; a larger count is corruption, not data."""


_MAX_DIMENSIONS = 4
"""ggml has no tensors of more."""
_MAX_NESTING = 4
"""Arrays of arrays are allowed by the format and used by nobody."""


class TensorEntry(msgspec.Struct, frozen=True):
    name: str
    shape: tuple[int, ...]
    """As torch has it: slowest dimension first."""
    kind: int
    """ggml's number of the element type."""
    offset: int
    """Bytes from the start of the file."""


class GGUFFile:
    """Metadata, tensor index, and the file, open and mapped. Raises CheckpointError for what is not a whole one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorEntry] = {}
        try:
            with open(self.path, "rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self.descriptor = os.dup(file.fileno())
                """For who reads the tensors by other means than the map."""
        except FileNotFoundError:
            raise CheckpointError(self.path, "no such file") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(self.path, f"cannot be read: {error}") from None
        self._at = 0
        try:
            self._parse()
        except (struct.error, IndexError, UnicodeDecodeError) as error:
            self.close()
            raise CheckpointError(self.path, f"the GGUF header is truncated or corrupt ({error})") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """May be called more than once."""
        if not self.data.closed:
            self.data.close()
            os.close(self.descriptor)

    def _parse(self) -> None:
        if self.data[:4] != b"GGUF":
            raise CheckpointError(self.path, "is not a GGUF file (it does not start with 'GGUF')")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise CheckpointError(self.path, f"GGUF version {version} is not supported; supported: 2, 3")
        num_tensors, num_keys = self._count(), self._count()
        for _ in range(num_keys):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        entries = []
        for _ in range(num_tensors):
            name = self._string()
            num_dims = self._scalar("I")
            if num_dims > _MAX_DIMENSIONS:
                raise self._corrupt(f"tensor {name!r} of {num_dims} dimensions")
            dims = [self._scalar("Q") for _ in range(num_dims)]
            entries.append((name, tuple(reversed(dims)), self._scalar("I"), self._scalar("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._corrupt(f"general.alignment is {alignment!r}")
        parts = self.metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise CheckpointError(
                self.path, f"is one of {parts} parts of a model: merge them into one .gguf file first"
            )
        start = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in entries:
            self.tensors[name] = TensorEntry(name, shape, kind, start + offset)

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _count(self) -> int:
        count: int = self._scalar("Q")
        if count > _MAX_COUNT:
            raise self._corrupt(f"a count of {count}")
        return count

    def _corrupt(self, what: str) -> CheckpointError:
        return CheckpointError(self.path, f"the GGUF header is corrupt ({what})")

    def _string(self) -> str:
        length = self._count()
        end = self._at + length
        if end > len(self.data):
            raise IndexError("a string reaches beyond the file")
        text = self.data[self._at : end].decode("utf-8")
        self._at = end
        return text

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self._corrupt(f"a value of unknown type {kind}")
        element, count = self._scalar("I"), self._count()
        if element == _STRING:
            return self._strings(count)
        if element not in _SCALARS:
            if depth == _MAX_NESTING:
                raise self._corrupt("arrays nested too deeply")
            return [self._value(element, depth + 1) for _ in range(count)]
        layout = f"<{count}{_SCALARS[element]}"
        values = list(struct.unpack_from(layout, self.data, self._at))
        self._at += struct.calcsize(layout)
        return values

    def _strings(self, count: int) -> list[str]:
        """The hot loop: vocabularies and merges are hundreds of thousands of strings."""
        data, at, size = self.data, self._at, len(self.data)
        unpack = struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(count):
            (length,) = unpack(data, at)
            end = at + 8 + length
            if end > size:
                raise IndexError("a string reaches beyond the file")
            # A token may be bytes that are no text: it is kept distinguishable rather than refused.
            strings.append(data[at + 8 : end].decode("utf-8", "surrogateescape"))
            at = end
        self._at = at
        return strings
