"""The OpenAI dialect without a socket: events cut anywhere, metrics pages, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.fleet_types import EndpointFailure
from shoal.core.types import Rejected, TokenLogprobs
from shoal.serve import openai_dialect as dialect

VLLM_PAGE = b"""
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a}b"} 3.0
vllm:num_requests_running{engine="1",model_name="a}b"} 4.0
vllm:num_requests_waiting{engine="0",model_name="a"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="a",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="a"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="a"} 0.5
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="a"} 70.0
vllm:iteration_tokens_total_count{engine="0",model_name="a"} 1e+03
vllm:iteration_tokens_total_sum{engine="0",model_name="a"} 123.0
vllm:cache_config_info{_block_size_resolved="True",block_size="128",hash_block_size="7",num_gpu_blocks="182"} 1.0
"""
SGLANG_PAGE = b"""
sglang:num_running_reqs{model_name="a"} 5.0
sglang:num_queue_reqs{model_name="a"} NaN
sglang:token_usage{model_name="a"} 0.1
sglang:realtime_tokens_total{mode="decode",model_name="a"} 40.0
sglang:realtime_tokens_total{mode="prefill_compute",model_name="a"} 60.0
"""
SHOAL_PAGE = b"""
shoal:num_requests_running 1.0
shoal:num_requests_waiting 0.0
shoal:kv_cache_usage_perc 0.75
shoal:engine_steps_total 12.0
"""


@given(
    st.lists(st.binary(min_size=1).filter(lambda b: b == b.strip() and b"\n" not in b)),
    st.sampled_from([b"\n\n", b"\r\n\r\n"]),
    st.data(),
)
def test_events_are_the_same_wherever_they_are_cut(payloads: list[bytes], end: bytes, data: st.DataObject) -> None:
    stream = b": a comment\n\n" + b"".join(b"event: x\ndata: " + payload + end for payload in payloads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    events = dialect.Events()
    seen = [
        event
        for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)
        for event in events.feed(stream[start:stop])
    ]
    assert seen == payloads


@pytest.mark.parametrize(
    ("page", "load"),
    [
        (VLLM_PAGE, dialect.Load(7, 2, 0.5, 1000, 128, 182)),
        (SGLANG_PAGE, dialect.Load(5, None, 0.1, 100)),
        (SHOAL_PAGE, dialect.Load(1, 0, 0.75, 12)),
        (b"", dialect.Load()),
        (b'{"object": "list"}', dialect.Load()),
        (b"\xff\x00", dialect.Load()),
    ],
)
def test_metrics_of_each_server(page: bytes, load: dialect.Load) -> None:
    assert dialect.load_of(page) == load


@pytest.mark.parametrize(
    ("status", "content", "message", "field"),
    [
        (400, b'{"error":{"message":"bad","param":"n"}}', "bad", "n"),
        (422, b'{"detail":[{"msg":"x"}]}', "[{'msg': 'x'}]", None),
        (400, b'{"object":"error","message":"no"}', "no", None),
        (413, b"<html>", "<html>", None),
        (400, b"", "the endpoint answered 400", None),
    ],
)
def test_a_clients_mistake(status: int, content: bytes, message: str, field: str | None) -> None:
    assert dialect.refusal_of("r", status, {}, content) == Rejected("r", message, field)


@pytest.mark.parametrize("status", [301, 401, 403, 404, 408, 500, 502])
def test_what_is_no_clients_mistake(status: int) -> None:
    refusal = dialect.refusal_of("r", status, {}, b"")
    assert isinstance(refusal, EndpointFailure) and refusal.kind == "error"
    assert ("api_key" in refusal.message) == (status in (401, 403))


@pytest.mark.parametrize(
    ("value", "seconds"), [(b"3", 3.0), (b"0.5", 0.5), (b"Wed, 21 Oct 2026 07:28:00 GMT", None), (b"-1", None)]
)
def test_retry_after(value: bytes, seconds: float | None) -> None:
    refusal = dialect.refusal_of("r", 503, {b"retry-after": value}, b"")
    assert isinstance(refusal, EndpointFailure) and refusal.retry_after == seconds


def test_log_probabilities_by_id_most_probable_first() -> None:
    sent = dialect.Logprobs(["token_id:7"], [-3.0], [{"token_id:7": -3.0, "token_id:1": -0.5, "token_id:2": -1.0}])
    assert dialect.logprobs_of(sent, 1, 2) == [TokenLogprobs(-3.0, [1, 2], [-0.5, -1.0])]
    assert dialect.logprobs_of(sent, 1, 0) == [TokenLogprobs(-3.0, [], [])]


@pytest.mark.parametrize(
    "sent",
    [
        None,
        dialect.Logprobs([], [], []),
        dialect.Logprobs([" a"], [-1.0], [{" a": -1.0}]),
        dialect.Logprobs(["token_id:x"], [-1.0], [{"token_id:x": -1.0}]),
        dialect.Logprobs(["token_id:1"], [-1.0], [{}, {}]),
    ],
)
def test_log_probabilities_that_cannot_be_told(sent: dialect.Logprobs | None) -> None:
    with pytest.raises(dialect.Unreadable):
        dialect.logprobs_of(sent, 1, 1)
