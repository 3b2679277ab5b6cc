"""Clients that leave, signals, death: each fault is seen to have happened, and has a control without it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from shoal.bench.processes import descendants
from shoal.core.health import HealthConfig
from shoal.serve.deployment import ModelDeployment, engine_configs
from tests.checkpoints import make_checkpoint
from tests.serve.running import (
    ENDLESS,
    LONG_CONTEXT,
    PATIENCE,
    ROOM,
    RunningServer,
    alive,
    running,
    state_of,
    wait_until,
    wire_bytes,
)

LONG = {"prompt": "fish", "max_tokens": ENDLESS, "ignore_eos": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("tiny"), max_position_embeddings=LONG_CONTEXT)


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[RunningServer]:
    with running(checkpoint, engine=ROOM) as one:
        yield one


class Stream:
    """A streamed completion whose first event has come. It goes on until it is read to its end or closed."""

    def __init__(self, server: RunningServer, **changes: object) -> None:
        request = server.client.build_request("POST", "/v1/completions", json=LONG | {"stream": True} | changes)
        self._response = server.client.send(request, stream=True)
        # Kept: httpx closes the connection with the iterator.
        self._events = self._response.iter_bytes()
        self.first = next(self._events)

    def rest(self) -> bytes:
        return b"".join(self._events)

    def close(self) -> None:
        self._response.close()


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_frees_its_blocks(server: RunningServer, streaming: bool) -> None:
    server.wait_for_metric("shoal:num_requests_running", 0)
    if streaming:
        stream = Stream(server)
        assert server.metric("shoal:num_requests_running") == 1
        stream.close()
    else:
        with socket.create_connection(server.address) as connection:
            connection.sendall(wire_bytes(server.client, "/v1/completions", LONG))
            server.wait_for_metric("shoal:num_requests_running", 1)
    server.wait_for_metric('shoal:request_success_total{finished_reason="abort"}', 1 if streaming else 2)
    server.wait_for_metric("shoal:num_requests_running", 0)
    server.wait_for_metric("shoal:kv_cache_usage_perc", 0)


def test_readiness_is_progress(checkpoint: Path) -> None:
    health = HealthConfig(stall_seconds=1.0, first_seconds=1.0)
    with running(checkpoint, health=health, engine=ROOM) as server:
        stream = Stream(server)
        wait_until(lambda: server.client.get("/ready").status_code == 200, "control: it makes steps")
        os.kill(server.engine_pid, signal.SIGSTOP)
        wait_until(lambda: state_of(server.engine_pid) == "T", "the engine to stop")
        wait_until(lambda: server.client.get("/ready").status_code == 503, "not ready")
        assert "no step" in server.client.get("/ready").json()["reason"]
        assert server.client.get("/health").status_code == 200
        os.kill(server.engine_pid, signal.SIGCONT)
        wait_until(lambda: server.client.get("/ready").status_code == 200, "ready again")
        stream.close()


def test_nothing_outlives_a_front_that_is_killed(checkpoint: Path) -> None:
    with running(checkpoint, engine=ROOM) as server:
        stream = Stream(server)
        assert alive(server.engine_pid), "control: it lives while its parent does"
        server.process.kill()
        server.process.wait()
        wait_until(lambda: not alive(server.engine_pid), "the engine to die with its parent")
        stream.close()


def test_sigterm_drains_what_runs_and_exits_0(checkpoint: Path) -> None:
    with running(checkpoint, drain_seconds=120, engine=ROOM) as server:
        stream = Stream(server, max_tokens=600, stream_options={"include_usage": True})
        os.kill(server.engine_pid, signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: is_refused(server), "the server to take nothing new")
        os.kill(server.engine_pid, signal.SIGCONT)
        assert b'"completion_tokens":600' in stream.rest()
        assert server.process.wait(PATIENCE) == 0
        assert not alive(server.engine_pid)


def is_refused(server: RunningServer) -> bool:
    try:
        return httpx.get(server.url + "/ready", timeout=60).status_code == 503
    except httpx.TransportError:
        return True


def test_a_drain_ends_at_its_limit(checkpoint: Path) -> None:
    """Before the request has ended, which it would only after minutes."""
    with running(checkpoint, drain_seconds=1, engine=ROOM) as server:
        stream = Stream(server)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE) == 0
        assert not alive(server.engine_pid)
        stream.close()


def test_a_second_signal_does_not_wait(checkpoint: Path) -> None:
    with running(checkpoint, drain_seconds=600, engine=ROOM) as server:
        stream = Stream(server)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(0.5)  # control: it drains
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE) == 0
        assert b'"stopped"' in stream.rest() and not alive(server.engine_pid)


def test_a_lost_engine_is_started_anew_and_its_streams_go_on(checkpoint: Path) -> None:
    # Seconds of steps: it is not at its end when the engine is killed.
    asked = {"max_tokens": 1500, "temperature": 0.8, "seed": 7}
    with running(checkpoint, engine=ROOM) as server:
        undisturbed = text_of(Stream(server, **asked))
        stream = Stream(server, **asked)
        os.kill(server.engine_pid, signal.SIGKILL)
        assert text_of(stream) == undisturbed
        assert not alive(server.engine_pid), "the control: it was killed"
        (model,) = server.client.get("/fleet").json()["models"]
        assert model["migrations"] == 1 and model["endpoints"][0]["restarts"] == 1
        assert model["endpoints"][0]["address"] != f"pid {server.engine_pid}"


def text_of(stream: Stream) -> str:
    events = (stream.first + stream.rest()).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def test_a_key_guards_everything_but_health(checkpoint: Path) -> None:
    with running(checkpoint, api_key="secret") as server:
        client = server.client
        paths = [
            "/v1/models",
            "/metrics",
            "/ready",
            "/version",
            "/tokenize",
            "/v1/chat/completions",
            "/",
            "//v1/models",
        ]
        for path in paths:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
                assert client.get(path, headers=headers).status_code == 401
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200


def test_a_taken_port_and_a_public_address_are_refused_at_once() -> None:
    from shoal.core.config import EngineConfig
    from shoal.serve.server import ListenError, ServeConfig, listen

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ListenError, match="--port 0"):
        listen(ServeConfig(engine=EngineConfig(model=""), port=taken.getsockname()[1]))
    with pytest.raises(ListenError, match="--allow-remote"):
        listen(ServeConfig(engine=EngineConfig(model=""), host="0.0.0.0", port=0))
    with pytest.raises(ListenError, match="--api-key"):
        listen(ServeConfig(engine=EngineConfig(model=""), host="0.0.0.0", port=0, allow_remote=True))
    listen(ServeConfig(engine=EngineConfig(model=""), host="0.0.0.0", port=0, allow_remote=True, api_key="k")).close()


def test_a_bad_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    import asyncio

    from shoal.core.config import EngineConfig
    from shoal.serve.engine_client import EngineClient, EngineStartError

    path = make_checkpoint("llama", tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(EngineStartError, match=r"model\.safetensors.*truncated"):
        asyncio.run(EngineClient.start(EngineConfig(model=str(path))))


def test_a_server_that_prepares_grammars_has_its_compiler_running_when_it_is_ready(checkpoint: Path) -> None:
    with running(checkpoint, engine={"prepare_grammars": True}) as server:
        names = [
            Path(f"/proc/{child.pid}/cmdline").read_bytes().split(b"\0") for child in descendants(server.process.pid)
        ]
        assert [words for words in names if b"shoal.engine.grammar" in words]


def test_engines_of_several_prepare_grammars_and_a_single_one_does_not() -> None:
    one = ModelDeployment(name="m", replicas=1)
    assert [config.prepare_grammars for config in engine_configs(one, "path")] == [False]
    two = ModelDeployment(name="m", replicas=1, spares=1)
    assert [config.prepare_grammars for config in engine_configs(two, "path")] == [True, True]
