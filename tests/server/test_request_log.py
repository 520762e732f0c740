"""The line of each request that ended, and that it keeps prompts to itself unless it may tell them."""

from __future__ import annotations

import io
import json
import logging
import re
from typing import Any

import pytest

from tests.server.conftest import Served
from tests.server.fake_engine import CACHED, REFUSED
from tokenspeed.server.client import Caller, address_hash
from tokenspeed.server.logs import JsonLines, RequestLog, TextLines, summary_fields
from tokenspeed.server.summary import RequestSummary

SECRET = "seven dwarfs"


@pytest.fixture
def told(served: Served) -> list[RequestSummary]:
    summaries: list[RequestSummary] = []
    served.state.metrics.observers.append(summaries.append)
    return summaries


def formatted(formatter: logging.Formatter, log: RequestLog, summary: RequestSummary) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.getLogger("tokenspeed.request")
    logger.addHandler(handler)
    level, logger.level = logger.level, logging.INFO
    try:
        log(summary)
    finally:
        logger.removeHandler(handler)
        logger.level = level
    assert stream.getvalue().count("\n") == 1
    return stream.getvalue().strip()


def test_a_request_is_told_once(served: Served, told: list[RequestSummary]) -> None:
    body = served.client.post("/v1/completions", json={"prompt": "abc", "n": 2, "max_tokens": 3}).json()
    (summary,) = told
    assert summary.request_id == f"{body['id']}-0"
    assert (summary.prompt_token_ids, summary.cached_tokens, summary.output_tokens) == ([97, 98, 99], CACHED, 6)
    assert summary.finish_reasons == ["length", "length"]
    assert summary.ttft_s is not None
    assert summary.tpot_s is not None
    assert 0 < summary.ttft_s + 2 * summary.tpot_s <= summary.total_s * 1.001
    assert summary.caller.client == address_hash("127.0.0.1")
    assert "127" not in re.sub(r"[0-9a-f]{12}", "", summary.caller.client)
    assert address_hash("127.0.0.2") != summary.caller.client


def test_every_prompt_of_a_request_has_its_line(served: Served, told: list[RequestSummary]) -> None:
    served.client.post("/v1/completions", json={"prompt": ["a", "bc"], "max_tokens": 1})
    found = sorted((summary.request_id[-2:], len(summary.prompt_token_ids)) for summary in told)
    assert found == [("-0", 1), ("-1", 2)]


def test_requests_that_failed_are_told_too(served: Served, told: list[RequestSummary]) -> None:
    served.client.post("/v1/completions", json={"prompt": [REFUSED]})
    (summary,) = told
    assert (summary.finish_reasons, summary.output_tokens, summary.ttft_s) == (["error"], 0, None)
    assert "ttft_ms" not in summary_fields(summary)


def filled(**fields: Any) -> RequestSummary:
    known: dict[str, Any] = {"cached_tokens": 2, "output_tokens": 5, "queue_s": 0.0015, "ttft_s": 0.25, "total_s": 1.0}
    summary: dict[str, Any] = {"finish_reasons": ["stop"], "caller": Caller("c0ffee")} | known | fields
    return RequestSummary("cmpl-x-0", list(SECRET.encode()), 1, **summary)


def test_lines() -> None:
    text = formatted(TextLines("%(levelname)s %(message)s"), RequestLog(), filled())
    assert text == (
        "INFO request request_id=cmpl-x-0 prompt_tokens=12 cached_tokens=2 output_tokens=5 queue_ms=1.5 ttft_ms=250.0 "
        "total_ms=1000.0 finish_reason=stop client=c0ffee"
    )
    named = formatted(TextLines("%(message)s"), RequestLog(), filled(caller=Caller(request_id='a="b')))
    assert named.startswith(r'request request_id="a=\"b" response_id=cmpl-x-0 prompt_tokens=12 ')
    line = json.loads(formatted(JsonLines(), RequestLog(), filled(tpot_s=0.0625)))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "INFO", "logger": "tokenspeed.request", "message": "request", "request_id": "cmpl-x-0",
        "prompt_tokens": 12, "cached_tokens": 2, "output_tokens": 5, "queue_ms": 1.5, "ttft_ms": 250.0, "tpot_ms": 62.5,
        "total_ms": 1000.0, "finish_reason": "stop", "client": "c0ffee",
    }  # fmt: skip


@pytest.mark.parametrize("formatter", [TextLines("%(message)s"), JsonLines()], ids=["text", "json"])
def test_prompts_only_where_they_are_asked_for(formatter: logging.Formatter) -> None:
    assert SECRET not in formatted(formatter, RequestLog(), filled())
    assert SECRET in formatted(formatter, RequestLog(lambda ids: bytes(ids).decode()), filled())


@pytest.mark.parametrize("prompt", ["a\nb", 'x finish_reason=stop "', "\x1b[2J\u2028"])
def test_a_prompt_cannot_forge_lines_or_fields(prompt: str) -> None:
    text = formatted(TextLines("%(message)s"), RequestLog(lambda ids: prompt), filled())
    head, _, shown = text.partition(" prompt=")
    assert json.loads(shown) == prompt
    assert text.isascii()
    assert text.isprintable()
    assert head.endswith("client=c0ffee")


def test_nothing_of_a_prompt_is_in_any_log(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "tokenspeed")
    served.state.metrics.observers.append(RequestLog())
    for fields in ({}, {"max_tokens": -1}, {"unknown": SECRET}, {"stream": True}):
        served.client.post("/v1/completions", json={"prompt": SECRET} | fields)
    requests = [record for record in caplog.records if record.name == "tokenspeed.request"]
    assert len(requests) == 2
    assert SECRET not in repr([record.__dict__ for record in caplog.records])
    served.state.metrics.observers[-1] = RequestLog(served.state.prompt_text)
    served.client.post("/v1/completions", json={"prompt": SECRET})
    assert caplog.records[-1].__dict__["fields"]["prompt"] == SECRET


def test_tracebacks_and_values_that_are_not_text() -> None:
    try:
        raise ValueError("of no \n use")
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "bad %s", (b"\xff",), (ValueError, error, None))
    line = json.loads(JsonLines().format(record))
    assert line["message"] == "bad b'\\xff'"
    assert "ValueError: of no \n use" in line["traceback"]
