from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from shoal.cli import main
from tests.plan.diagnose.expositions import RECORDED, vllm

LIGHT = str(RECORDED / "vllm-0.32.0-light.prom")
BEFORE, AFTER = (str(RECORDED / f"vllm-0.32.0-memory-{when}.prom") for when in ("before", "after"))


class Exporter:
    """An engine of which nothing is there but its metrics: each scrape counts 100 tokens more."""

    def __init__(self) -> None:
        self.scrapes = 0
        self.status = 200
        self.keys: list[str | None] = []
        exporter = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                exporter.scrapes += 1
                exporter.keys.append(self.headers.get("authorization"))
                # The third scrape of a window fails.
                status = 503 if exporter.scrapes == 3 else exporter.status
                status = status if self.path == "/metrics" else 404
                if self.path == "/moved":
                    self.send_response(302)
                    self.send_header("location", "/metrics")
                    self.end_headers()
                    return
                self.send_response(status)
                self.end_headers()
                if status == 200:
                    self.wfile.write(vllm(tokens=1000 + 100 * exporter.scrapes).encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    exporter = Exporter()
    thread = threading.Thread(target=exporter.server.serve_forever, daemon=True)
    thread.start()
    yield exporter
    exporter.server.shutdown()
    exporter.server.server_close()
    thread.join(10)


def test_two_files_are_a_window(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", "--before", BEFORE, "--metrics", AFTER, "--window", "12.06"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "1 does not fit: yes (shown)" in text
    assert "a window of 12.1 s" in text
    assert "[vllm:num_preemptions_total]" in text
    assert "vLLM: --tensor-parallel-size" in text
    assert "shoal: --tensor-parallel-size" in text
    assert "wrong if:" in text


def test_one_file_is_a_lifetime_in_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", "--metrics", LIGHT, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "healthy"
    assert report["targets"][0]["basis"] == "lifetime"


def test_a_url_is_watched_and_a_scrape_that_fails_is_a_note(
    exporter: Exporter, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnose", "--metrics", exporter.url, "--watch", "1.5", "--api-key", "k", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert exporter.scrapes >= 3
    assert set(exporter.keys) == {"Bearer k"}
    assert report["targets"][0]["basis"] == "window"
    assert report["targets"][0]["seconds"] > 0
    assert report["notes"] == [f"{exporter.url} did not answer 1 times in the window"]


def test_a_key_goes_nowhere_if_there_is_none(
    exporter: Exporter, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHOAL_API_KEY", raising=False)
    assert main(["diagnose", "--metrics", exporter.url]) == 0
    assert exporter.keys == [None]
    assert "(vllm): healthy" in capsys.readouterr().out


def test_a_redirection_does_not_get_the_key(exporter: Exporter, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", "--metrics", exporter.url + "/moved", "--api-key", "k"]) == 0
    assert exporter.keys == ["Bearer k", None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", LIGHT, "--watch", "5"], "does not change"),
        (["--metrics", LIGHT, "--before", BEFORE, "--before", AFTER], "2 files for 1"),
        (["--metrics", "http://127.0.0.1:1", "--before", BEFORE], "read twice with --watch"),
        (["--metrics", LIGHT, "--window", "5"], "give both"),
        (["--metrics", LIGHT, "--metrics", LIGHT], "named twice"),
        (["--metrics", LIGHT, "--itl-p99", "30"], "'30' is not a duration: it needs a unit"),
        (["--metrics", LIGHT, "--ttft-p99", "0s"], "is no time"),
        ([], "Missing option"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_read_is_said_in_one_line(exporter: Exporter, capsys: pytest.CaptureFixture[str]) -> None:
    def said(source: str) -> str:
        assert main(["diagnose", "--metrics", source]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    assert "No such file" in said("/nowhere/metrics.prom")
    assert "not Prometheus text" in said(__file__)
    assert "nothing answers at http://127.0.0.1:9/metrics" in said("http://127.0.0.1:9")
    assert "status 404 (SGLang has metrics with --enable-metrics)" in said(exporter.url + "/elsewhere")
    exporter.status = 401
    assert "--api-key" in said(exporter.url)
