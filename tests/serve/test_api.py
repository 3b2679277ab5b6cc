"""The API as its clients use it, against a real engine process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shoal.checkpoint.tokenizer import load_tokenizer
from tests.serve.running import RunningServer

GREEDY = {"temperature": 0, "ignore_eos": True, "max_tokens": 12}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def chat(server: RunningServer, content: str = "hello", **fields: Any) -> httpx.Response:
    return server.client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}], **fields}
    )


def complete(server: RunningServer, prompt: Any = "hello", **fields: Any) -> httpx.Response:
    return server.client.post("/v1/completions", json={"prompt": prompt, **fields})


def events(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.splitlines() if line]


def test_chat_has_openais_form(server: RunningServer) -> None:
    answer = chat(server, **GREEDY)
    body = answer.json()
    assert answer.status_code == 200 and answer.headers["x-request-id"] in body["id"]
    assert body["object"] == "chat.completion" and body["model"] == "tiny"
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "length" and choice["message"]["role"] == "assistant"
    usage = body["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12


def test_a_stream_adds_up_to_the_whole_answer(server: RunningServer) -> None:
    whole = chat(server, **GREEDY, n=2, logprobs=True, top_logprobs=2, return_token_ids=True).json()
    text = chat(
        server,
        **GREEDY,
        n=2,
        logprobs=True,
        top_logprobs=2,
        return_token_ids=True,
        stream=True,
        stream_options={"include_usage": True},
    ).text
    *chunks, done = events(text)
    assert done == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    assert parsed[-1]["choices"] == [] and parsed[-1]["usage"]["completion_tokens"] == 24
    for index, choice in enumerate(whole["choices"]):
        parts = [c for chunk in parsed for c in chunk["choices"] if c["index"] == index]
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert [i for part in parts for i in part.get("token_ids", [])] == choice["token_ids"]
        assert [p["finish_reason"] for p in parts if p["finish_reason"]] == ["length"]
        logprobs = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
        # Logits differ in the last bits with the batch that they were computed in.
        for streamed, entry in zip(logprobs, choice["logprobs"]["content"], strict=True):
            assert streamed["token"] == entry["token"] and len(entry["top_logprobs"]) == 2
            assert streamed["logprob"] == pytest.approx(entry["logprob"], abs=1e-4)
            assert entry["logprob"] == pytest.approx(entry["top_logprobs"][0]["logprob"], abs=1e-4)  # greedy


def test_completions_take_text_token_ids_and_lists_of_both(server: RunningServer) -> None:
    ids = server.client.post("/tokenize", json={"prompt": "the quick brown"}).json()["tokens"]
    options = {**GREEDY, "return_token_ids": True}
    one = complete(server, "the quick brown", **options).json()["choices"][0]
    assert one["prompt_token_ids"] == ids
    assert complete(server, ids, **options).json()["choices"][0]["text"] == one["text"]
    many = complete(server, ["the quick brown", "a shoal"], **options).json()
    assert [c["index"] for c in many["choices"]] == [0, 1]
    assert many["choices"][0]["token_ids"] == one["token_ids"]
    lists = complete(server, [ids, ids], n=2, **options).json()["choices"]
    assert [c["token_ids"] for c in lists] == [one["token_ids"]] * 4
    echoed = complete(server, "the quick brown", echo=True, **GREEDY).json()["choices"][0]["text"]
    assert echoed == "the quick brown" + one["text"]


def test_completion_logprobs(server: RunningServer) -> None:
    choice = complete(server, logprobs=3, **GREEDY).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 12
    assert all(value <= 0 for value in logprobs["token_logprobs"]) and logprobs["text_offset"][0] == 0


def test_seeds_repeat_and_differ(server: RunningServer) -> None:
    def draw(seed: int) -> str:
        answer = chat(server, seed=seed, max_tokens=16, ignore_eos=True, temperature=1.0).json()
        return str(answer["choices"][0]["message"]["content"])

    assert draw(7) == draw(7) != draw(8)


def test_stop_string_ends_the_text_before_it(server: RunningServer) -> None:
    text = chat(server, **GREEDY).json()["choices"][0]["message"]["content"]
    stop = text[4:7]
    choice = chat(server, **GREEDY, stop=[stop]).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == stop
    assert choice["message"]["content"] == text[: text.index(stop)]
    kept = chat(server, **GREEDY, stop=stop, include_stop_str_in_output=True).json()["choices"][0]
    assert kept["message"]["content"] == text[: text.index(stop) + len(stop)]


def test_stop_token_ends_and_min_tokens_puts_it_off(server: RunningServer) -> None:
    ids = chat(server, **GREEDY, return_token_ids=True).json()["choices"][0]["token_ids"]
    stop = ids[2]
    choice = chat(server, **GREEDY, stop_token_ids=[stop], return_token_ids=True).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == stop
    assert choice["token_ids"] == ids[: ids.index(stop) + 1]
    later = chat(server, **GREEDY, stop_token_ids=[stop], min_tokens=10).json()
    assert later["usage"]["completion_tokens"] >= 10


def test_timeout_ends_a_request_with_what_it_has(server: RunningServer) -> None:
    """Of seconds, for it must have something; the whole would take longer on any machine."""
    answer = complete(server, max_tokens=8000, n=8, ignore_eos=True, timeout=3.0).json()
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"deadline"}
    assert 0 < answer["usage"]["completion_tokens"] < 8 * 8000


@pytest.mark.parametrize(
    ("fields", "check"),
    [
        ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
        ({"structured_outputs": {"choice": ["perch", "pike"]}}, lambda text: text in ("perch", "pike")),
        ({"guided_regex": "[0-9]{3}-[a-f]{2}"}, lambda text: len(text) == 6 and text[3] == "-"),
        ({"guided_grammar": 'root ::= "yes" | "no"'}, lambda text: text in ("yes", "no")),
    ],
)
def test_structured_output(server: RunningServer, fields: dict[str, Any], check: Callable[[str], bool]) -> None:
    bias = {str(i): 20 for i in server.client.post("/tokenize", json={"prompt": '"}'}).json()["tokens"]}
    choice = chat(server, max_tokens=300, seed=1, logit_bias=bias, **fields).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and check(choice["message"]["content"])


def test_tools_reach_the_chat_template(server: RunningServer) -> None:
    tools = [{"type": "function", "function": {"name": "count_fish", "parameters": {"type": "object"}}}]
    plain = chat(server, **GREEDY).json()["usage"]["prompt_tokens"]
    with_tools = chat(server, **GREEDY, tools=tools, tool_choice="auto").json()["usage"]["prompt_tokens"]
    not_wanted = chat(server, **GREEDY, tools=tools, tool_choice="none").json()["usage"]["prompt_tokens"]
    assert with_tools > plain == not_wanted


def test_tokenize_and_detokenize_are_inverse(server: RunningServer, checkpoint: Path) -> None:
    text = "a shoal of fish: ünïcode 🐟"
    answer = server.client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == load_tokenizer(checkpoint).encode(text)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) and answer["max_model_len"] == 8192
    assert server.client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_a_repeated_prompt_is_found_in_the_prefix_cache(server: RunningServer) -> None:
    prompt = list(range(100, 200))
    first = complete(server, prompt, **GREEDY).json()["usage"]
    second = complete(server, prompt, **GREEDY).json()["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] == 96  # the full blocks of 16


def test_official_client_streams_a_chat(server: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    options = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0,
        "max_completion_tokens": 8,
    }
    whole = client.chat.completions.create(**options).choices[0].message.content  # type: ignore[call-overload]
    with client.chat.completions.create(**options, stream=True) as stream:  # type: ignore[call-overload]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


def test_official_client_gets_json_of_a_schema(server: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
    schema = {
        "type": "object",
        "properties": {"fish": {"enum": ["perch", "pike"]}, "alive": {"type": "boolean"}},
        "required": ["fish", "alive"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "which fish?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "fish", "schema": schema, "strict": True}},
        max_tokens=200,
        seed=3,
    )
    value = json.loads(answer.choices[0].message.content or "")
    assert set(value) == {"fish", "alive"} and value["fish"] in ("perch", "pike") and type(value["alive"]) is bool


def test_official_client_understands_errors(server: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "hello"}])
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_every_answer_has_a_request_id_that_keeps_the_clients_own(server: RunningServer) -> None:
    seen = set()
    for path in ("/health", "/v1/models", "/nowhere", "/v1/completions"):
        answer = server.client.get(path, headers={"x-request-id": "mine"})
        assert answer.headers["x-request-id"].startswith("mine-")
        seen.add(answer.headers["x-request-id"])
    assert len(seen) == 4


def samples(server: RunningServer) -> dict[str, float]:
    """/metrics as a scraper reads it: values by sample name, labels in braces."""
    result = {}
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        assert family.documentation and family.type in ("gauge", "counter", "histogram")
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sample.labels.items())
            result[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return result


def test_metrics_are_prometheus_text_and_count(server: RunningServer) -> None:
    before = samples(server)
    prompt = chat(server, **GREEDY).json()["usage"]["prompt_tokens"]
    server.wait_for_metric("shoal:num_requests_running", 0)
    after = samples(server)
    ends = "shoal:request_success_total{finished_reason=length}"
    assert after[ends] == before.get(ends, 0) + 1
    assert after["shoal:generation_tokens_total"] == before["shoal:generation_tokens_total"] + 12
    queried = "shoal:prefix_cache_queries_total"
    assert after[queried] == before[queried] + prompt
    assert after["shoal:prefix_cache_hits_total"] >= before["shoal:prefix_cache_hits_total"]
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
        count, total = f"shoal:{name}_seconds_count", f"shoal:{name}_seconds_sum"
        assert after[count] == before[count] + 1 and after[total] > before[total]
    assert after["shoal:engine_progress_age_seconds"] < 5
    assert {"shoal:num_requests_waiting", "shoal:num_preemptions_total", "shoal:kv_cache_usage_perc"} <= set(after)


def test_a_model_without_experts_has_no_report_of_them(server: RunningServer) -> None:
    answer = server.client.get("/v1/experts")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "no_experts"
    assert "shoal:expert_imbalance" not in server.client.get("/metrics").text


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "ignore_eos": True},
        {"temperature": 1.0, "seed": 5, "ignore_eos": True, "top_p": 0.9},
        {"temperature": 1.0, "seed": 5, "presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
        {"temperature": 1.0, "seed": 5, "guided_regex": "[a-z]{30,40}"},
        {"temperature": 0, "min_tokens": 20, "logprobs": 2},
    ],
    ids=["greedy", "seed", "penalties", "grammar", "min_tokens and logprobs"],
)
def test_a_completion_is_resumed_as_it_would_have_gone_on(server: RunningServer, fields: dict[str, Any]) -> None:
    asked = {"prompt": [7, 8, 9], "max_tokens": 24, "n": 2, "return_token_ids": True, **fields}
    whole = server.client.post("/v1/completions", json=asked).json()["choices"]
    cut = 9
    begun = {str(choice["index"]): choice["token_ids"][:cut] for choice in whole if len(choice["token_ids"]) > cut}
    assert begun, "the control: something is left to do"
    rest = server.client.post("/v1/completions", json=asked | {"resume": begun}).json()["choices"]
    for expected, choice in zip([whole[int(index)] for index in begun], rest, strict=True):
        assert choice["token_ids"] == expected["token_ids"][cut:]
        assert expected["text"].endswith(choice["text"])
        assert choice["finish_reason"] == expected["finish_reason"]


def test_what_cannot_be_resumed_is_refused(server: RunningServer) -> None:
    for resume, words in (({"3": [1]}, "sequence 3"), ({"0": [10**9]}, "token ids"), ({"0": [1] * 16}, "already")):
        answer = complete(server, max_tokens=16, resume=resume)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "resume"
        assert words in answer.json()["error"]["message"]
