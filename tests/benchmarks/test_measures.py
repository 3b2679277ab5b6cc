"""The figures of the peers benchmark, against values worked out by hand."""

import pytest

import measures
import workloads
from shoal.core.model_spec import ModelSpec, RopeSpec

SPEC = ModelSpec(
    family="llama",
    num_layers=2,
    hidden_size=8,
    intermediate_size=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=32,
    max_len=64,
    norm_eps=1e-5,
    rope=RopeSpec(theta=1e4),
    tied_embeddings=True,
)


def workload(*lens):
    return workloads.Workload("x", "", [workloads.WorkItem([1] * prompt, output) for prompt, output in lens])


def test_workloads_are_what_the_seed_says():
    made = workloads.make_workloads(49152)
    again = workloads.make_workloads(49152)
    assert made == again
    assert [len(made[name].items) for name in "abcd"] == [1, 16, 64, 1]
    assert made["b"].items == made["c"].items[:16]
    assert [(len(made[n].items[0].prompt), made[n].items[0].max_tokens) for n in "ad"] == [(128, 128), (2048, 16)]
    assert all(32 <= len(item.prompt) <= 512 and 32 <= item.max_tokens <= 256 for item in made["c"].items)
    ids = [token for item in made["c"].items for token in item.prompt]
    assert min(ids) >= workloads.FIRST_TOKEN_ID and max(ids) < 49152


def test_one_request():
    raw = {"seconds": 3.0, "token_times": [[1.0, 1.5, 2.0, 3.0]]}
    figures = measures.measure(workload((10, 4)), raw)
    assert figures["output_rate"] == pytest.approx(4 / 3)
    assert figures["tpot_p50"] == pytest.approx(2 / 3)
    assert figures["decode_rate"] == pytest.approx(1.5)
    assert figures["prefill_rate"] == pytest.approx(10)


def test_several_requests_have_no_single_stream_rates():
    raw = {"seconds": 4.0, "token_times": [[1.0, 2.0], [2.0, 4.0], [3.0, 4.0]]}
    figures = measures.measure(workload((4, 2), (4, 2), (4, 2)), raw)
    assert (figures["ttft_p50"], figures["ttft_p99"], figures["tpot_p50"]) == (2.0, 3.0, 1.0)
    assert "decode_rate" not in figures and "prefill_rate" not in figures


@pytest.mark.parametrize(
    ("values", "fraction", "expected"),
    [([5.0], 0.99, 5.0), (list(range(1, 101)), 0.99, 99), (list(range(1, 65)), 0.99, 64), ([3, 1, 2], 0.5, 2)],
)
def test_percentile_is_nearest_rank(values, fraction, expected):
    assert measures.percentile(values, fraction) == expected


def test_flops_count_the_head_only_where_a_token_is_drawn():
    # A layer: q 8x8, k and v 8x4 each, output 8x8, three MLP matrices 8x16.
    matrices = 2 * (64 + 32 + 32 + 64 + 3 * 128)
    head, attention = 8 * 32, 4 * 2 * 4 * 2
    # Prompt of 3, 2 drawn: positions 1 to 4 are computed, the third and the fourth draw.
    expected = 4 * 2 * matrices + 2 * 2 * head + attention * (1 + 2 + 3 + 4)
    assert measures.workload_flops(workload((3, 2)), SPEC) == expected


def test_decode_reads_all_weights_and_the_mean_context():
    # Two layers, keys and values, one head of 4, float32: 64 bytes a token; the context grows from 10 to 14.
    assert measures.decode_bytes_per_token(workload((10, 4)), SPEC, 1000) == 1000 + 12 * 64
