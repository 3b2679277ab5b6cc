"""Safetensors as they are found on disk, whole and broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shoal.checkpoint.errors import CheckpointError
from shoal.engine.weights import open_weights

TENSORS = {"a.weight": torch.arange(12.0).view(3, 4), "b.weight": torch.arange(6.0).view(2, 3).bfloat16()}
ONE, TWO, INDEX = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    for file, name in ((ONE, "a.weight"), (TWO, "b.weight")):
        save_file({name: TENSORS[name]}, tmp_path / file)
    write_index(tmp_path, {"a.weight": ONE, "b.weight": TWO})
    return tmp_path


def write_index(path: Path, weight_map: Any) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 60}, "weight_map": weight_map}))


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_tensors_by_name(kind: str, request: pytest.FixtureRequest) -> None:
    source = open_weights(request.getfixturevalue(kind))
    assert sorted(source.names()) == sorted(TENSORS)
    for name, expected in TENSORS.items():
        assert source.shape(name) == tuple(expected.shape)
        found = source.tensor(name)
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    source.close()


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_weights(path)
    return str(caught.value)


def cut(keep: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(keep(file.read_bytes())) and None


@pytest.mark.parametrize(
    "damage",
    [
        cut(lambda whole: whole[: len(whole) // 2]),
        cut(lambda whole: whole[:-1]),
        cut(lambda whole: whole[:4]),
        cut(lambda whole: b""),
        cut(lambda whole: b"<html>not found</html>" * 40),
        cut(lambda whole: (1 << 40).to_bytes(8, "little") + whole[8:]),
    ],
)
def test_a_damaged_file_is_refused_when_opened(single: Path, damage: Callable[[Path], None]) -> None:
    damage(single / "model.safetensors")
    message = refused(single)
    assert message.startswith(f"{single / 'model.safetensors'}: cannot be read as safetensors (truncated or corrupt?)")


def test_a_damaged_shard_is_named(sharded: Path) -> None:
    cut(lambda whole: whole[:-1])(sharded / TWO)
    assert refused(sharded).startswith(f"{sharded / TWO}: cannot be read")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / TWO).unlink()
    assert f"{TWO}: this shard is missing; {INDEX} names 2 shards" in refused(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}, {"a": None}])
def test_an_index_that_is_none(sharded: Path, weight_map: Any) -> None:
    write_index(sharded, weight_map)
    assert f"{INDEX}: not a weight index" in refused(sharded)
    (sharded / INDEX).write_text("{")
    assert f"{INDEX}: not a weight index" in refused(sharded)


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/elsewhere.safetensors", "sub/elsewhere.safetensors"])
def test_an_index_may_not_point_outside_of_its_directory(sharded: Path, place: str) -> None:
    write_index(sharded, {"a.weight": place})
    assert "outside of its directory" in refused(sharded)


def test_element_types_that_are_not_plain_floats_are_refused_before_they_are_read(tmp_path: Path) -> None:
    tensors = {"fp8.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "int.weight": torch.ones(2, 2, dtype=torch.int8)}
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_weights(tmp_path)
    for name, kind in (("fp8.weight", "F8_E4M3"), ("int.weight", "I8")):
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {name} is {kind}: quantised"):
            source.shape(name)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_weights_are_not_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert "convert to safetensors" in refused(tmp_path)


def test_a_directory_without_weights_and_no_directory(tmp_path: Path) -> None:
    assert "holds neither model.safetensors nor" in refused(tmp_path)
    assert "no such checkpoint directory" in refused(tmp_path / "nowhere")
