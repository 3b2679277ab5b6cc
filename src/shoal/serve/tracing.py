"""OpenTelemetry spans of requests: one for the request, and below it one for each phase that it went through.

A request is in one phase at a time (queue, route, prefill, decode, migration), so the begin of a phase is the end of
the one before: a retry, a second migration or a refusal in the queue need no case of their own. The SDK is imported
only when tracing is on; without it a client's `traceparent` is passed on as it came.
"""

from __future__ import annotations

import importlib
import re
from typing import Any, Literal, Protocol

import msgspec

from shoal import __version__
from shoal.core.types import FinishReason

Phase = Literal["queue", "route", "prefill", "decode", "migration"]

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


class TracingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    endpoint: str | None = None
    """OTLP over HTTP, as http://127.0.0.1:4318/v1/traces; None is no tracing."""
    sample_ratio: float = 1.0
    """Share of requests that are traced, where the client's `traceparent` does not say, 0 to 1."""
    service_name: str = "shoal-gateway"


class TracingUnavailable(Exception):
    """Tracing is asked for and cannot be had. The message is for the user."""


class RequestTrace(Protocol):
    """One request. Calls come in the order of what happens; any may come again, as after a retry."""

    @property
    def traceparent(self) -> str:
        """To send with what is sent on the request's behalf now; empty where there is none."""

    def queued(self) -> None:
        """It waits in the gateway."""

    def routing(self) -> None:
        """An endpoint is chosen. In a migration, that is a part of it."""

    def dispatched(self, endpoint: str) -> None:
        """Sent to an endpoint: prefill begins, or goes on as part of a migration."""

    def tokens(self, endpoint: str) -> None:
        """The first tokens from this endpoint: decode begins."""

    def moved(self, endpoint: str, reason: str, num_delivered: int) -> None:
        """It lost that endpoint after so many tokens: the migration lasts until the first tokens from another."""

    def ended(self, reason: FinishReason, num_tokens: int) -> None:
        """The request is over; nothing may be called any more."""

    def refused(self, status: int, message: str) -> None:
        """It was not accepted; nothing may be called any more."""


class Tracer(Protocol):
    def request(self, name: str, *, traceparent: str = "", tracestate: str = "", **attributes: Any) -> RequestTrace:
        """A request that arrived now. `name` is "chat" or "completion"; attributes as "model", "tenant"."""

    def close(self) -> None:
        """Send what is still here. May take seconds: not on the event loop."""


def open_tracer(config: TracingConfig, exporter: Any = None) -> Tracer:
    """`exporter` is an OpenTelemetry SpanExporter in place of OTLP to `config.endpoint`. Raises TracingUnavailable."""
    if not 0 <= config.sample_ratio <= 1:
        raise TracingUnavailable(f"tracing.sample_ratio is {config.sample_ratio:g}: it is a share, from 0 to 1")
    if config.endpoint is None and exporter is None:
        return _NoTracer()
    if config.endpoint is not None and not config.endpoint.startswith(("http://", "https://")):
        raise TracingUnavailable(
            f"tracing.endpoint is {config.endpoint!r}: write the URL of an OTLP/HTTP receiver, "
            "as http://127.0.0.1:4318/v1/traces"
        )
    return _OtelTracer(config, exporter)


class _NoTracer:
    def request(self, name: str, *, traceparent: str = "", tracestate: str = "", **attributes: Any) -> RequestTrace:
        return _NoTrace(traceparent if _TRACEPARENT.fullmatch(traceparent) else "")

    def close(self) -> None:
        pass


class _NoTrace:
    def __init__(self, traceparent: str) -> None:
        self._traceparent = traceparent

    @property
    def traceparent(self) -> str:
        return self._traceparent

    def _nothing(self, *_: object) -> None:
        pass

    queued = routing = dispatched = tokens = moved = ended = refused = _nothing


