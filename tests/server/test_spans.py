"""A request as spans, and how they are handed to OpenTelemetry's tracer."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tests.server.conftest import Served
from tokenspeed.observability.traces import Exporter, Span
from tokenspeed.server.spans import RequestSpans, request_span
from tokenspeed.server.summary import RequestSummary

END_NS = 1_700_000_000_000_000_000
MS = 1_000_000


def summary(**fields: Any) -> RequestSummary:
    known = {"queue_s": 0.25, "ttft_s": 1.0, "total_s": 3.0, "output_tokens": 7, "cached_tokens": 2}
    return RequestSummary("chatcmpl-1-0", [5] * 4, 2, finish_reasons=["stop", "length"], **(known | fields))


def phases(span: Span) -> list[tuple[str, int, int]]:
    """Names, and milliseconds since the beginning."""
    start = span.start_ns
    return [(child.name, (child.start_ns - start) // MS, (child.end_ns - start) // MS) for child in span.children]


def test_phases_follow_each_other() -> None:
    span = request_span(summary(), END_NS, "m")
    assert (span.name, END_NS - span.start_ns, span.end_ns) == ("chat m", 3000 * MS, END_NS)
    assert phases(span) == [("queue", 0, 250), ("prefill", 250, 1000), ("decode", 1000, 3000)]
    assert phases(request_span(summary(queue_s=None), END_NS, "m")) == [("prefill", 0, 1000), ("decode", 1000, 3000)]
    assert phases(request_span(summary(ttft_s=None), END_NS, "m")) == [("queue", 0, 250)]
    assert phases(request_span(summary(queue_s=None, ttft_s=None), END_NS, "m")) == []
    # Two clocks are read: a phase is never of negative length.
    assert phases(request_span(summary(queue_s=2.0), END_NS, "m"))[1:] == [
        ("prefill", 2000, 2000),
        ("decode", 2000, 3000),
    ]


def test_attributes() -> None:
    attributes = request_span(summary(), END_NS, "m").attributes
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "tokenspeed",
        "gen_ai.request.model": "m",
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.id": "chatcmpl-1-0",
        "gen_ai.response.finish_reasons": ["stop", "length"],
        "gen_ai.usage.input_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.response.time_to_first_chunk": 1.0,
    }
    failed = request_span(RequestSummary("cmpl-1-0", [5], 1, finish_reasons=["error"]), END_NS, "m").attributes
    assert failed["gen_ai.operation.name"] == "text_completion"
    assert failed["error.type"] == "_OTHER"


def test_a_served_request_is_exported(served: Served) -> None:
    spans: list[Span] = []
    served.state.metrics.observers.append(RequestSpans(spans.append, lambda: served.state.names[0]))
    messages = [{"role": "user", "content": "hello"}]
    body = served.client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 3}).json()
    (span,) = spans
    assert span.name == "chat fake"
    assert span.attributes["gen_ai.response.id"] == f"{body['id']}-0"
    assert span.attributes["gen_ai.usage.output_tokens"] == 3
    assert [child.name for child in span.children] == ["queue", "prefill", "decode"]
    assert "hello" not in repr(span)


TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    "headers, parent",
    [
        ({}, None),
        ({"traceparent": f"00-{TRACE}-{PARENT}-01"}, (TRACE, PARENT, 1, {})),
        ({"traceparent": f"00-{TRACE}-{PARENT}-00"}, (TRACE, PARENT, 0, {})),
        ({"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=1,b=2"}, (TRACE, PARENT, 1, {"a": "1", "b": "2"})),
        ({"traceparent": f"cc-{TRACE}-{PARENT}-01-what-the-future-will-be-like"}, (TRACE, PARENT, 1, {})),
        ({"traceparent": f"00-{TRACE}-{PARENT}-01-more"}, None),
        ({"traceparent": f"ff-{TRACE}-{PARENT}-01"}, None),
        ({"traceparent": f"00-{TRACE.upper()}-{PARENT}-01"}, None),
        ({"traceparent": f"00-{'0' * 32}-{PARENT}-01"}, None),
        ({"traceparent": f"00-{TRACE}-{'0' * 16}-01"}, None),
        ({"traceparent": f"00-{TRACE[1:]}-{PARENT}-01"}, None),
        ({"traceparent": "é"}, None),
        ({"tracestate": "a=1"}, None),
    ],
)
def test_a_span_belongs_to_the_trace_that_the_request_names(
    served: Served, headers: dict[str, str], parent: tuple[str, str, int, dict[str, str]] | None
) -> None:
    tracer = FakeTracer()
    exporter = Exporter(tracer, lambda made: f"in {made!r}", "server", TraceContextTextMapPropagator().extract)
    served.state.metrics.observers.append(RequestSpans(exporter, lambda: "m"))
    encoded = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
    assert served.client.post("/v1/completions", json={"prompt": "x"}, headers=encoded).status_code == 200
    contexts = [told[2] for told in tracer.told if told[0] == "start"]
    assert contexts[1:] == ["in text_completion m"] * 3
    found = get_current_span(contexts[0]).get_span_context()
    assert found.is_valid == (parent is not None)
    if parent is not None:
        trace, span, flags, state = parent
        assert (found.trace_id, found.span_id, found.trace_flags) == (int(trace, 16), int(span, 16), flags)
        assert dict(found.trace_state) == state
        assert found.is_remote


class FakeTracer:
    """Notes what it is told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def start_span(self, name: str, context: Any = None, **settings: Any) -> Any:
        self.told.append(("start", name, context, settings))
        tracer = self

        class Made:
            def end(self, end_time: int) -> None:
                tracer.told.append(("end", name, end_time))

            def __repr__(self) -> str:
                return name

        return Made()


def test_children_begin_in_the_context_of_their_parent() -> None:
    tracer = FakeTracer()
    span = Span("whole", 10, 90, {"a": 1}, [Span("one", 10, 20), Span("two", 20, 90)])
    Exporter(tracer, lambda made: f"in {made!r}", "server", dict)(span)
    assert tracer.told == [
        ("start", "whole", None, {"start_time": 10, "attributes": {"a": 1}, "kind": "server"}),
        ("start", "one", "in whole", {"start_time": 10, "attributes": {}}),
        ("end", "one", 20),
        ("start", "two", "in whole", {"start_time": 20, "attributes": {}}),
        ("end", "two", 90),
        ("end", "whole", 90),
    ]
