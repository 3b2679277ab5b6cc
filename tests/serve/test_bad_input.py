"""Whatever a client sends, it gets an answer in OpenAI's error form and the engine goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints import make_checkpoint
from tests.serve.running import RunningServer, alive, running

CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("tiny"), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[RunningServer]:
    with running(checkpoint) as one:
        yield one


def is_error(answer: httpx.Response, status: int | None = None) -> dict[str, Any]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert answer.status_code == status if status else 400 <= answer.status_code < 500
    return dict(error)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"{", "JSON"),
        (b"", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "JSON"),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "JSON"),
        (b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested"),
        (b'{"messages": ' + b'{"a":' * 40 + b"1" + b"}" * 40 + b"}", "nested"),
    ],
)
def test_bodies_that_are_no_requests(server: RunningServer, raw: bytes, words: str) -> None:
    assert words in is_error(server.client.post("/v1/chat/completions", content=raw), 400)["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10_000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 50}, "top_logprobs"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 200}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
        ({"messages": [{"role": "user", "content": "a"}] * 5000}, "messages"),
        ({"stop_token_ids": [99999]}, "stop_token_ids"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a b c d " * 40000}]}, "messages"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"guided_regex": "(", "n": 1}, "response_format"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_values_that_make_no_sense_are_named(server: RunningServer, changes: dict[str, Any], param: str) -> None:
    answer = server.client.post("/v1/chat/completions", json=CHAT | changes)
    assert is_error(answer, 400)["param"] == param


def test_unknown_fields_models_urls_and_methods(server: RunningServer) -> None:
    client = server.client
    error = is_error(client.post("/v1/chat/completions", json=CHAT | {"temprature": 1}), 400)
    assert error["param"] == "temprature" and "temperature" in error["message"]
    assert is_error(client.post("/v1/chat/completions", json=CHAT | {"model": "gpt-9"}), 404)["param"] == "model"
    is_error(client.get("/v1/nothing"), 404)
    is_error(client.get("/v1/chat/completions"), 405)
    is_error(client.post("/v1/completions", json={"prompt": [1, 99999]}), 400)
    is_error(client.post("/v1/completions", json={"prompt": [-1]}), 400)
    is_error(client.post("/v1/completions", json={"prompt": []}), 400)
    is_error(client.post("/v1/completions", json={"prompt": [["a"]]}), 400)
    is_error(client.post("/v1/completions", json={"prompt": "a", "suffix": "b"}), 400)
    is_error(client.get("/health", headers={f"x-{i}": "y" for i in range(200)}), 431)


def test_a_body_over_the_limit_is_refused_before_it_is_read(server: RunningServer) -> None:
    is_error(server.client.post("/v1/chat/completions", content=b" " * (9 << 20)), 413)

    def endless() -> Any:
        for _ in range(10):
            yield b" " * (1 << 20)

    is_error(server.client.post("/v1/chat/completions", content=endless()), 413)


def test_an_explosive_grammar_is_given_up_and_the_engine_goes_on(server: RunningServer) -> None:
    before = server.metric("shoal:engine_steps_total")
    pattern = "(((a{1,99}b{1,99}){1,99}c{1,99}){1,99}d{1,99}){1,99}"
    error = is_error(server.client.post("/v1/chat/completions", json=CHAT | {"guided_regex": pattern}), 400)
    assert error["code"] == "invalid_grammar"
    assert alive(server.engine_pid)
    assert server.client.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert server.metric("shoal:engine_steps_total") > before


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_fields = st.sampled_from(
    [
        "messages",
        "prompt",
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "stop",
        "logit_bias",
        "seed",
        "logprobs",
        "top_logprobs",
        "max_tokens",
        "stream",
        "response_format",
        "structured_outputs",
        "tools",
        "tool_choice",
        "echo",
        "min_tokens",
        "stop_token_ids",
        "ignore_eos",
        "priority",
        "repetition_penalty",
        "stream_options",
        "timeout",
        "user",
        "metadata",
        "chat_template_kwargs",
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]),
    changes=st.dictionaries(_fields, _json, max_size=3),
    keep=st.booleans(),
)
def test_fuzz(server: RunningServer, path: str, changes: dict[str, Any], keep: bool) -> None:
    base: dict[str, Any] = {"max_tokens": 2} | (
        {"messages": CHAT["messages"]} if path.startswith("/v1/chat") else {"prompt": "a", "tokens": [5]}
    )
    body = (base if keep else {}) | changes
    if body.get("max_tokens") is None or not isinstance(body.get("max_tokens"), int) or body["max_tokens"] > 4:
        body["max_tokens"] = 2  # valid requests stay short; other types are covered above
    answer = server.client.post(path, content=json.dumps(body))
    if answer.status_code != 200:
        is_error(answer)
    assert alive(server.engine_pid)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(raw=st.binary(max_size=64))
def test_fuzz_bytes(server: RunningServer, raw: bytes) -> None:
    is_error(server.client.post("/v1/completions", content=raw))
    assert alive(server.engine_pid)


def test_after_all_that_nothing_is_held(server: RunningServer) -> None:
    server.wait_for_metric("shoal:num_requests_running", 0)
    server.wait_for_metric("shoal:kv_cache_usage_perc", 0)
    assert server.metric("shoal:engine_failures_total") == 0


def test_a_prompt_is_too_long_by_its_tokens_not_its_characters(server: RunningServer) -> None:
    def status(text: str) -> tuple[int, str | None]:
        answer = server.client.post("/v1/completions", json={"prompt": text, "max_tokens": 1})
        return answer.status_code, answer.json().get("error", {}).get("code")

    sentence = "many gpus one movement, a shoal of fish turns as one and nobody gives the order"
    tokens = server.client.post("/tokenize", json={"prompt": sentence}).json()["count"]
    limit = server.client.get("/v1/models").json()["data"][0]["max_model_len"]
    fits = sentence * ((limit - 2) // tokens)
    assert len(fits) > 4 * limit, "control: long enough to be looked at piece by piece"
    assert status(fits) == (200, None)
    assert status(fits + sentence * 2) == (400, "context_length_exceeded")
    assert status(fits * 20) == (400, "context_length_exceeded")