class _OtelTracer:
    def __init__(self, config: TracingConfig, exporter: Any) -> None:
        sdk, sampling, export = (
            _import(f"opentelemetry.sdk.{name}") for name in ("trace", "trace.sampling", "trace.export")
        )
        resources = _import("opentelemetry.sdk.resources")
        if exporter is None:
            otlp = _import("opentelemetry.exporter.otlp.proto.http.trace_exporter")
            exporter = otlp.OTLPSpanExporter(endpoint=config.endpoint)
        self.api = _import("opentelemetry.trace")
        self.propagator = _import("opentelemetry.trace.propagation.tracecontext").TraceContextTextMapPropagator()
        self._provider = sdk.TracerProvider(
            sampler=sampling.ParentBased(sampling.TraceIdRatioBased(config.sample_ratio)),
            resource=resources.Resource.create({"service.name": config.service_name, "service.version": __version__}),
            shutdown_on_exit=False,
        )
        # Spans are sent from a thread of its own, and dropped where the receiver is slower than they come.
        self._provider.add_span_processor(export.BatchSpanProcessor(exporter))
        self.tracer = self._provider.get_tracer("shoal", __version__)

    def request(self, name: str, *, traceparent: str = "", tracestate: str = "", **attributes: Any) -> RequestTrace:
        headers = {"traceparent": traceparent, "tracestate": tracestate}
        parent = self.propagator.extract({key: value for key, value in headers.items() if value})
        span = self.tracer.start_span(
            name,
            context=parent,
            kind=self.api.SpanKind.SERVER,
            attributes={f"shoal.{key}": value for key, value in attributes.items()},
        )
        return _OtelTrace(self, span)

    def close(self) -> None:
        self._provider.shutdown()


class _OtelTrace:
    def __init__(self, tracer: _OtelTracer, span: Any) -> None:
        self._tracer = tracer
        self._span = span
        self._below = tracer.api.set_span_in_context(span)
        self._phase: Phase | None = None
        self._child: Any = None
        self._has_tokens = False

    @property
    def traceparent(self) -> str:
        carrier: dict[str, str] = {}
        current = self._below if self._child is None else self._tracer.api.set_span_in_context(self._child)
        self._tracer.propagator.inject(carrier, context=current)
        return carrier.get("traceparent", "")

    def queued(self) -> None:
        self._begin("queue")

    def routing(self) -> None:
        if self._phase != "migration":
            self._begin("route")

    def dispatched(self, endpoint: str) -> None:
        if self._phase == "migration":
            self._child.set_attribute("shoal.endpoint.to", endpoint)
        else:
            self._begin("prefill", {"shoal.endpoint": endpoint})

    def tokens(self, endpoint: str) -> None:
        if not self._has_tokens:
            self._has_tokens = True
            self._span.add_event("first_token")
        if self._phase != "decode":
            self._begin("decode", {"shoal.endpoint": endpoint})

    def moved(self, endpoint: str, reason: str, num_delivered: int) -> None:
        attributes = {
            "shoal.endpoint.from": endpoint,
            "shoal.reason": reason,
            "shoal.tokens.delivered": num_delivered,
        }
        self._begin("migration", attributes)

    def ended(self, reason: FinishReason, num_tokens: int) -> None:
        self._span.set_attribute("shoal.finish_reason", reason)
        self._span.set_attribute("shoal.tokens.generated", num_tokens)
        self._end(f"the request ended with {reason!r}" if reason in ("error", "lost") else None)

    def refused(self, status: int, message: str) -> None:
        self._span.set_attribute("http.response.status_code", status)
        # By OpenTelemetry's rules a client's mistake is not an error of the server's span.
        self._end(message if status >= 500 else None)

    def _begin(self, phase: Phase, attributes: dict[str, Any] | None = None) -> None:
        if not self._span.is_recording():
            return  # not sampled: nothing of its phases would be kept either
        if self._child is not None:
            self._child.end()
        self._phase = phase
        self._child = self._tracer.tracer.start_span(phase, context=self._below, attributes=attributes)

    def _end(self, error: str | None) -> None:
        if self._child is not None:
            self._child.end()
        if error is not None:
            self._span.set_status(self._tracer.api.StatusCode.ERROR, error)
        self._span.end()


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise TracingUnavailable(
            "tracing.endpoint is set and OpenTelemetry is not installed: pip install 'shoal[otel]', or leave it out"
        ) from None
