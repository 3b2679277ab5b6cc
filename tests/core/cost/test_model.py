"""Times of steps: what must hold whatever the constants are, and worked examples of planner.md."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.core.cost.calibration import Calibration, Residual, decode, encode
from shoal.core.cost.model import PARTS, CostModel
from shoal.core.cost.operators import busiest, distinct_experts, roofline
from shoal.core.cost.profiles import PROFILES, profile
from shoal.core.cost.types import StepShape
from tests.core.cost.engines import DEEPSEEK, H100, LLAMA_8B, LLAMA_70B, LLAMA_405B, MIXTRAL, TCP, cluster, engine


def decodes(rows: int, context: int) -> StepShape:
    return StepShape(decode_rows=rows, decode_context=rows * context, sampled=rows)


def prompt(tokens: int, rows: int = 1) -> StepShape:
    return StepShape(
        prefill_tokens=tokens * rows,
        prefill_rows=rows,
        prefill_pairs=rows * tokens * (tokens + 1) / 2,
        prefill_context=rows * tokens,
        sampled=rows,
    )


ENGINES = {
    "dense": engine(tp=8),
    "one device": engine(LLAMA_8B),
    "mixture": engine(MIXTRAL, tp=2, ep=2),
    "latent": engine(DEEPSEEK, tp=8, weights="float8-block"),
    "groups": engine(DEEPSEEK, attention_dp=8, weights="float4", profile="tensorrt-llm"),
    "stages": engine(LLAMA_405B, nodes=2, tp=8, pp=2, weights="bfloat16"),
    "split context": engine(LLAMA_70B, tp=4, cp=2),
}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("shape", [decodes(1, 100), decodes(64, 2000), prompt(2000), StepShape()])
def test_parts_sum_to_the_whole_and_both_paths_agree(name, shape):
    cost = CostModel(ENGINES[name])
    step = cost.step(shape)
    assert [part.name for part in step.parts] == list(PARTS)
    assert sum(part.seconds for part in step.parts) == pytest.approx(step.seconds)
    assert cost.seconds(shape) == pytest.approx(step.seconds)
    assert all(part.seconds >= 0 for part in step.parts)
    assert step.low <= step.seconds <= step.high
    assert (step.seconds == 0) == (shape.tokens == 0)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(ENGINES)), st.integers(1, 300), st.integers(1, 50), st.integers(1, 100_000))
def test_more_rows_and_longer_contexts_never_take_less(name, rows, more, context):
    cost = CostModel(ENGINES[name])
    base = cost.seconds(decodes(rows, context))
    assert cost.seconds(decodes(rows + more, context)) >= base * (1 - 1e-9)
    assert cost.seconds(decodes(rows, context + 1000)) >= base


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(ENGINES)), st.integers(1, 8000), st.integers(1, 2000))
def test_longer_prompts_never_take_less(name, tokens, more):
    cost = CostModel(ENGINES[name])
    assert cost.seconds(prompt(tokens + more)) >= cost.seconds(prompt(tokens)) * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([LLAMA_8B, LLAMA_70B, MIXTRAL]),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 256),
    st.integers(1, 8000),
)
def test_nothing_is_faster_than_light(model, tp, rows, context):
    """Weights that are visited and caches must be read once, and products computed at the printed rate."""
    cost = CostModel(engine(model, tp=tp, weights="bfloat16"))
    share = 1.0
    if model.is_mixture:
        share = distinct_experts(8, 2, rows, 0.99) / 8
    read = 2 * model.num_parameters(active=model.is_mixture) * (share if model.is_mixture else 1) * 0.9
    cache = rows * context * model.kv_bytes_per_token(2)
    assert cost.seconds(decodes(rows, context)) >= (read + cache) / tp / H100.memory_bandwidth * 0.75
    operations = 2 * (model.num_parameters(active=True) - 2 * model.vocab_size * model.hidden_size) * context
    assert cost.seconds(prompt(context)) >= operations / tp / H100.rates["bfloat16"]


def test_a_decode_step_of_llama_70b_over_eight_h100():
    """Measured by InferenceX with vLLM: TPOT 9.1 ms at 4 clients, 12.7 at 64 (H200, a third more bandwidth)."""
    cost = CostModel(engine(tp=8, cache="float8"))
    assert cost.seconds(decodes(4, 1400)) * 1e3 == pytest.approx(9.1, rel=0.15)
    step = cost.step(decodes(64, 1400))
    reduces = next(part for part in step.parts if part.name == "collectives")
    # 160 all-reduces of 1 MiB, of 15 us each.
    assert reduces.seconds == pytest.approx(160 * 15e-6, rel=1e-6)
    assert step.link_bytes["nvlink4"] == pytest.approx(160 * 2 * 7 / 8 * 64 * 8192 * 2)


def test_the_8_gb_all_reduce_of_guides_is_32_kib_a_layer_and_token():
    sent = CostModel(engine(tp=8)).step(decodes(1, 1)).link_bytes["nvlink4"]
    assert sent / (2 * 7 / 8) / 80 == 32_768


def test_tensor_parallelism_over_tcp_is_mostly_waiting():
    near, far = engine(LLAMA_70B, tp=8), engine(LLAMA_70B, tp=16, cluster=cluster(2, TCP))
    assert CostModel(far).seconds(decodes(8, 1000)) > 2 * CostModel(near).seconds(decodes(8, 1000))
    parts = {part.name: part.seconds for part in CostModel(far).step(decodes(8, 1000)).parts}
    assert parts["collectives"] > 0.5 * sum(parts.values())


def test_pipelines_shorten_no_token_but_share_the_stage():
    whole = CostModel(engine(LLAMA_70B, tp=4))
    stages = CostModel(engine(LLAMA_70B, tp=4, pp=2))
    shape = decodes(16, 1000)
    assert stages.seconds(shape) >= whole.seconds(shape) * 0.99
    assert stages.stage_seconds(shape) < 0.7 * whole.seconds(shape)


def test_latent_attention_is_bound_by_computing_where_the_bandwidth_is_high():
    """128 heads x (576 + 512) x 2 operations for 1,152 bytes: 242 a byte; an H200 does 206 a byte, an H100 295."""
    shape = decodes(256, 8000)
    times = {}
    for bandwidth in (3.35e12, 4.8e12, 9.6e12):
        device = msgspec.structs.replace(H100, memory_bandwidth=bandwidth)
        cost = CostModel(engine(DEEPSEEK, cluster=cluster(device=device), cache="bfloat16"))
        times[bandwidth] = next(part.seconds for part in cost.step(shape).parts if part.name == "attention")
    assert times[9.6e12] > 0.6 * times[4.8e12]


@pytest.mark.parametrize(("tokens", "expected"), [(1, 8), (32, 163), (128, 252)])
def test_distinct_experts_of_deepseek(tokens, expected):
    assert distinct_experts(256, 8, tokens) == pytest.approx(expected, abs=1)
    assert distinct_experts(256, 8, tokens, skew=0.3) <= distinct_experts(256, 8, tokens)


def test_distinct_experts_of_mixtral():
    assert distinct_experts(8, 2, 8) == pytest.approx(7.2, abs=0.05)


def test_the_busiest_of_many_has_more_than_the_mean_and_less_so_with_many_visits():
    assert busiest(10, 1) == 1
    assert busiest(10, 8) > busiest(10, 2) > 1
    assert busiest(1e6, 8) == pytest.approx(1, abs=0.01)


def test_a_roofline_is_between_the_larger_and_the_sum():
    assert roofline(1, 0) == 1
    assert 1 < roofline(1, 1) < 2
    assert roofline(1, 1e-6) == pytest.approx(1)


def test_a_calibration_takes_the_place_of_data_sheets():
    plain = CostModel(engine(tp=8))
    shape = decodes(16, 1000)
    slow = Calibration(
        device="H100-SXM",
        fractions={"stream.float8": 0.4},
        factors={"attention": 2.0},
        step_seconds=5e-3,
        residuals={"step": Residual(0.9, 1.0, 1.1, 30)},
    )
    found = CostModel(engine(tp=8), decode(encode(slow))).step(shape)
    before = {part.name: part.seconds for part in plain.step(shape).parts}
    after = {part.name: part.seconds for part in found.parts}
    assert after["attention"] == pytest.approx(2 * before["attention"])
    assert after["linear"] > 1.5 * before["linear"]
    assert after["host"] == pytest.approx(5e-3 + 16 * profile("vllm").row_seconds)
    assert (found.low, found.high) == pytest.approx((0.9 * found.seconds, 1.1 * found.seconds))
    assert found.provenance == "calibrated"
    assert plain.step(shape).provenance == "datasheet"


@pytest.mark.parametrize("text", [b"{", b'{"factors": {"attention": -1}}', b'{"unknown": 1}'])
def test_what_is_no_calibration_is_refused(text):
    with pytest.raises(ValueError, match=r"not a calibration file|factors\.attention"):
        decode(text)


def test_residuals_are_looked_up_from_the_most_particular():
    table = Calibration(residuals={"tpot": Residual(1, 1, 1, 1), "tpot/vllm": Residual(2, 2, 2, 2)})
    assert table.residual("tpot", "vllm", "dense") == Residual(2, 2, 2, 2)
    assert table.residual("tpot", "sglang", "dense") == Residual(1, 1, 1, 1)
    assert table.residual("ttft", "vllm") is None


def test_profiles_go_by_their_usual_names():
    assert profile("TRTLLM") is PROFILES["tensorrt-llm"]
    with pytest.raises(ValueError, match="vllm, sglang"):
        profile("vlm")


def test_bytes_by_link_are_those_of_the_ways_that_the_time_is_of():
    """Over two nodes of 8: reduce-scatter and all-gather inside, and an eighth of the tensor over the network."""
    tensor = 160 * 64 * 8192 * 2
    sent = CostModel(engine(tp=16, nodes=2)).step(decodes(64, 1000)).link_bytes
    assert sent == pytest.approx({"nvlink4": 2 * 7 / 8 * tensor, "ndr": 2 * 1 / 2 * tensor / 8})


def test_a_pipeline_pays_the_network_where_it_crosses_nodes():
    """Of three ways from stage to stage over two nodes of 8, one is between the nodes."""
    across = CostModel(engine(tp=4, pp=4, nodes=2)).step(decodes(64, 1000))
    assert across.link_bytes["ndr"] == 64 * 8192 * 2
    inside = CostModel(engine(tp=2, pp=4)).step(decodes(64, 1000))
    assert set(inside.link_bytes) == {"nvlink4"}
    slow = {part.name: part.seconds for part in across.parts}["pipeline"]
    others = {part.name: part.seconds for part in across.parts}
    stages = 3 * (others["linear"] + others["attention"] + others["collectives"] + others["kernels"])
    size = 64 * 8192 * 2
    assert slow - stages == pytest.approx(2 * (4.2e-6 + size / (450e9 * 0.78)) + 18e-6 + size / (50e9 * 0.7), rel=1e-6)
