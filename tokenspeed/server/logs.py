"""The server's log: a line per event, as text or as JSON, and one with the figures of each request that ended."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from tokenspeed.server.summary import RequestSummary

_PLAIN = "%(asctime)s %(levelname)s %(message)s"
logger = logging.getLogger("tokenspeed.request")


def set_up_logging(log_format: str) -> None:
    """Write everything from INFO on to stderr. log_format: "text" or "json", an object per line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines(_PLAIN))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class TextLines(logging.Formatter):
    """The message, then the record's fields as name=value."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        shown = [f"{name}={_shown(value)}" for name, value in _fields(record).items()]
        return " ".join([super().formatMessage(record), *shown])


class JsonLines(logging.Formatter):
    """An object per record: time (UTC), level, logger, message, the record's fields, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _fields(record)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class RequestLog:
    """Writes a line for each request that ended. text_of: says the prompt in words, where prompts may be logged."""

    def __init__(self, text_of: Callable[[list[int]], str] | None = None) -> None:
        self._text_of = text_of

    def __call__(self, summary: RequestSummary) -> None:
        fields = summary_fields(summary)
        if self._text_of is not None:
            fields["prompt"] = self._text_of(summary.prompt_token_ids)
        logger.info("request", extra={"fields": fields})


def summary_fields(summary: RequestSummary) -> dict[str, Any]:
    """Names and values of a line. Times are in milliseconds; those that are not known are left out."""
    times = {
        "queue_ms": summary.queue_s,
        "ttft_ms": summary.ttft_s,
        "tpot_ms": summary.tpot_s,
        "total_ms": summary.total_s,
    }
    caller = summary.caller
    return {
        "request_id": caller.request_id or summary.request_id,
        **({"response_id": summary.request_id} if caller.request_id else {}),
        "prompt_tokens": len(summary.prompt_token_ids),
        "cached_tokens": summary.cached_tokens,
        "output_tokens": summary.output_tokens,
        **{name: round(1e3 * value, 3) for name, value in times.items() if value is not None},
        "finish_reason": ",".join(summary.finish_reasons),
        **({"client": caller.client} if caller.client else {}),
    }


def _shown(value: object) -> str:
    """A value without anything that could look like another field or line."""
    text = str(value)
    return text if text.isprintable() and not set(text) & set(' ="') else json.dumps(text)


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = record.__dict__.get("fields", {})
    return fields
