"""A client that lost its connection has the rest of its stream: from its gateway, or from another one."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.checkpoints import make_checkpoint
from tests.serve.gateways import ENGINE, RunningFleet, running_fleet
from tests.serve.running import ENDLESS, LONG_CONTEXT, ROOM, running, wait_until

ASKED: dict[str, Any] = {
    "prompt": [7, 8, 9, 10],
    "max_tokens": 400,
    "temperature": 0.9,
    "seed": 11,
    "ignore_eos": True,
    "stream": True,
    "return_token_ids": True,
    "stream_options": {"include_usage": True},
}


class Received:
    """What a client has, over one connection or several."""

    def __init__(self) -> None:
        self.request_id = ""
        self.last_id = ""
        self.texts: dict[int, str] = {}
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.finish: dict[int, str] = {}
        self.usage: dict[str, Any] = {}
        self.is_done = False

    def read(self, response: httpx.Response, *, events: int | None = None) -> None:
        """To the end, or so many events and then away."""
        assert response.status_code == 200, response.read()
        self.request_id = response.headers["x-request-id"]
        for line in response.iter_lines():
            if line.startswith("id: "):
                pending = line.removeprefix("id: ")
            elif line == "data: [DONE]":
                self.is_done = True
            elif line.startswith("data: "):
                body = json.loads(line.removeprefix("data: "))
                assert "error" not in body, body
                self._take(body)
                if body["choices"]:
                    self.last_id = pending
                if events is not None and (events := events - 1) == 0:
                    return

    def _take(self, body: dict[str, Any]) -> None:
        self.usage = body.get("usage") or self.usage
        for choice in body["choices"]:
            index = choice["index"]
            self.texts[index] = self.texts.get(index, "") + choice["text"]
            self.tokens.setdefault(index, []).extend(choice["token_ids"])
            if choice["logprobs"]:
                self.logprobs.setdefault(index, []).extend(choice["logprobs"]["token_logprobs"])
            if choice["finish_reason"]:
                assert index not in self.finish
                self.finish[index] = choice["finish_reason"]

    @property
    def all(self) -> tuple[Any, ...]:
        return self.texts, self.tokens, self.logprobs, self.finish, self.usage["completion_tokens"], self.is_done


def ask(fleet: RunningFleet, received: Received, events: int | None = None, **fields: Any) -> None:
    with fleet.client.stream("POST", "/v1/completions", json=ASKED | fields) as response:
        received.read(response, events=events)


def go_on(fleet: RunningFleet, received: Received, events: int | None = None) -> None:
    headers = {"last-event-id": received.last_id} if received.last_id else {}
    with fleet.client.stream("GET", f"/v1/streams/{received.request_id}", headers=headers) as response:
        received.read(response, events=events)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("tiny"), max_position_embeddings=LONG_CONTEXT)


@pytest.fixture(scope="module")
def fleet(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    folder = tmp_path_factory.mktemp("fleet")
    model = {"name": "tiny", "model": str(checkpoint), **ENGINE, "max_len": 4096}
    with running_fleet(folder, {"models": [model], "journal": {"location": f"{folder}/journal.db"}}) as one:
        yield one


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2, "logprobs": 1},
        {"stop": ["zzzz", "qx"], "presence_penalty": 1.0},
        {"guided_regex": "[a-z]{150,200}", "ignore_eos": False},
    ],
    ids=["seed", "n and logprobs", "stop strings and penalties", "grammar"],
)
def test_a_client_that_left_and_is_back_gets_the_rest(fleet: RunningFleet, fields: dict[str, Any]) -> None:
    whole, parts = Received(), Received()
    ask(fleet, whole, **fields)
    ask(fleet, parts, events=40, **fields)
    assert not parts.is_done and len(parts.tokens[0]) < len(whole.tokens[0]), "the control: it was cut off"
    go_on(fleet, parts, events=25)
    assert not parts.is_done
    go_on(fleet, parts)
    assert parts.all == whole.all


def test_an_answer_that_has_ended_can_be_had_again(fleet: RunningFleet) -> None:
    whole = Received()
    ask(fleet, whole, max_tokens=30)
    again = Received()
    again.request_id = whole.request_id
    go_on(fleet, again)
    assert again.all == whole.all
    last = Received()
    last.request_id, last.last_id = whole.request_id, "29"
    go_on(fleet, last)
    assert last.tokens == {0: whole.tokens[0][29:]} and last.finish == whole.finish
    body = {key: value for key, value in ASKED.items() if not key.startswith("stream")} | {"max_tokens": 30}
    answer = fleet.client.post("/v1/completions", json=body)
    same = fleet.client.get(f"/v1/streams/{answer.headers['x-request-id']}")
    assert same.json() == answer.json() and same.headers["x-request-id"] == answer.headers["x-request-id"]


def test_what_is_unknown_or_makes_no_sense_is_refused(fleet: RunningFleet) -> None:
    assert fleet.client.get("/v1/streams/nobody").status_code == 404
    whole = Received()
    ask(fleet, whole, max_tokens=5)
    for wrong in ("x", "1-2", "-1", "1e5"):
        answer = fleet.client.get(f"/v1/streams/{whole.request_id}", headers={"last-event-id": wrong})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "bad_event_id", wrong


def test_who_asked_wrongly_may_ask_again(fleet: RunningFleet) -> None:
    whole, parts = Received(), Received()
    ask(fleet, whole)
    ask(fleet, parts, events=20)
    wrong = fleet.client.get(f"/v1/streams/{parts.request_id}", headers={"last-event-id": "x"})
    assert wrong.status_code == 400
    go_on(fleet, parts)
    assert parts.all == whole.all


def test_a_request_is_done_once_for_one_idempotency_key(fleet: RunningFleet) -> None:
    headers = {"idempotency-key": "order-66"}
    body = {"prompt": [1, 2], "max_tokens": 4}
    first = fleet.client.post("/v1/completions", json=body, headers=headers)
    assert first.status_code == 200
    second = fleet.client.post("/v1/completions", json=body, headers=headers)
    assert second.status_code == 409 and first.headers["x-request-id"] in second.json()["error"]["message"]
    assert fleet.client.post("/v1/completions", json=body).status_code == 200, "control: without the key"


def test_what_a_limit_refuses_leaves_nothing_in_the_journal(checkpoint: Path, tmp_path: Path) -> None:
    model = {"name": "tiny", "model": str(checkpoint), **ENGINE, **ROOM}
    journal, headers = tmp_path / "journal.db", {"idempotency-key": "order-67"}
    deployment = {"models": [model], "journal": {"location": str(journal)}}
    with running_fleet(tmp_path, deployment | {"tenants": {"default": {"concurrent_requests": 1}}}) as fleet:
        with fleet.client.stream("POST", "/v1/completions", json=ASKED | {"max_tokens": ENDLESS}) as running:
            assert running.status_code == 200
            refused = fleet.client.post("/v1/completions", json={"prompt": [1]}, headers=headers)
            assert refused.status_code == 429, refused.text
        request_id = refused.headers["x-request-id"]
        assert fleet.client.get(f"/v1/streams/{request_id}").status_code == 404

        def again() -> int:
            return fleet.client.post("/v1/completions", json={"prompt": [1]}, headers=headers).status_code

        wait_until(lambda: again() == 200, "the key to be free, and room")
        assert again() == 409, "the control: of a request that was accepted"


def test_another_gateway_goes_on_when_the_first_is_killed(checkpoint: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(running(checkpoint, engine={"max_len": 4096})) for _ in range(2)]
        endpoints = [{"openai": server.url} for server in servers]
        deployment = {
            "models": [{"name": "tiny", "model": str(checkpoint), "endpoints": endpoints}],
            "journal": {"location": f"{tmp_path}/journal.db"},
        }
        first, second = (stack.enter_context(running_fleet(tmp_path, deployment)) for _ in range(2))
        whole, parts = Received(), Received()
        ask(second, whole, max_tokens=1500)
        with first.client.stream("POST", "/v1/completions", json=ASKED | {"max_tokens": 1500}) as response:
            parts.read(response, events=60)
            first.process.send_signal(signal.SIGKILL)
            first.process.wait()
        assert first.process.returncode == -signal.SIGKILL and not parts.is_done
        go_on(second, parts)
        assert parts.all == whole.all
