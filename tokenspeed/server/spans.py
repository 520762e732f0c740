"""A request that ended as spans: queue, prefill and decode within the request.

Attributes: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tokenspeed.observability.traces import Span, Value
from tokenspeed.server.summary import RequestSummary

_CHAT = "chatcmpl-"
"""How the ids of chats begin."""


class RequestSpans:
    """Makes spans of requests and exports them. model: the name it is served under now."""

    def __init__(self, export: Callable[[Span], None], model: Callable[[], str]) -> None:
        self._export, self._model = export, model

    def __call__(self, summary: RequestSummary) -> None:
        self._export(request_span(summary, time.time_ns(), self._model()))


def request_span(summary: RequestSummary, end_ns: int, model: str) -> Span:
    """The span of a request that ended at `end_ns`, with those of the phases that it came to. It belongs to the
    trace that the request named."""
    start_ns = end_ns - _ns(summary.total_s)
    attributes = _attributes(summary, model)
    name = f"{attributes['gen_ai.operation.name']} {model}"
    return Span(name, start_ns, end_ns, attributes, _phases(summary, start_ns, end_ns), summary.caller.trace)


def _phases(summary: RequestSummary, start_ns: int, end_ns: int) -> list[Span]:
    fed_ns = start_ns + _ns(summary.queue_s or 0.0)
    phases = [] if summary.queue_s is None else [Span("queue", start_ns, fed_ns)]
    if summary.ttft_s is not None:
        first_ns = max(fed_ns, start_ns + _ns(summary.ttft_s))
        phases += [Span("prefill", fed_ns, first_ns), Span("decode", first_ns, max(first_ns, end_ns))]
    return phases


def _attributes(summary: RequestSummary, model: str) -> dict[str, Value]:
    attributes: dict[str, Value] = {
        "gen_ai.operation.name": "chat" if summary.request_id.startswith(_CHAT) else "text_completion",
        "gen_ai.provider.name": "tokenspeed",
        "gen_ai.request.model": model,
        "gen_ai.request.choice.count": summary.samples,
        "gen_ai.response.id": summary.request_id,
        "gen_ai.response.finish_reasons": list(summary.finish_reasons),
        "gen_ai.usage.input_tokens": len(summary.prompt_token_ids),
        "gen_ai.usage.cache_read.input_tokens": summary.cached_tokens,
        "gen_ai.usage.output_tokens": summary.output_tokens,
    }
    if summary.ttft_s is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = summary.ttft_s
    if "error" in summary.finish_reasons:
        attributes["error.type"] = "_OTHER"
    return attributes


def _ns(seconds: float) -> int:
    return round(1e9 * seconds)
