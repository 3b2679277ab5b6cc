"""What a checkpoint must hold is what the model has, and what is wrong with a file is said by name."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.checkpoint.errors import CheckpointError
from shoal.core.model_config import spec_from_config
from shoal.engine.checkpoint_shapes import check_shapes, expected_shapes
from shoal.engine.weights import open_weights
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.core.test_model_spec import CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_have_as_many_parameters_as_the_model(name: str) -> None:
    spec = spec_from_config(CONFIGS[name])
    assert sum(prod(shape) for shape in expected_shapes(spec).values()) == spec.num_parameters()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_tensors_are_those_of_a_file(family: str, tmp_path: Path) -> None:
    path = make_checkpoint(family, tmp_path)
    spec = spec_from_config(json.loads((path / "config.json").read_text()))
    source = open_weights(path)
    assert {name: source.shape(name) for name in source.names()} == expected_shapes(spec)
    source.close()


def checked(path: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    save_file(tensors, path / "model.safetensors")
    source = open_weights(path)
    try:
        check_shapes(source, spec_from_config(config | changes))
    finally:
        source.close()


def test_layers_for_drafting_are_left_aside_and_others_are_not(tmp_path: Path) -> None:
    path = make_checkpoint("deepseek_v3", tmp_path)
    tensors = load_file(path / "model.safetensors")
    extra = {"model.layers.3.eh_proj.weight": torch.zeros(4, 4)}
    checked(path, tensors | extra, num_nextn_predict_layers=1)
    for changes in ({"num_nextn_predict_layers": 0, "num_mtp_layers": 0}, {"num_nextn_predict_layers": -1}):
        with pytest.raises(CheckpointError, match=r"no place for tensor model\.layers\.3\.eh_proj"):
            checked(path, tensors | extra, **changes)
    with pytest.raises(CheckpointError, match=r"no place for tensor model\.layers\.4\.eh_proj"):
        checked(path, tensors | {"model.layers.4.eh_proj.weight": torch.zeros(4, 4)}, num_nextn_predict_layers=1)


def test_a_missing_expert_and_a_quantised_file_are_named(tmp_path: Path) -> None:
    path = make_checkpoint("deepseek_v3", tmp_path)
    tensors = load_file(path / "model.safetensors")
    scale = {"model.layers.1.mlp.experts.0.up_proj.weight_scale_inv": torch.ones(1, 1)}
    with pytest.raises(CheckpointError, match=r"no place for tensor .*weight_scale_inv: the file holds quantised"):
        checked(path, tensors | scale)
    del tensors["model.layers.2.mlp.experts.5.down_proj.weight"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.experts\.5\.down_proj\.weight is missing$"):
        checked(path, tensors)
