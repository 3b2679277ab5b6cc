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
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from shoal.cli import main
from shoal.core.fleet_types import FleetStatus
from shoal.serve.fleet_routes import AddEndpoint
from tests.cli.conftest import SHOAL
from tests.serve.fleet_statuses import empty, endpoint, every_state, fleet, model, nothing_known, short_and_degraded

COMMANDS = ("status", "drain", "undrain", "restart", "add", "remove")


class Gateway:
    """`on_read` and `on_change` may change what there is; `asked` is what was asked, in order."""

    def __init__(self) -> None:
        self.status: FleetStatus = every_state()
        self.api_key: str | None = None
        self.asked: list[tuple[str, str, Any]] = []
        self.reads = 0
        self.on_read: Callable[[int], None] = lambda number: None
        self.on_change: Callable[[], None] = lambda: None
        self.held: threading.Event | None = None
        """What a change is not answered before."""
        self.answer = b"{}"
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
                if gateway.held is not None:
                    assert gateway.held.wait(60)
                self._send(gateway.answer)

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
    monkeypatch.setattr("shoal.cli.fleet.FOLLOW_SECONDS", 0.01)
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


def working(gateway: Gateway, state: str) -> None:
    """Once it is asked to change, small-0 is in that state, and has one request less each time that it is looked at."""
    gateway.held = threading.Event()

    def on_change() -> None:
        begun = gateway.reads

        def on_read(number: int) -> None:
            left = max(3 - (number - begun), 0)
            changing = endpoint("small-0", state, requests=left)  # type: ignore[arg-type]
            gateway.status = fleet([model("smollm2-135m", [changing, endpoint("small-1")])])
            if left == 0 and gateway.held is not None:
                gateway.held.set()

        gateway.on_read = on_read

    gateway.on_change = on_change


@pytest.mark.parametrize(("command", "said"), [("drain", "small-0 is drained"), ("restart", "small-0 was restarted")])
def test_it_waits_until_the_gateway_is_done(
    gateway: Gateway, capsys: pytest.CaptureFixture[str], command: str, said: str
) -> None:
    working(gateway, "draining")
    assert run(command, "small-0") == 0
    assert gateway.asked == [("POST", f"/fleet/endpoints/small-0/{command}", None)]
    assert gateway.held is not None and gateway.held.is_set(), "not before its requests had ended"
    output = capsys.readouterr()
    assert (output.out, output.err) == (f"{said}\n", ""), "no progress where there is no terminal"


def test_drain_does_not_wait_where_it_is_told(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.held = threading.Event()
    gateway.on_change = lambda: setattr(gateway, "status", fleet([model("m", [endpoint("small-0", "draining")])]))
    assert run("drain", "small-0", "--no-wait") == 0
    assert not gateway.held.is_set(), "the gateway has not answered"
    gateway.held.set()
    assert "gets no new requests" in capsys.readouterr().out


def test_an_interruption_leaves_the_work_to_the_gateway(gateway: Gateway) -> None:
    gateway.held = threading.Event()
    asked = threading.Event()
    gateway.on_change = asked.set
    with subprocess.Popen(
        [*SHOAL, "fleet", "drain", "small-0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert asked.wait(60)
        reads = gateway.reads
        while gateway.reads < reads + 2:  # it has begun to wait
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, problems = process.communicate(timeout=60)
    gateway.held.set()
    assert (process.returncode, output) == (130, "")
    assert "small-0 goes on draining" in problems


def test_undrain(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("undrain", "small-5") == 0
    assert gateway.asked == [("POST", "/fleet/endpoints/small-5/undrain", None)]
    assert capsys.readouterr().out == "small-5 gets requests again\n"


@pytest.mark.parametrize("command", ["drain", "undrain", "restart", "remove"])
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
        ((), {}),
        (("--openai", "http://127.0.0.1:8003"), {"openai": "http://127.0.0.1:8003"}),
        (
            ("--openai", "http://x", "--name", "n", "--remote-model", "r", "--endpoint-key", "k"),
            {"openai": "http://x", "name": "n", "remote_model": "r", "api_key": "k"},
        ),
    ],
)
def test_add(
    gateway: Gateway, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], body: dict[str, Any]
) -> None:
    gateway.status = fleet([model("m", [endpoint("m-0")])])
    gateway.answer = b'{"name": "m-1"}'
    assert run("add", "m", *flags) == 0
    assert gateway.asked == [("POST", "/fleet/endpoints", {"model": "m"} | body)]
    assert capsys.readouterr().out == "m-1 was added to m\n"


def test_what_is_sent_is_what_the_gateway_takes() -> None:
    assert set(AddEndpoint.__struct_fields__) == {"model", "openai", "name", "api_key", "remote_model"}


def test_add_what_makes_no_sense(gateway: Gateway, errors: Callable[[], str]) -> None:
    assert run("add", "smollm2") == 1
    assert "there is no model 'smollm2': the nearest is 'smollm2-135m'" in errors()
    assert run("add", "smollm2-135m", "--name", "x") == 2
    assert "name it with --openai" in errors()
    assert gateway.asked == []
    gateway.on_change = lambda: setattr(
        gateway, "refusal", (502, b'{"error": {"message": "the endpoint cannot be used:\\n nothing listens"}}')
    )
    assert run("add", "smollm2-135m", "--openai", "http://x") == 1
    assert errors() == "error: the endpoint cannot be used: nothing listens\n", "in the gateway's own words"


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
        ((401, b"{}"), "asks for an API key (--api-key or SHOAL_API_KEY): none was given"),
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
    capsys.readouterr()
    assert run("status", "--api-key", "wrong") == 1
    assert "SHOAL_API_KEY): it was not accepted" in capsys.readouterr().err
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
