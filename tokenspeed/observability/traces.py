"""Spans to an OpenTelemetry collector, where its packages are installed (the extra `traces`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tokenspeed.contracts.errors import ConfigError

PACKAGES = ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http")
_EXPORT_TIMEOUT_S = 5.0
Value = str | int | float | Sequence[str]


@dataclass(frozen=True)
class Span:
    """Something that has happened. Times: nanoseconds since 1970. remote: the headers traceparent and tracestate of
    whoever caused it, by name, as they came; empty for none."""

    name: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Value] = field(default_factory=dict)
    children: Sequence[Span] = ()
    remote: Mapping[str, str] = field(default_factory=dict)


class Tracer(Protocol):
    """What is used of `opentelemetry.trace.Tracer`."""

    def start_span(self, name: str, context: Any = None, **settings: Any) -> Any: ...


class Exporter:
    """Hands spans to a tracer. child_of: the context in which a span's children begin; kind: of the outermost;
    context_of: the context that headers name, where they name one."""

    def __init__(
        self,
        tracer: Tracer,
        child_of: Callable[[Any], Any],
        kind: Any,
        context_of: Callable[[Mapping[str, str]], Any],
    ) -> None:
        self._tracer, self._child_of, self._kind = tracer, child_of, kind
        self._context_of = context_of

    def __call__(self, span: Span) -> None:
        """Queue a span with its children; a thread of the library sends them."""
        context = self._context_of(span.remote) if span.remote else None
        self._hand_over(span, context, {"kind": self._kind})

    def _hand_over(self, span: Span, context: Any, settings: dict[str, Any]) -> None:
        times = {"start_time": span.start_ns, "attributes": dict(span.attributes)}
        made = self._tracer.start_span(span.name, context=context, **times, **settings)
        for child in span.children:
            self._hand_over(child, self._child_of(made), {})
        made.end(end_time=span.end_ns)


def open_exporter(endpoint: str) -> Exporter:
    """Send to `endpoint`, OTLP over HTTP (http://collector:4318/v1/traces). OTEL_* variables are honoured.

    Raises ConfigError where the packages are missing.
    """
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError:
        raise ConfigError(f"--otlp-traces-endpoint needs the packages {' and '.join(PACKAGES)}") from None
    named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "tokenspeed"}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=_EXPORT_TIMEOUT_S)))
    return Exporter(
        provider.get_tracer("tokenspeed"),
        trace.set_span_in_context,
        trace.SpanKind.SERVER,
        TraceContextTextMapPropagator().extract,
    )
