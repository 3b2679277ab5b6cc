"""Which attention backend is chosen: by name, or by what a model needs; what is said where another one would do."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from shoal.core.config import EngineConfig
from shoal.engine.attention import choice, flashinfer_backend, varlen
from shoal.engine.attention.choice import CAPABILITIES, Need, Sizes, choose, make, unserved_reason
from shoal.engine.native_ops import NativeOps
from shoal.engine.worker import Worker
from tests.checkpoints import make_checkpoint

CPU = Need(device=torch.device("cpu"), kv_dtype=torch.float32, block_size=16, head_dim=64)
CUDA = replace(CPU, device=torch.device("cuda"), kv_dtype=torch.bfloat16)
NATIVE = cast("NativeOps", object())


@pytest.fixture(autouse=True)
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU of the newest kind."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "triton" or found(name, *rest))
    monkeypatch.setattr(varlen, "missing_reason", lambda: None)
    monkeypatch.setattr(flashinfer_backend, "find_spec", lambda name: None)
    monkeypatch.setattr(torch, "get_device_module", lambda device: Device)


class Device:
    capability = (9, 0)

    @classmethod
    def get_device_capability(cls, device: torch.device) -> tuple[int, int]:
        return cls.capability


def test_the_best_that_serves_is_chosen_unasked() -> None:
    assert choose("auto", CPU, NATIVE) == "native"
    assert choose("auto", CPU, None) == "portable"
    assert choose("auto", CUDA, None) == "triton"
    assert choose("auto", replace(CUDA, block_size=256), None) == "triton"
    assert choose("auto", replace(CUDA, head_dim=512), None) == "portable"
    assert choose("auto", replace(CUDA, latents=True, head_dim=576), None) == "triton"
    assert choose("auto", replace(CPU, latents=True, head_dim=576), NATIVE) == "portable"


@pytest.mark.parametrize("name", CAPABILITIES)
def test_a_backend_that_serves_is_had_by_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_backend, "missing_reason", lambda: None)
    need = CPU if name == "native" else replace(CUDA, block_size=256 if name == "varlen" else 16)
    assert choose(name, need, NATIVE) == name
    assert choose("auto", need, None) not in ("varlen", "flashinfer")


@pytest.mark.parametrize(
    ("name", "need", "message"),
    [
        (
            "triton",
            CPU,
            "triton cannot serve this model here: it is for cuda, and the device is cpu; native, portable can",
        ),
        ("native", CUDA, "it is for cpu, and the device is cuda; triton, portable can"),
        ("triton", replace(CUDA, head_dim=320), "head size 320 is not a multiple of 8, 16 to 256; portable can"),
        ("triton", replace(CUDA, block_size=48), "block size 48 is not a power of two, 16 to 256; portable can"),
        ("varlen", CUDA, "block size 16 is not a multiple of 256, at least 256; triton, portable can"),
        ("varlen", replace(CUDA, block_size=256, soft_cap=True), "it has no soft cap; triton, portable can"),
        ("varlen", replace(CUDA, block_size=256, shared_context=True), "ranks share a context; triton"),
        ("varlen", replace(CUDA, block_size=256, cut_groups=True), "some of the heads of a group only; triton"),
        ("varlen", replace(CUDA, latents=True), "it has no kernel for latents; triton, portable can"),
        ("portable", replace(CUDA, kv_dtype=torch.int8), "float32, bfloat16, float16, not int8; triton can"),
        ("native", replace(CPU, kv_dtype=torch.float8_e4m3fn), "float32, bfloat16, not float8_e4m3fn; none can"),
        ("native", replace(CUDA, latents=True, kv_dtype=torch.int8), "the device is cuda; triton, portable can"),
        ("flashinfer", CUDA, "flashinfer-python is not installed: pip install .*; triton, portable can"),
        ("flashinfer", replace(CUDA, kv_dtype=torch.int8), "it keeps KV as bfloat16, float16, not int8; triton can"),
        ("tritn", CUDA, "attention is 'tritn': use auto, native, triton, varlen, flashinfer, portable"),
        (
            "auto",
            replace(CPU, kv_dtype=torch.int8),
            r"no backend serves this model here \(native: .* not int8; triton: ",
        ),
    ],
)
def test_what_cannot_be_served_says_why_and_who_can(name: str, need: Need, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(name, need, NATIVE)


def test_native_takes_native_operations() -> None:
    with pytest.raises(ValueError, match="the native kernels are not in use; portable can"):
        choose("native", CPU, None)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "capability", (8, 0))
    float8 = replace(CUDA, kv_dtype=torch.float8_e4m3fn)
    assert unserved_reason("triton", float8) == "float8_e4m3fn takes compute capability 8.9, and cuda has 8.0"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "package triton is not installed" in str(unserved_reason("triton", CUDA))
    assert choose("auto", CUDA, None) == "portable"
    monkeypatch.setattr(varlen, "missing_reason", lambda: "torch 2.1 has none")
    assert unserved_reason("varlen", replace(CUDA, block_size=256)) == "torch 2.1 has none"


def test_sizes_say_what_they_are() -> None:
    assert str(Sizes(2, 256, multiple=2)) == "even, 2 to 256"
    assert [size for size in range(70) if Sizes(16, 64, power_of_two=True).has(size)] == [16, 32, 64]


def test_made_is_what_was_chosen() -> None:
    names = [make(name, torch.device("cpu"), NATIVE, None, None).name for name in ("portable", "varlen")]
    assert names == ["portable", "varlen"]
    assert choice.make("portable", torch.device("cpu"), None, None, 512).serves_latents


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"attention": "varlen"},
            "attention: varlen cannot serve this model here: it is for cuda, and the device is cpu",
        ),
        ({"kv_dtype": "int8"}, "attention: no backend serves this model here"),
    ],
)
def test_a_worker_says_so_as_it_starts(settings: dict[str, Any], message: str, tmp_path: Any) -> None:
    config = EngineConfig(model=str(make_checkpoint("qwen3", tmp_path)), device="cpu", threads=1, **settings)
    with pytest.raises(ValueError, match=message):
        Worker(config).start()


def test_a_worker_takes_the_backend_it_is_told(tmp_path: Any) -> None:
    path = str(make_checkpoint("qwen3", tmp_path))
    worker = Worker(EngineConfig(model=path, device="cpu", threads=1, attention="portable", kv_cache_bytes=1 << 22))
    try:
        assert worker.start().attention == "portable"
    finally:
        worker.close()
