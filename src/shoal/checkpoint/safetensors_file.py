"""The head of a safetensors file: which tensors it holds, and where. Their bytes are read by whoever wants them.

Format: https://huggingface.co/docs/safetensors: the length of the header (8 bytes, little-endian), the header (JSON),
then the tensors without gaps, row by row.
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import Annotated, Any

import msgspec

from shoal.checkpoint.errors import CheckpointError

_MAX_HEADER = 100_000_000
"""The format's own limit."""
_ITEM_BYTES = (
    {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1}
    | {"U16": 2, "I16": 2, "F16": 2, "BF16": 2}
    | {"U32": 4, "I32": 4, "F32": 4}
    | {"U64": 8, "I64": 8, "F64": 8, "C64": 8}
)

Count = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]


class StoredTensor(msgspec.Struct, frozen=True):
    dtype: str
    """As the format calls it: F32, BF16, ..."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    length: int
    """Bytes."""


class SafetensorsFile:
    """An open file. Raises CheckpointError for what is not a whole one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(path, f"cannot be read: {error.strerror}") from None
        try:
            self.tensors = self._read_header()
        except BaseException as error:
            self.close()
            if isinstance(error, msgspec.DecodeError | OSError):
                raise self._corrupt(str(error)) from None
            raise

    def close(self) -> None:
        """May be called more than once."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _read_header(self) -> dict[str, StoredTensor]:
        size = os.fstat(self.descriptor).st_size
        length = int.from_bytes(os.pread(self.descriptor, 8, 0), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise self._corrupt(f"a header of {length} bytes in a file of {size}")
        head: Any = msgspec.json.decode(os.pread(self.descriptor, length, 8))
        if not isinstance(head, dict):
            raise self._corrupt("the header is no JSON object")
        head.pop("__metadata__", None)
        entries = msgspec.convert(head, dict[str, _Entry])
        self._check(entries, size - 8 - length)
        return {
            name: StoredTensor(
                entry.dtype,
                entry.shape,
                8 + length + entry.data_offsets[0],
                entry.data_offsets[1] - entry.data_offsets[0],
            )
            for name, entry in entries.items()
        }

    def _check(self, entries: dict[str, _Entry], num_bytes: int) -> None:
        """Tensors lie one behind the other, are as long as their shapes say, and reach to the end of the file."""
        at = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
            begin, end = entry.data_offsets
            item = _ITEM_BYTES.get(entry.dtype)
            if begin != at or end < begin or (item is not None and end - begin != item * prod(entry.shape)):
                raise self._corrupt(f"tensor {name} of {entry.dtype} and shape {entry.shape} lies at {begin} to {end}")
            at = end
        if at != num_bytes:
            raise self._corrupt(f"tensors of {at} bytes in a file with room for {num_bytes}")

    def _corrupt(self, reason: str) -> CheckpointError:
        return CheckpointError(self.path, f"cannot be read as safetensors (truncated or corrupt?): {reason}")
