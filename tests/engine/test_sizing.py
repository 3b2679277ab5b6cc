"""Sizing by a measured step: the step itself, on real workers, and what follows from what an allocator says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from shoal.core.config import EngineConfig
from shoal.core.layout import Layout
from shoal.core.model_config import spec_from_config
from shoal.core.quantization import Quantization, QuantScheme
from shoal.engine.memory import OutOfMemory, plan_blocks
from shoal.engine.sizing import GRAPHS_FRACTION, RESERVE_FRACTION, WeightNeed, find_room, largest_step, measure
from shoal.engine.worker import Worker
from tests.checkpoints import make_checkpoint

MIB, GIB = 1024**2, 1024**3
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


class FakeDevice:
    """An allocator as torch's: it keeps what tensors leave, until it is trimmed. Others have some of the memory."""

    def __init__(self, total: int, others: int = 0, name: str = "H100 MIG 1g.10gb") -> None:
        self.name, self.total = name, total
        self._others, self._tensors, self._kept, self._peak = others, 0, 0, 0

    def take(self, size: int) -> None:
        if self._tensors + size > self.total - self._others:
            raise torch.OutOfMemoryError(f"tried to allocate {size}")
        self._tensors += size
        self._kept, self._peak = max(self._kept, self._tensors), max(self._peak, self._tensors)

    def give(self, size: int) -> None:
        self._tensors -= size

    def load_library(self, size: int) -> None:
        self._others += size

    def free(self) -> int:
        return self.total - self._others - self._kept

    def allocated(self) -> int:
        return self._tensors

    def reset_peak(self) -> None:
        self._peak = self._tensors

    def peak(self) -> int:
        return self._peak

    def trim(self) -> None:
        self._kept = self._tensors


def step_of(device: FakeDevice, *sizes: int, library: int = 0) -> Callable[[], None]:
    """Temporaries one after another, each two alive together."""

    def run() -> None:
        device.load_library(library)
        before = 0
        for size in sizes:
            device.take(size)
            device.give(before)
            before = size
        device.give(before)

    return run


# --- the step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "tokens", "max_len"),
    [(64, 512, 4096), (4, 512, 100), (1, 8192, 131072), (256, 64, 4096), (8, 8, 2), (1, 1, 1), (3, 1000, 50)],
)
def test_the_largest_step_has_all_tokens_and_all_rows_that_a_step_may_have(
    slots: int, tokens: int, max_len: int
) -> None:
    config = EngineConfig(model="m", max_sequences=slots, max_batch_tokens=tokens)
    plan = largest_step(config, max_len)
    assert sorted(row.slot for row in plan.rows) == list(range(min(slots, tokens)))
    longest = max(1, max_len - 1)
    assert sum(row.num_tokens for row in plan.rows) == min(tokens, slots * min(longest, 8191))
    ends = [row.start + row.num_tokens for row in plan.rows]
    assert all(row.sample and row.num_tokens > 0 and row.start >= 0 for row in plan.rows)
    assert max(ends) <= longest
    assert all(len(a.block_ids) * config.block_size >= max(ends) for a in plan.assigned)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3"])
