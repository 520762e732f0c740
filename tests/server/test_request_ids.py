"""x-request-id: taken over where it is sane, always answered, and the id of the log's line."""

from __future__ import annotations

import random
import re
import secrets

import pytest

from tests.seeds import SEED
from tests.server.conftest import Serve, Served
from tests.server.fake_engine import REFUSED
from tokenspeed.server.access import Access
from tokenspeed.server.client import Caller, address_hash, note
from tokenspeed.server.keys import ApiKeys
from tokenspeed.server.logs import summary_fields
from tokenspeed.server.summary import RequestSummary

OWN = re.compile("[0-9a-f]{24}")
PRINTABLE = [chr(code) for code in range(0x21, 0x7F)]


def headers(*ids: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"accept", b"*/*"), *((b"x-request-id", each) for each in ids)]


@pytest.mark.parametrize("length", [1, 2, 36, 127, 128])
def test_sane_ids_are_taken_over(length: int) -> None:
    text = "".join(random.Random(SEED + length).choices(PRINTABLE, k=length))
    assert note(headers(text.encode()), None) == Caller("", text)


@pytest.mark.parametrize(
    "ids", [[], [b""], [b"a" * 129], [b"a b"], [b"a\n"], [b"a\tb"], [b"\x7f"], ["é".encode()], [b"\xff"], [b"a", b"a"]]
)
def test_others_are_replaced(ids: list[bytes]) -> None:
    made = [note(headers(*ids), ("10.0.0.1", 5)) for _ in range(2)]
    assert all(OWN.fullmatch(caller.request_id) for caller in made)
    assert made[0].request_id != made[1].request_id
    assert made[0].client == made[1].client == address_hash("10.0.0.1")


def test_headers_of_a_trace() -> None:
    parent, first, second = (b"traceparent", b"00-x"), (b"tracestate", b"a=1"), (b"tracestate", b"b=2")
    assert note([parent, first, second], None).trace == {"traceparent": "00-x", "tracestate": "a=1,b=2"}
    assert note([parent, parent, first], None).trace == {}
    assert note([first], None).trace == {}


def test_every_answer_has_one(serve: Serve) -> None:
    key = f"sk-{secrets.token_hex(8)}"
    served = serve(chat_template="plain", access=Access(ApiKeys.load([key], None), cors_origins=["*"]))
    allowed = {"authorization": f"Bearer {key}"}
    talk = {"messages": [{"role": "user", "content": "hi"}]}
    answers = [
        (200, "GET", "/health", {}, None),
        (401, "GET", "/v1/models", {}, None),
        (200, "GET", "/v1/models", allowed, None),
        (404, "GET", "/nothing", allowed, None),
        (405, "GET", "/v1/completions", allowed, None),
        (415, "POST", "/v1/completions", allowed, None),
        (400, "POST", "/v1/completions", allowed, {"prompt": 1.5}),
        (200, "POST", "/v1/completions", allowed, {"prompt": "x"}),
        (200, "POST", "/v1/completions", allowed, {"prompt": "x", "stream": True}),
        (503, "POST", "/v1/completions", allowed, {"prompt": [REFUSED]}),
        (200, "POST", "/v1/chat/completions", allowed, talk | {"stream": True}),
        (200, "OPTIONS", "/v1/models", {"origin": "http://a.example", "access-control-request-method": "GET"}, None),
    ]
    for status, method, path, sent, body in answers:
        name = secrets.token_hex(5)
        for given, expected in ({"x-request-id": name}, re.escape(name)), ({}, OWN.pattern):
            response = served.client.request(method, path, headers=sent | given, json=body)
            assert response.status_code == status, (method, path)
            assert re.fullmatch(expected, response.headers["x-request-id"]), (method, path)
    served.engine.submit = None  # type: ignore[assignment,method-assign]
    asked = allowed | {"x-request-id": "of-a-bug"}
    response = served.client.post("/v1/completions", json={"prompt": "x"}, headers=asked)
    assert (response.status_code, response.headers["x-request-id"]) == (500, "of-a-bug")


def test_the_log_names_it(served: Served) -> None:
    told: list[RequestSummary] = []
    served.state.metrics.observers.append(told.append)
    for given in ({"x-request-id": "mine"}, {}):
        response = served.client.post("/v1/completions", json={"prompt": ["a", "b"]}, headers=given)
        fields = [summary_fields(summary) for summary in told[-2:]]
        assert {line["request_id"] for line in fields} == {response.headers["x-request-id"]}
        assert sorted(line["response_id"] for line in fields) == [f"{response.json()['id']}-{n}" for n in (0, 1)]
    assert [summary.caller.request_id for summary in told[:2]] == ["mine", "mine"]
    assert len({summary.caller.request_id for summary in told}) == 2
