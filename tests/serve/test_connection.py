"""Bytes on a socket: heads and bodies that are slow, endless or no HTTP, and clients that leave while they wait."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from shoal.serve.protocol import Limits
from tests.checkpoints import make_checkpoint
from tests.serve.running import ENDLESS, LONG_CONTEXT, ROOM, RunningServer, running, wait_until, wire_bytes

LIMITS = Limits(header_seconds=3.0, body_seconds=3.0, header_bytes=4096)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    checkpoint = make_checkpoint("llama", tmp_path_factory.mktemp("models"), max_position_embeddings=LONG_CONTEXT)
    with running(checkpoint, limits=LIMITS, engine=ROOM | {"max_sequences": 1}) as server:
        yield server
        server.wait_for_metric("shoal:kv_cache_usage_perc", 0)


def connect(server: RunningServer) -> socket.socket:
    return socket.create_connection(server.address, timeout=60)


def answer_on(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and body of what the server says before it closes the connection."""
    received = b""
    while part := connection.recv(65536):
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        (b"no http at all\r\n\r\n", 400, "not a valid HTTP request"),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400, "not a valid HTTP request"),
        (b"GET http://elsewhere/health HTTP/1.1\r\n\r\n", 400, "not a valid HTTP request"),
        (b"OPTIONS * HTTP/1.1\r\n\r\n", 400, "not a valid HTTP request"),
        (b"GET / HTTP/1.1\r\nx-long: " + b"y" * 5000, 431, "larger than 4096 bytes"),
    ],
)
def test_a_head_that_is_wrong_or_endless(server: RunningServer, sent: bytes, status: int, words: str) -> None:
    with connect(server) as connection:
        connection.sendall(sent)
        got, body = answer_on(connection)
    assert got == status and words in body["error"]["message"]


def test_heads_and_bodies_that_are_late(server: RunningServer) -> None:
    """All at once: of a new connection, of one that had a request before, and a body."""
    late = {
        b"": "3 s",
        b"GET /health HT": "3 s",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 100\r\n\r\n{": "body",
    }
    with contextlib.ExitStack() as open_ones:
        again = open_ones.enter_context(connect(server))
        again.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
        assert again.recv(65536).startswith(b"HTTP/1.1 200")
        again.sendall(b"GET /health HT")
        expected = [(again, "3 s")]
        for sent, words in late.items():
            expected.append((open_ones.enter_context(connect(server)), words))
            expected[-1][0].sendall(sent)
        for connection, words in expected:
            status, body = answer_on(connection)
            assert status == 408 and words in body["error"]["message"]


def test_a_large_body_is_no_large_head(server: RunningServer) -> None:
    ids = [5] * 3000
    for _ in range(2):
        answer = server.client.post("/v1/completions", json={"prompt": ids, "max_tokens": 1})
        assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] == 3000


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_while_it_waits_is_forgotten(server: RunningServer, streaming: bool) -> None:
    """The engine has one slot, which another request holds: there is no first token yet, nor any event to send."""
    body = {"prompt": "fish", "max_tokens": ENDLESS, "ignore_eos": True}
    with server.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as running_one:
        lines = running_one.iter_lines()  # kept: httpx closes the connection with the iterator
        next(lines)
        with connect(server) as leaving:
            leaving.sendall(wire_bytes(server.client, "/v1/completions", body | {"stream": streaming}))
            server.wait_for_metric("shoal:num_requests_waiting", 1)
        server.wait_for_metric("shoal:num_requests_waiting", 0)
        assert server.metric("shoal:num_requests_running") == 1, "control: the other one goes on"
    server.wait_for_metric("shoal:num_requests_running", 0)


def test_bad_input_costs_less_than_a_step(server: RunningServer) -> None:
    """Relative to a good request of hundreds of steps: the shortest of five bad ones is less on any machine."""

    def seconds(content: bytes, status: int) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            assert server.client.post("/v1/completions", content=content).status_code == status
            times.append(time.perf_counter() - began)
        return min(times)

    good = seconds(b'{"prompt": "a", "max_tokens": 256, "ignore_eos": true}', 200)
    assert seconds(b'{"prompt": "a", "max_tokens": -1}', 400) < good
    assert seconds(b'{"prompt": ' + b"[" * 100_000, 400) < good
    assert seconds(b'{"prompt": "a", "temprature": 1}', 400) < good


def test_many_waiting_clients_are_all_served(server: RunningServer) -> None:
    body = {"prompt": ["a b", "c d", "e f"], "n": 4, "max_tokens": 3, "ignore_eos": True}
    choices = server.client.post("/v1/completions", json=body).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(12))
    assert all(choice["finish_reason"] == "length" for choice in choices)
    wait_until(lambda: server.metric("shoal:num_requests_running") == 0, "the engine to be idle")