def test_a_worker_runs_it_and_takes_what_is_left(family: str, tmp_path: Path) -> None:
    device = FakeDevice(64 * MIB, others=8 * MIB)
    path = make_checkpoint(family, tmp_path)
    config = EngineConfig(
        model=str(path), device="cpu", ops="torch", max_sequences=5, max_batch_tokens=40, max_len=64, block_size=16
    )
    worker = Worker(config, memory=device)
    info = worker.start()
    assert worker.decoder is not None
    block_bytes = worker.decoder.kv_bytes_per_token() * 16
    assert info.num_blocks == min(int(56 * MIB - 64 * MIB * RESERVE_FRACTION) // block_bytes, 5 * 4)
    assert [phase.name for phase in info.start.phases] == ["open", "read", "convert", "measure", "allocate", "warm-up"]
    worker.close()


def test_a_step_that_does_not_fit_names_what_to_lower() -> None:
    device = FakeDevice(GIB, others=512 * MIB)
    config = EngineConfig(model="m", max_batch_tokens=4096, max_sequences=32)
    with pytest.raises(OutOfMemory, match=r"max_batch_tokens 4096 and max_sequences 32 .* 512.0 MiB are free; lower"):
        find_room(config, device, step_of(device, 400 * MIB, 200 * MIB), are_captured=True)


# --- what is left ---------------------------------------------------------------------------------------------------


def test_measured_is_the_peak_of_the_step_and_what_is_free_behind_it() -> None:
    device = FakeDevice(10 * GIB, others=GIB)
    device.take(4 * GIB)  # the weights
    measured = measure(device, step_of(device, 300 * MIB, 500 * MIB, 100 * MIB, library=200 * MIB))
    assert measured.step == 800 * MIB
    assert measured.free == 5 * GIB - 200 * MIB, "what the step left in the allocator is free, and libraries stay"
    assert measure(device, step_of(device, 100 * MIB)).step == 100 * MIB, "not the peak of before"


@pytest.mark.parametrize("are_captured", [True, False])
def test_the_cache_gets_what_step_graphs_and_reserve_leave(are_captured: bool) -> None:
    device = FakeDevice(10 * GIB)
    device.take(4 * GIB)
    config = EngineConfig(model="m")
    room, graphs = find_room(config, device, step_of(device, GIB), are_captured)
    assert graphs == (int(5 * GIB * GRAPHS_FRACTION) if are_captured else 0)
    assert room.available == 5 * GIB and room.default == 5 * GIB - graphs - int(10 * GIB * RESERVE_FRACTION)
    # All of it together fits.
    device.take(room.default + graphs)
    device.take(GIB)
    asked = EngineConfig(model="m", kv_cache_bytes=6 * GIB)
    wanted = r"6.0 GiB and 5.0 GiB are available \(H100 MIG 1g.10gb has 10.0 GiB, of which 6.0 GiB are free with the"
    with pytest.raises(OutOfMemory, match=wanted + r".*a step of 512 tokens and 64 sequences takes 1.0 GiB"):
        plan_blocks(asked, block_bytes=MIB, max_len=1024, room=room)


def test_a_step_that_leaves_nothing_leaves_no_room() -> None:
    device = FakeDevice(GIB, others=500 * MIB)
    room, graphs = find_room(EngineConfig(model="m"), device, step_of(device, 514 * MIB, library=10 * MIB), True)
    assert room[:2] == (0, 0) and graphs == 0
    with pytest.raises(OutOfMemory, match="there is room for 0 B"):
        plan_blocks(EngineConfig(model="m", max_len=64), block_bytes=MIB, max_len=64, room=room)


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text", "deepseek_v3"])
def test_what_weights_take_is_known_before_they_are_read(family: str, tmp_path: Path) -> None:
    path = make_checkpoint(family, tmp_path)
    worker = Worker(EngineConfig(model=str(path), device="cpu", ops="torch", kv_cache_bytes=10**6, max_len=64))
    info = worker.start()
    assert WeightNeed(info.spec, Layout(), "float32").bytes() == pytest.approx(info.weight_bytes, rel=0.02)
    worker.close()


@pytest.mark.parametrize(
    ("free", "layout", "quantize", "message"),
    [
        (139, Layout(), None, r"take 131.4 GiB as bfloat16 \(tp1\)"),
        (
            100,
            Layout(),
            None,
            r"has 100.0 GiB of 141.0 GiB free; what would fit: quantize fp8 \(67.7 GiB a rank\), or tp 2",
        ),
        (38, Layout(tp=2), None, r"as bfloat16 \(tp2\).*what would fit: quantize fp8 .*, or tp 4 \("),
        (20, Layout(), None, r"what would fit: tp 8 \(16.4 GiB a rank\)"),
        (100, Layout(), "fp8", None),
        (50, Layout(), "fp8", r"as float8 .*what would fit: quantize int4 \(3\d\.\d GiB a rank\), or tp 2"),
        (4, Layout(), None, r"what would fit: quantize fp8 on tp 32 "),
        (0.5, Layout(), None, "no precision and no number of ranks fits"),
    ],
)
def test_weights_that_do_not_fit_name_what_would(
    free: float, layout: Layout, quantize: Quantization | None, message: str | None
) -> None:
    device = FakeDevice(141 * GIB, others=int((141 - free) * GIB), name="H200")
    need = WeightNeed(spec_from_config(LLAMA_70B), layout, "bfloat16", quantize)
    if message is None:
        assert need.load(device, lambda: "loaded") == "loaded"
    elif free > 130:  # too close to be sure: found out while loading

        def load() -> None:
            device.take(100 * GIB)
            device.take(50 * GIB)

        with pytest.raises(OutOfMemory, match=message):
            need.load(device, load)
    else:
        with pytest.raises(OutOfMemory, match=message):
            need.load(device, lambda: pytest.fail("it cannot fit"))


def test_a_checkpoint_that_is_quantised_is_not_to_be_quantised_again() -> None:
    scheme = QuantScheme(weights="fp8", form="fp8", group=128, rows=128, activations="group")
    spec = msgspec.structs.replace(spec_from_config(LLAMA_70B), quantization=scheme)
    device = FakeDevice(141 * GIB, others=100 * GIB)
    with pytest.raises(OutOfMemory, match=r"as float8 .*what would fit: tp 2 \([\d.]+ GiB a rank\)$"):
        WeightNeed(spec, Layout(), "bfloat16", "fp8").load(device, lambda: None)
