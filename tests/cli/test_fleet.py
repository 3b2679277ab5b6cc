"""`shoal fleet` against a gateway that answers what a test says."""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from shoal.cli import main
from shoal.core.fleet_types import EndpointStatus, FleetStatus
from tests.cli.conftest import SHOAL
from tests.serve.fleet_statuses import empty, endpoint, every_state, fleet, model, nothing_known, short_and_degraded

COMMANDS = ("status", "drain", "add", "remove")


class Gateway:
    """`on_read` and `on_change` may change what there is; `asked` is what was asked, in order."""

    def __init__(self) -> None:
        self.status: FleetStatus = every_state()
        self.api_key: str | None = None
        self.asked: list[tuple[str, str, Any]] = []
        self.reads = 0
        self.on_read: Callable[[int], None] = lambda number: None
        self.on_change: Callable[[], None] = lambda: None
        self.refusal: tuple[int, bytes] | None = None
        gateway = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                gateway.reads += 1
                gateway.on_read(gateway.reads)
                self._send(msgspec.json.encode(gateway.status))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                gateway.asked.append((self.command, self.path, json.loads(body) if body else None))
                gateway.on_change()
                self._send(b"{}")

            do_DELETE = do_POST

            def _send(self, body: bytes) -> None:
                status = 200
                if gateway.refusal is not None:
                    status, body = gateway.refusal
                elif gateway.api_key is not None and self.headers["authorization"] != f"Bearer {gateway.api_key}":
                    status, body = 401, b"{}"
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    gateway = Gateway()
    monkeypatch.setenv("SHOAL_URL", gateway.url)
    monkeypatch.delenv("SHOAL_API_KEY", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # would refuse: loopback must not go through it
    monkeypatch.setattr("shoal.cli.fleet.DRAIN_SECONDS", 0.01)
    monkeypatch.setattr("shoal.cli.fleet.WATCH_SECONDS", 0.01)
    yield gateway
    gateway.stop()


def run(*arguments: str) -> int:
    return main(["fleet", *arguments])


@pytest.fixture
def errors(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    def read() -> str:
        text = capsys.readouterr().err
        assert len(text.splitlines()) == 1, "an error is one line"
        return text

    return read


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert "Examples" in text and f"shoal fleet {command}" in text and "SHOAL_API_KEY" in text


# --- status -----------------------------------------------------------------------------------------------------------


def test_status_shows_every_endpoint(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("status") == 0
    text = capsys.readouterr().out
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    for shown in gateway.status.models[0].endpoints:
        assert shown.state in lines[shown.name]
        if shown.reason is not None:
            assert shown.reason in lines[f"{shown.name}:"]
    assert lines["small-6:"].rstrip().endswith("; breaker open")
    assert re.search(r"ready +tp2 +7 +43% +1 +5,230/s +21 ms +20 ms +0$", lines["small-0"].rstrip())
    assert "spare" in lines["big-1"] and " 127.0.0.1:8001 " in lines["big-0"]
    assert "N+1 ok" in lines["smollm2-135m"]
    assert "28 running, 2 queued (911 tokens) · 312 tokens/s · TTFT 84 ms (p90 210 ms, p99 640 ms)" in text
    assert "18 migrated, 4 retried, 12 refused" in text and "degraded" not in text
    assert "endpoint lost: small-5: process ended by signal 9" in text
    assert "up 26 h 3 min, audit ok" in text


def test_status_of_fleets_that_are_not_well(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.status = short_and_degraded()
    run("status")
    text = capsys.readouterr().out
    for part in ("N+1 short by 140 tokens/s", "served by smollm2-135m", "1 failed", "is draining", "audit the log was"):
        assert part in text
    gateway.status = nothing_known()
    run("status")
    text = capsys.readouterr().out
    assert "N+1 unknown" in text and "TTFT –" in text and "%" not in text
    gateway.status = empty()
    run("status")
    assert "no model is configured" in capsys.readouterr().out
    gateway.status = fleet([model("lonely", [])])
    run("status")
    assert "no endpoint: its requests wait" in capsys.readouterr().out


def test_status_as_json_is_what_the_gateway_said(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("status", "--json") == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=FleetStatus) == gateway.status


def test_what_an_endpoint_says_cannot_steer_the_terminal(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J[red]x[/]\n"
    gateway.status = fleet([model(evil, [endpoint(evil, "down", reason=evil, address=evil)], policy=evil)])
    assert run("status") == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert text.count("[2J[red]x[/]") >= 3, "shown as it is, not as markup"


def test_watch_goes_on_while_the_gateway_is_away(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    program = [*SHOAL, "fleet", "status", "--watch", "--json"]
    away = threading.Event()

    def on_read(number: int) -> None:
        gateway.refusal = None
        if number == 3:
            raise ConnectionResetError("the fault: this connection ends without an answer")
        if number >= 5:
            away.set()

    gateway.on_read = on_read
    gateway.server.handle_error = lambda *_: None  # type: ignore[method-assign]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert away.wait(60), "it stopped asking"
        process.send_signal(signal.SIGINT)
        output, problems = process.communicate(timeout=60)
    assert process.returncode == 0, problems
    lines = [msgspec.json.decode(line, type=FleetStatus) for line in output.splitlines()]
    assert len(lines) >= 3
    assert problems.count("no gateway answers") == 1


# --- drain, add, remove -----------------------------------------------------------------------------------------------


def draining(gateway: Gateway, **last: object) -> None:
    """small-0 has 3 requests, then 2, 1, and then is as `last` says."""

    def on_read(number: int) -> None:
        left: list[EndpointStatus] = [endpoint("small-0", "draining", requests=max(4 - number, 0))]
        if number >= 4:
            left = [endpoint("small-0", **{"state": "draining", "requests": 0, **last})] if last else []  # type: ignore[arg-type]
        gateway.status = fleet([model("smollm2-135m", [*left, endpoint("small-1")])])

    gateway.on_read = on_read


@pytest.mark.parametrize("last", [{}, {"requests": 0}, {"state": "down", "requests": 1}])
def test_drain_waits_until_it_is_empty(
    gateway: Gateway, capsys: pytest.CaptureFixture[str], last: dict[str, object]
) -> None:
    draining(gateway, **last)
    assert run("drain", "small-0") == 0
    assert gateway.asked == [("POST", "/fleet/endpoints/small-0/drain", None)]
    assert gateway.reads == 4, "not before its requests had ended, and not longer"
    assert capsys.readouterr().out == "small-0 is drained\n"


def test_drain_does_not_wait_where_it_is_told(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    draining(gateway)
    assert run("drain", "small-0", "--no-wait") == 0
    assert gateway.reads == 1
    assert "gets no new requests" in capsys.readouterr().out


def test_drain_ends_when_someone_undoes_it(gateway: Gateway, errors: Callable[[], str]) -> None:
    draining(gateway, state="ready", requests=5)
    assert run("drain", "small-0") == 1
    assert "small-0 is ready again" in errors()


@pytest.mark.parametrize("command", ["drain", "remove"])
def test_an_unknown_endpoint(gateway: Gateway, errors: Callable[[], str], command: str) -> None:
    assert run(command, "smal-0") == 1
    assert "there is no endpoint 'smal-0': the nearest is 'small-0'" in errors()
    gateway.status = fleet([model("m", [endpoint("b"), endpoint("a")])])
    assert run(command, "zzz") == 1
    assert "this fleet has 'a', 'b'" in errors()
    gateway.status = empty()
    assert run(command, "zzz") == 1
    assert "this fleet has no endpoint" in errors()
    assert gateway.asked == []


@pytest.mark.parametrize(
    ("flags", "body"),
    [
        ((), {"replicas": 1}),
        (("--replicas", "2"), {"replicas": 2}),
        (("--openai", "http://127.0.0.1:8003"), {"openai": "http://127.0.0.1:8003"}),
    ],
)
def test_add(
    gateway: Gateway, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], body: dict[str, Any]
) -> None:
    gateway.status = fleet([model("m", [endpoint("m-0")])])

    def on_change() -> None:
        gateway.status = fleet([model("m", [endpoint("m-0"), endpoint("m-1", "starting")])])

    gateway.on_change = on_change
    assert run("add", "m", *flags) == 0
    assert gateway.asked == [("POST", "/fleet/endpoints", {"model": "m"} | body)]
    assert capsys.readouterr().out == "m-1 was added to m and is starting\n"


def test_add_what_makes_no_sense(gateway: Gateway, errors: Callable[[], str]) -> None:
    assert run("add", "smollm2", "--replicas", "1") == 1
    assert "there is no model 'smollm2': the nearest is 'smollm2-135m'" in errors()
    assert run("add", "smollm2-135m", "--replicas", "1", "--openai", "http://x") == 1
    assert "exclude each other" in errors()
    gateway.on_change = lambda: setattr(
        gateway, "refusal", (400, b'{"error": {"message": "openai: nothing listens\\nat http://x"}}')
    )
    assert run("add", "smollm2-135m", "--openai", "http://x") == 1
    assert errors() == "error: openai: nothing listens at http://x\n", "in the gateway's own words"


def test_remove(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.status = fleet([model("m", [endpoint("a/b c"), endpoint("idle", requests=0)])])
    assert run("remove", "a/b c") == 0
    assert run("remove", "idle") == 0
    assert [path for _, path, _ in gateway.asked] == ["/fleet/endpoints/a%2Fb%20c", "/fleet/endpoints/idle"]
    assert {method for method, _, _ in gateway.asked} == {"DELETE"}
    assert capsys.readouterr().out == "a/b c was removed; its 7 requests go on elsewhere\nidle was removed\n"


# --- the gateway ------------------------------------------------------------------------------------------------------


def test_no_gateway(gateway: Gateway, errors: Callable[[], str]) -> None:
    gateway.stop()
    assert run("status") == 1
    assert f"no gateway answers at {gateway.url} (connection refused): start one" in errors()


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((401, b"{}"), "asks for an API key: give it with --api-key or in SHOAL_API_KEY"),
        ((403, b'{"error": {"message": "the key lacks scope admin"}}'), "may not do that: the key lacks scope admin"),
        ((404, b"{}"), "has no fleet: only `shoal serve --deployment` runs one"),
        ((500, b"<html>"), "the gateway answered /fleet with status 500"),
        ((200, b'{"models": 3}'), "is no fleet's status"),
    ],
)
def test_answers_that_are_no_status(
    gateway: Gateway, errors: Callable[[], str], refusal: tuple[int, bytes], message: str
) -> None:
    gateway.refusal = refusal
    assert run("status") == 1
    assert message in errors()


def test_the_key_is_sent_from_the_flag_or_the_environment(
    gateway: Gateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.api_key = "k"
    assert run("status") == 1
    assert run("status", "--api-key", "wrong") == 1
    assert run("status", "--api-key", "k") == 0
    monkeypatch.setenv("SHOAL_API_KEY", "k")
    assert run("status", "--url", f"{gateway.url}/v1/") == 0, "an address as OpenAI's clients want it will do"


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--url", "127.0.0.1:8000"), "write the gateway's address"), (("--api-key", "käse"), "no key has")],
)
def test_flags_that_make_no_sense(errors: Callable[[], str], flags: tuple[str, ...], message: str) -> None:
    assert run("status", *flags) == 1
    assert message in errors()


def completions(*words: str) -> list[str]:
    line = " ".join(("shoal", "fleet", *words))
    environment = os.environ | {
        "_SHOAL_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) + 1),
    }
    done = subprocess.run([sys.executable, "-m", "shoal"], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.split()


def test_names_are_completed(gateway: Gateway) -> None:
    assert completions("drain", "big") == ["big-0", "big-1"]
    assert completions("add", "smol") == ["smollm2-135m"]
    gateway.stop()
    assert completions("drain", "big") == [], "and where nothing answers, nothing is said"
