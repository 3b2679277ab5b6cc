"""Spans as an exporter in memory gets them: phases in order, without gap or overlap, under one request."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from shoal.serve.tracing import RequestTrace, Tracer, TracingConfig, TracingUnavailable, open_tracer

trace_export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="needs extra otel")

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Traced:
    def __init__(self, ratio: float = 1.0) -> None:
        self.exporter = trace_export.InMemorySpanExporter()
        self.tracer: Tracer = open_tracer(TracingConfig(sample_ratio=ratio), self.exporter)

    def spans(self) -> list[Any]:
        """By their beginning."""
        self.tracer.close()
        return sorted(self.exporter.get_finished_spans(), key=lambda span: (span.parent is not None, span.start_time))


@pytest.fixture
def traced() -> Iterator[Traced]:
    traced = Traced()
    yield traced
    traced.tracer.close()


def migrated(trace: RequestTrace) -> None:
    trace.queued()
    trace.routing()
    trace.dispatched("a-0")
    trace.tokens("a-0")
    trace.tokens("a-0")
    trace.moved("a-0", "lost", 12)
    trace.routing()
    trace.dispatched("a-1")
    trace.tokens("a-1")
    trace.ended("stop", 40)


def test_phases_of_a_request_that_was_moved(traced: Traced) -> None:
    migrated(traced.tracer.request("chat", model="small", tenant="red"))
    request, *phases = traced.spans()
    assert [span.name for span in phases] == ["queue", "route", "prefill", "decode", "migration", "decode"]
    assert all(span.parent.span_id == request.context.span_id for span in phases)
    ends = [span.end_time for span in phases]
    assert all(begin.start_time >= end for begin, end in zip(phases[1:], ends, strict=False)), "one phase at a time"
    assert request.start_time <= phases[0].start_time and phases[-1].end_time <= request.end_time
    assert dict(phases[4].attributes) == {
        "shoal.endpoint.from": "a-0",
        "shoal.endpoint.to": "a-1",
        "shoal.reason": "lost",
        "shoal.tokens.delivered": 12,
    }
    assert [span.attributes["shoal.endpoint"] for span in (phases[2], phases[3], phases[5])] == ["a-0", "a-0", "a-1"]
    assert request.attributes["shoal.model"] == "small"
    assert request.attributes["shoal.finish_reason"] == "stop"
    assert [event.name for event in request.events] == ["first_token"], (
        "a client's first token is one, also if it moved"
    )
    assert request.status.is_unset


def test_a_retry_before_the_first_token_is_another_route_and_prefill(traced: Traced) -> None:
    trace = traced.tracer.request("chat")
    trace.routing()
    trace.dispatched("a-0")
    trace.routing()
    trace.dispatched("a-1")
    trace.tokens("a-1")
    trace.ended("length", 3)
    assert [span.name for span in traced.spans()] == ["chat", "route", "prefill", "route", "prefill", "decode"]


def test_a_migration_that_fails_goes_on_as_another(traced: Traced) -> None:
    trace = traced.tracer.request("chat")
    trace.dispatched("a-0")
    trace.tokens("a-0")
    trace.moved("a-0", "hung", 5)
    trace.dispatched("a-1")
    trace.moved("a-1", "lost", 5)
    trace.ended("lost", 5)
    request, *phases = traced.spans()
    assert [span.name for span in phases] == ["prefill", "decode", "migration", "migration"]
    assert phases[2].attributes["shoal.endpoint.to"] == phases[3].attributes["shoal.endpoint.from"] == "a-1"
    assert "shoal.endpoint.to" not in phases[3].attributes
    assert request.status.description == "the request ended with 'lost'"


@pytest.mark.parametrize(("status", "is_error"), [(429, False), (503, True)])
def test_a_refusal(traced: Traced, status: int, is_error: bool) -> None:
    trace = traced.tracer.request("completion")
    trace.queued()
    trace.refused(status, "the queue is full")
    request, queue = traced.spans()
    assert queue.name == "queue"
    assert request.attributes["http.response.status_code"] == status
    assert request.status.is_unset is not is_error


def test_the_clients_trace_goes_on_here_and_at_the_endpoint(traced: Traced) -> None:
    trace = traced.tracer.request("chat", traceparent=f"00-{TRACE}-{PARENT}-01")
    trace.dispatched("a-0")
    sent = trace.traceparent
    trace.ended("stop", 1)
    request, prefill = traced.spans()
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == PARENT
    assert sent == f"00-{TRACE}-{prefill.context.span_id:016x}-01"


@pytest.mark.parametrize("traceparent", ["", "00-xyz", f"ff-{TRACE}-{PARENT}-01", f"00-{'0' * 32}-{PARENT}-01"])
def test_what_is_no_traceparent_begins_a_trace(traced: Traced, traceparent: str) -> None:
    trace = traced.tracer.request("chat", traceparent=traceparent)
    trace.ended("stop", 1)
    (request,) = traced.spans()
    assert request.parent is None
    assert open_tracer(TracingConfig()).request("chat", traceparent=traceparent).traceparent == ""


@pytest.mark.parametrize(("ratio", "flag", "count"), [(0.0, "", 0), (0.0, "01", 1), (1.0, "00", 0), (1.0, "", 1)])
def test_sampling_is_the_clients_choice_first(ratio: float, flag: str, count: int) -> None:
    traced = Traced(ratio)
    trace = traced.tracer.request("chat", traceparent=f"00-{TRACE}-{PARENT}-{flag}" if flag else "")
    assert int(trace.traceparent[-2:], 16) & 1 == count, "the endpoint is told what was decided"
    migrated(trace)
    assert len(traced.spans()) == 7 * count, "all or nothing"


def test_without_tracing_nothing_is_imported_and_the_clients_trace_is_passed_on() -> None:
    trace = open_tracer(TracingConfig()).request("chat", traceparent=f"00-{TRACE}-{PARENT}-01")
    assert trace.traceparent == f"00-{TRACE}-{PARENT}-01"
    migrated(trace)
    code = "import sys, shoal.serve.tracing as t; t.open_tracer(t.TracingConfig()); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "shoal.serve.tracing" in loaded
    assert not [name for name in loaded if name.startswith("opentelemetry")]


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(TracingUnavailable, match=r"pip install 'shoal\[otel\]'"):
        open_tracer(TracingConfig(endpoint="http://127.0.0.1:4318/v1/traces"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TracingConfig(endpoint="127.0.0.1:4317"), "'127.0.0.1:4317': write the URL"),
        (TracingConfig(sample_ratio=1.5), "sample_ratio is 1.5"),
    ],
)
def test_settings_that_make_no_sense(config: TracingConfig, message: str) -> None:
    with pytest.raises(TracingUnavailable, match=message):
        open_tracer(config)


def test_spans_reach_an_otlp_receiver() -> None:
    got: list[tuple[str, bytes]] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tracer = open_tracer(TracingConfig(endpoint=f"http://127.0.0.1:{server.server_port}/v1/traces"))
        migrated(tracer.request("chat"))
        tracer.close()
        server.shutdown()
    ((path, body),) = got
    assert path == "/v1/traces"
    assert b"migration" in body and b"shoal-gateway" in body
