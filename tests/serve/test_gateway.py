"""The gateway as a whole: several models, degradation, keys, audit, TLS, the dashboard, endpoints that come and go."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.checkpoints import make_checkpoint
from tests.serve.certificates import Authority
from tests.serve.gateways import ENGINE, RunningFleet, pid_of, running_fleet
from tests.serve.running import wait_until

ASKED = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


def shoal(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": "src", "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, "-m", "shoal", *arguments], capture_output=True, text=True, timeout=60, env=environment
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("tiny"), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fleet")


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, str]:
    """By tenant."""
    made = {}
    scopes = {"acme": ["generate", "read"], "ops": ["admin", "metrics", "read", "generate"]}
    for tenant, allowed in scopes.items():
        flags = [word for scope in allowed for word in ("--scope", scope)]
        answer = shoal("keys", "create", "--file", f"{folder}/keys.json", "--tenant", tenant, *flags, "--json")
        assert answer.returncode == 0, answer.stderr
        made[tenant] = json.loads(answer.stdout)["key"]
    return made


@pytest.fixture(scope="module")
def fleet(checkpoint: Path, folder: Path, keys: dict[str, str]) -> Iterator[RunningFleet]:
    """Two models, of which the big one has a fallback."""
    deployment = {
        "models": [
            {
                "name": "big",
                "model": str(checkpoint),
                **ENGINE,
                "replicas": 1,
                "fallback": {"fallback": "small", "down_seconds": 0.3, "leave_seconds": 1.0, "ramp_seconds": 0.5},
            },
            {"name": "small", "model": str(checkpoint), **ENGINE},
        ],
        "keys": f"{folder}/keys.json",
        "tenants": {"acme": {"requests_per_minute": 600}},
        "audit": {"directory": f"{folder}/audit"},
        "supervision": {"restart_seconds": 0.5, "restart_most_seconds": 0.5},
    }
    with running_fleet(folder, deployment, headers={"authorization": f"Bearer {keys['ops']}"}) as one:
        yield one


def ask(fleet: RunningFleet, key: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return fleet.client.post(
        "/v1/completions", json=ASKED | fields, headers={"authorization": f"Bearer {key}", **(headers or {})}
    )


def test_models_are_served_by_name(fleet: RunningFleet, keys: dict[str, str]) -> None:
    assert {entry["id"] for entry in fleet.client.get("/v1/models").json()["data"]} == {"big", "small"}
    for name in ("big", "small"):
        assert ask(fleet, keys["acme"], model=name).json()["model"] == name
    wrong = ask(fleet, keys["acme"], model="bug")
    assert wrong.status_code == 404 and "'big'" in wrong.json()["error"]["message"]


def test_a_model_that_is_down_is_served_by_its_fallback_and_comes_back(
    fleet: RunningFleet, checkpoint: Path, keys: dict[str, str]
) -> None:
    assert "x-shoal-degraded-from" not in ask(fleet, keys["acme"], model="big").headers, "control"
    weights = checkpoint / "model.safetensors"
    away = weights.rename(checkpoint / "away")  # it cannot come back before it is let
    os.kill(pid_of(fleet.endpoints()["big-0"]), signal.SIGKILL)
    wait_until(lambda: fleet.model()["served_by"] == "small", "the fallback")
    answer = ask(fleet, keys["acme"], model="big")
    assert answer.json()["model"] == "small" and answer.headers["x-shoal-degraded-from"] == "big"
    with fleet.client.stream("POST", "/v1/completions", json=ASKED | {"model": "big", "stream": True}) as streamed:
        assert streamed.headers["x-shoal-degraded-from"] == "big"
    late = ask(fleet, keys["acme"], {"x-shoal-fallback": "never"}, model="big", timeout=0.2)
    assert late.json()["model"] == "big", "it opted out"
    away.rename(weights)
    fleet.wait_for_state("big-0", "ready")
    wait_until(lambda: ask(fleet, keys["acme"], model="big").json()["model"] == "big", "the return")
    assert fleet.model()["degradations"] == 1


def test_endpoints_come_and_go(fleet: RunningFleet, keys: dict[str, str]) -> None:
    url = ["--url", fleet.url, "--api-key", keys["ops"]]
    added = shoal("fleet", "add", "small", *url)
    assert added.returncode == 0, added.stderr
    assert set(fleet.endpoints(1)) == {"small-0", "small-1"}
    assert fleet.endpoints(1)["small-1"]["state"] == "ready"
    drained = shoal("fleet", "drain", "small-0", *url)
    assert drained.returncode == 0, drained.stderr
    done = fleet.endpoints(1)["small-1"]["completed"]
    assert ask(fleet, keys["acme"], model="small").status_code == 200
    assert fleet.endpoints(1)["small-1"]["completed"] == done + 1
    pid = pid_of(fleet.endpoints(1)["small-0"])
    assert shoal("fleet", "remove", "small-0", *url).returncode == 0
    assert set(fleet.endpoints(1)) == {"small-1"}
    assert not Path(f"/proc/{pid}").exists()
    assert "small-1" in shoal("fleet", "status", *url).stdout
    denied = shoal("fleet", "remove", "small-1", "--url", fleet.url, "--api-key", keys["acme"])
    assert denied.returncode != 0 and "admin" in denied.stderr


def test_metrics_and_dashboard(fleet: RunningFleet, keys: dict[str, str]) -> None:
    ask(fleet, keys["acme"], model="small")
    text = fleet.client.get("/metrics").text
    assert 'shoal:fleet_generation_tokens_total{model="small",tenant="acme"}' in text
    assert 'shoal:fleet_endpoint_state{endpoint="big-0",model="big",state="ready"} 1.0' in text
    page = httpx.get(fleet.url + "/dashboard")
    assert page.status_code == 200 and "content-security-policy" in page.headers
    assert httpx.get(fleet.url + "/fleet").status_code == 401


def test_what_happened_is_in_the_audit_log(fleet: RunningFleet, folder: Path, keys: dict[str, str]) -> None:
    """Last in this file: the log is looked at once the gateway has ended."""
    answer = ask(fleet, keys["acme"], model="small")
    ask(fleet, "sk-wrong", model="small")
    fleet.process.send_signal(signal.SIGTERM)
    assert fleet.process.wait(60) == 0
    assert shoal("audit", "verify", f"{folder}/audit").returncode == 0
    exported = shoal("audit", "export", f"{folder}/audit", "--format", "jsonl").stdout
    records = [json.loads(line) for line in exported.splitlines()]
    events = [record["event"] for record in records]
    kinds = {event["kind"] for event in events}
    assert kinds >= {"request_accepted", "request_completed", "authentication_failed", "endpoint_lost", "admin_action"}
    (record,) = [
        event
        for event in events
        if event["kind"] == "request_completed" and event["request_id"] == answer.headers["x-request-id"]
    ]
    assert record["tenant"] == "acme" and record["endpoints"] and record["completion_tokens"] == 8
    assert len(record["weights_digest"]) == 64 and len(record["config_digest"]) == 64
    assert any(event.get("served_model") == "small" and event.get("model") == "big" for event in events)
    (log,) = [file for file in (folder / "audit").rglob("*.jsonl")]
    log.write_bytes(log.read_bytes().replace(b'"acme"', b'"evil"', 1))
    assert shoal("audit", "verify", f"{folder}/audit").returncode != 0


def test_tls_to_clients_and_to_engines(checkpoint: Path, tmp_path: Path) -> None:
    authority = Authority("test")
    (tmp_path / "ca.pem").write_bytes(authority.pem)

    def issue(name: str, *names: str) -> dict[str, str]:
        files = tmp_path / f"{name}.pem", tmp_path / f"{name}.key"
        for file, content in zip(files, authority.issue(*names), strict=True):
            file.write_bytes(content)
        return {"certificate": f"{files[0]}", "key": f"{files[1]}", "ca": f"{tmp_path}/ca.pem"}

    mine = issue("gateway", "spiffe://shoal/gateway")
    server = issue("engine", "127.0.0.1") | {"allowed_names": ["spiffe://shoal/gateway"]}
    engine = {"models": [{"name": "tiny", "model": str(checkpoint), **ENGINE}], "tls": server}
    context = ssl.create_default_context(cafile=mine["ca"])
    context.load_cert_chain(mine["certificate"], mine["key"])
    with running_fleet(tmp_path, engine, verify=context) as behind:
        assert behind.url.startswith("https://")
        with pytest.raises(httpx.TransportError):
            httpx.get(behind.url + "/health", verify=ssl.create_default_context(cafile=mine["ca"]))
        endpoint = {"openai": behind.url, "tls": mine}
        front = {"models": [{"name": "tiny", "model": str(checkpoint), "endpoints": [endpoint]}]}
        with running_fleet(tmp_path, front) as fleet:
            answer = fleet.client.post("/v1/completions", json=ASKED).json()
            direct = behind.client.post("/v1/completions", json=ASKED).json()
            assert answer["choices"][0]["token_ids"] == direct["choices"][0]["token_ids"]
