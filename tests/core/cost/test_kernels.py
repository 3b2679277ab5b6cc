"""Work of kernels: against counts made by hand, and against what CostModel says its parts read and compute."""

from __future__ import annotations

import msgspec
import pytest

from shoal.core.cost.kernels import by_part, step_kernels
from shoal.core.cost.model import CostModel
from shoal.core.cost.types import EngineShape, StepShape, WeightPrecision
from shoal.core.hardware import Cluster
from shoal.core.layout import Layout
from shoal.core.model_shape import ModelShape
from tests.core.cost.engines import H100, LLAMA_8B, LLAMA_70B, MIXTRAL, NVLINK


def engine(model: ModelShape, tp: int = 1, weights: WeightPrecision = "bfloat16", **changes: object) -> EngineShape:
    cluster = Cluster(device=H100, devices_per_node=8, num_nodes=1, scale_up=NVLINK, network=None)
    asked = EngineShape(model=model, cluster=cluster, layout=Layout(tp=tp), weights=weights)
    return msgspec.structs.replace(asked, **changes)


def decode(rows: int, context: int) -> StepShape:
    return StepShape(decode_rows=rows, decode_context=rows * context, sampled=rows)


def prefill(tokens: int, behind: int = 0) -> StepShape:
    pairs = tokens * (behind + (tokens + 1) / 2)
    return StepShape(
        prefill_tokens=tokens, prefill_rows=1, prefill_pairs=pairs, prefill_context=behind + tokens, sampled=1
    )


MIXED = StepShape(
    prefill_tokens=512,
    prefill_rows=1,
    prefill_pairs=512 * 256.5,
    prefill_context=512,
    decode_rows=31,
    decode_context=31 * 900,
    sampled=32,
)


@pytest.mark.parametrize("step", [decode(1, 1024), decode(64, 2048), prefill(8192), prefill(512, 4096), MIXED])
@pytest.mark.parametrize("model", [LLAMA_8B, LLAMA_70B, MIXTRAL], ids=lambda model: model.name)
@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("weights", ["bfloat16", "float8"])
def test_parts_read_and_compute_what_the_cost_model_says(
    model: ModelShape, tp: int, weights: WeightPrecision, step: StepShape
) -> None:
    asked = engine(model, tp, weights)
    kernels = step_kernels(asked, step)
    parts = {part.name: part for part in CostModel(asked).step(step).parts}

    def total(part: str, field: str) -> float:
        return sum(getattr(kernel, field) for kernel in kernels if kernel.part == part and kernel.name != "router")

    assert total("linear", "weight_bytes") == pytest.approx(parts["linear"].bytes)
    assert total("linear", "operations") == pytest.approx(parts["linear"].operations)
    assert total("experts", "weight_bytes") == pytest.approx(parts["experts"].bytes)
    assert total("experts", "operations") == pytest.approx(parts["experts"].operations)
    assert total("attention", "cache_bytes") == pytest.approx(parts["attention"].bytes)
    assert total("attention", "operations") == pytest.approx(parts["attention"].operations)
    assert total("head", "weight_bytes") == pytest.approx(parts["head"].bytes)
    assert total("head", "operations") == pytest.approx(parts["head"].operations)


def test_one_token_reads_every_weight_once() -> None:
    """8,030,261,248 parameters, of which a token needs one row of the embedding and norms are not counted."""
    kernels = step_kernels(engine(LLAMA_8B), decode(1, 1024))
    weights = 8_030_261_248 - 128_256 * 4096 - (2 * 32 + 1) * 4096
    assert sum(kernel.weight_bytes for kernel in kernels) == 2 * (weights + 4096)
    attention = next(kernel for kernel in kernels if kernel.name == "paged attention")
    assert attention.cache_bytes == 32 * 1024 * 2 * 8 * 128 * 2
    assert attention.operations == 32 * 1024 * 4 * 32 * 128


def test_a_chunk_computes_two_operations_a_parameter_and_token() -> None:
    kernels = step_kernels(engine(LLAMA_8B), prefill(8192))
    linear = sum(kernel.operations for kernel in kernels if kernel.part == "linear")
    assert linear == 2 * 8192 * 32 * (4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336)
    attention = next(kernel for kernel in kernels if kernel.part == "attention")
    assert attention.operations == 32 * 4 * 32 * 128 * 8192 * 8193 / 2


def test_windows_bound_what_attention_reads() -> None:
    (layer,) = LLAMA_8B.layers
    windowed = msgspec.structs.replace(layer.attention, kind="windowed", window=512)
    model = msgspec.structs.replace(LLAMA_8B, layers=(msgspec.structs.replace(layer, attention=windowed),))
    found, whole = ({k.part: k for k in step_kernels(engine(m), decode(4, 2048))} for m in (model, LLAMA_8B))
    assert found["attention"].cache_bytes == whole["attention"].cache_bytes / 4
    assert found["cache"].bytes == whole["cache"].bytes


def test_limits_are_of_bandwidth_in_decode_and_of_the_rate_in_prefill() -> None:
    for step, is_streamed in ((decode(1, 1024), True), (prefill(8192), False)):
        work = by_part(step_kernels(engine(LLAMA_8B), step), H100)
        linear = work["linear"]
        assert linear.is_streamed is is_streamed
        limit = linear.bytes / H100.memory_bandwidth if is_streamed else linear.operations / H100.rates["bfloat16"]
        assert linear.limit_seconds == pytest.approx(limit)
        assert list(work)[:3] == ["embedding", "norms", "linear"]


def test_no_step_is_predicted_to_take_less_than_its_limit() -> None:
    for model in (LLAMA_8B, LLAMA_70B, MIXTRAL):
        for step in (decode(1, 1024), decode(64, 2048), prefill(8192), MIXED):
            asked = engine(model)
            limit = sum(part.limit_seconds for part in by_part(step_kernels(asked, step), H100).values())
            assert CostModel(asked).seconds(step) > limit


def test_ranks_with_tokens_of_their_own_are_refused() -> None:
    with pytest.raises(ValueError, match="attention_dp"):
        step_kernels(engine(LLAMA_8B, attention_dp=2), decode(1, 8))
