"""Which device is a rank's, and what is said where it is not there. What CUDA itself says is for tests on a GPU."""

from __future__ import annotations

import pytest
import torch

from shoal.engine.devices import device_memory, device_of_rank, slices_hint


def test_a_cpu_is_every_ranks_and_has_no_memory_of_its_own() -> None:
    assert device_of_rank("cpu", 3) == torch.device("cpu") and device_memory(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "message"), [("abacus", "'abacus' is unknown"), ("cuda:99", "'cuda:99' is not there")]
)
def test_a_device_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        device_of_rank(name, 0)


@pytest.mark.parametrize(
    ("visible", "hint"),
    [
        (None, ""),
        ("0,1", ""),
        ("GPU-5f1c", ""),
        ("MIG-a1b2", "names 1 MIG slices"),
        ("MIG-a1b2,MIG-c3d4", "names 2 MIG slices, and CUDA shows a process one at a time"),
        ("MIG-GPU-5f1c/1/0, MIG-GPU-5f1c/2/0", "names 2 MIG slices"),
    ],
)
def test_slices_that_a_process_cannot_see_together(visible: str | None, hint: str) -> None:
    found = slices_hint({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert hint in found and bool(found) == bool(hint)


def test_the_hint_is_part_of_the_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a1b2,MIG-c3d4")
    with pytest.raises(ValueError, match=r"cuda:1.* is not there.*2 MIG slices.*an engine of one rank for each"):
        device_of_rank("cuda", 1)
