"""Heads of safetensors files: where the tensors lie, and files that do not hold what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from shoal.checkpoint.errors import CheckpointError
from shoal.checkpoint.safetensors_file import SafetensorsFile

TENSORS = {
    "matrix": torch.arange(12.0).view(3, 4),
    "half": torch.arange(5.0).bfloat16(),
    "number": torch.tensor(7.0),
    "empty": torch.zeros(0, 4),
    "ids": torch.arange(3),
}


def test_tensors_lie_where_it_says(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    whole = path.read_bytes()
    file = SafetensorsFile(path)
    file.close()
    file.close()
    assert set(file.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        stored = file.tensors[name]
        assert stored.shape == tuple(tensor.shape) and stored.length == tensor.nbytes
        found = whole[stored.offset : stored.offset + stored.length]
        assert found == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    with safe_open(path, "pt") as reference:
        assert {name: s.dtype for name, s in file.tensors.items()} == {
            name: reference.get_slice(name).get_dtype() for name in TENSORS
        }


def write(path: Path, head: Any, num_bytes: int) -> Path:
    text = json.dumps(head).encode() if not isinstance(head, bytes) else head
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {"a": entry(0, 8, [2]), "b": entry(8, 24, [2, 2])}


@pytest.mark.parametrize(
    ("head", "num_bytes"),
    [
        ([], 0),
        (b"{", 0),
        (b"\xff\xfe", 0),
        ({"a": 3}, 0),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8),
        ({"a": entry(0, -8, [2])}, 0),
        ({"a": entry(8, 0, [2])}, 8),
        ({"a": entry(0, 8, [3])}, 8),  # shorter than its shape
        ({"a": entry(0, 8, [2], "BF16")}, 8),
        (GOOD, 23),
        (GOOD, 25),
        (GOOD | {"b": entry(12, 28, [2, 2])}, 28),  # a hole
        (GOOD | {"b": entry(4, 20, [2, 2])}, 20),  # an overlap
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, head: Any, num_bytes: int) -> None:
    SafetensorsFile(write(tmp_path / "good", GOOD | {"__metadata__": {"x": "y"}}, 24)).close()
    with pytest.raises(CheckpointError, match=r"bad: cannot be read as safetensors \(truncated or corrupt\?\)"):
        SafetensorsFile(write(tmp_path / "bad", head, num_bytes))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone: cannot be read: No such file"):
        SafetensorsFile(tmp_path / "gone")
