"""Bounds: what a request may hold and ask for, how many may wait, and for how long."""

from __future__ import annotations

import json
import random
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import repeat
from typing import Any

import pytest

from tests.seeds import SEED
from tests.server.conftest import GUARD_S, Serve, Served
from tests.server.fake_engine import MAX_NUM_SEQS, FakeEngine
from tokenspeed.cli.main import main, parser
from tokenspeed.cli.serve import serve_config
from tokenspeed.config.serving import Limits
from tokenspeed.config.settings import flag
from tokenspeed.server import limits as server_limits

HELD = 4
ENDS = (b"[DONE]", b"fallback_ops")
"""Of a stream, and of a whole answer."""
TALK = [{"role": "user", "content": "hi"}]
SET: dict[str, Any] = {
    "max_body_bytes": 1000,
    "max_choices": 5,
    "max_n": 3,
    "max_stop": 2,
    "max_stop_len": 7,
    "max_logprobs": 4,
    "max_queue_len": 9,
    "request_timeout": 1.5,
}


def connect(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=GUARD_S)


def head(length: str) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", length]
    return "\r\n".join([*lines, "", ""]).encode()


def ask(served: Served, **fields: Any) -> socket.socket:
    """A connection that has sent a request, and has read nothing."""
    body = json.dumps({"prompt": "x" * 20, "max_tokens": 30} | fields).encode()
    client = connect(served)
    client.sendall(head(f"Content-Length: {len(body)}") + body)
    return client


def read(client: socket.socket, until: Callable[[bytes], bool] = lambda got: False) -> bytes:
    """What comes, to the end of the connection or until it is enough."""
    got = b""
    with suppress(ConnectionResetError):
        while not until(got) and (more := client.recv(65536)):
            got += more
    client.close()
    return got


def error_of(response: Any) -> dict[str, Any]:
    return response.json()["error"]


def test_every_flag_arrives() -> None:
    assert serve_config(parser().parse_args(["serve"])).limits == Limits()
    flags = [text for name, value in SET.items() for text in (flag(name), str(value))]
    assert serve_config(parser().parse_args(["serve", *flags])).limits == Limits(**SET)
    assert all(getattr(Limits(), name) != value for name, value in SET.items())


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (("--max-n", "0"), "--max-n must be from 1 to 16384, got 0"),
        (("--max-logprobs", "65"), "--max-logprobs must be from 0 to 64, got 65"),
        (("--max-body-bytes", "-1"), "--max-body-bytes must be at least 1"),
        (("--max-queue-len", "0"), "--max-queue-len must be at least 1"),
        (("--request-timeout", "0"), "--request-timeout must be above 0"),
        (("--request-timeout", "nan"), "--request-timeout must be"),
        (("--request-timeout", "inf"), "--request-timeout must be above 0 and finite"),
    ],
)
def test_limits_that_cannot_be_used(flags: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *flags]) == 1
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    "limit, fields, more, param",
    [
        ({"max_n": 2}, {"n": 2}, {"n": 3}, "n"),
        ({"max_stop": 2}, {"stop": ["a", "b"]}, {"stop": ["a", "b", "c"]}, "stop"),
        ({"max_stop": 0}, {"stop": []}, {"stop": "a"}, "stop"),
        ({"max_stop": 2}, {"bad_words": ["a", "b"]}, {"bad_words": ["a", "b", "c"]}, "bad_words"),
        ({"max_stop_len": 3}, {"bad_words": ["äöü"]}, {"bad_words": ["a", "äöüß"]}, "bad_words"),
        ({"max_stop_len": 3}, {"stop": "äöü"}, {"stop": ["a", "äöüß"]}, "stop"),
        ({"max_logprobs": 2}, {"prompt_logprobs": 2}, {"prompt_logprobs": 3}, "prompt_logprobs"),
    ],
)
@pytest.mark.parametrize(
    "path, prompt", [("/v1/completions", {"prompt": "hi"}), ("/v1/chat/completions", {"messages": TALK})]
)
def test_bounds_of_both_endpoints(
    serve: Serve, path: str, prompt: Any, limit: Any, fields: Any, more: Any, param: str
) -> None:
    served = serve(chat_template="plain", **limit)
    assert served.client.post(path, json=prompt | fields).status_code == 200
    response = served.client.post(path, json=prompt | more)
    assert (response.status_code, error_of(response)["param"]) == (400, param)
    assert len(served.engine.requests) == 1


def test_bounds_of_logprobs(serve: Serve) -> None:
    served = serve(chat_template="plain", max_logprobs=2)
    for path, fields in [
        ("/v1/completions", lambda top: {"prompt": "hi", "logprobs": top}),
        ("/v1/chat/completions", lambda top: {"messages": TALK, "logprobs": True, "top_logprobs": top}),
    ]:
        assert served.client.post(path, json=fields(2)).status_code == 200
        response = served.client.post(path, json=fields(3))
        assert (response.status_code, error_of(response)["param"]) == (400, "logprobs")


@pytest.mark.parametrize("n, most", [(1, 6), (2, 3), (4, 1)])
def test_bound_of_choices(serve: Serve, n: int, most: int) -> None:
    served = serve(max_choices=6)
    for prompts in (["a"] * most, [[65]] * most):
        assert len(served.client.post("/v1/completions", json={"prompt": prompts, "n": n}).json()["choices"]) <= 6
        response = served.client.post("/v1/completions", json={"prompt": [*prompts, prompts[0]], "n": n})
        assert (response.status_code, error_of(response)["param"]) == (400, "prompt")
        assert "at most 6" in error_of(response)["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_size_of_a_body(serve: Serve, path: str, chunked: bool) -> None:
    size = random.Random(SEED).randint(100, 200_000)
    served = serve(max_body_bytes=size)
    for length, status in [(size, 400), (size + 1, 413)]:
        body = b" " * length
        content: Any = iter([body[:77], body[77:]]) if chunked else body
        headers = {"content-type": "application/json"}
        response = served.client.post(path, content=content, headers=headers)
        assert response.status_code == status
    assert error_of(response)["code"] == "body_too_long"
    assert str(size) in error_of(response)["message"]
    assert served.client.get("/health").status_code == 200


def test_an_endless_body_is_cut(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_limits, "LINGER_S", 0.05)
    served = serve(max_body_bytes=100_000)
    client, chunk = connect(served), b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    client.sendall(head("Transfer-Encoding: chunked"))
    with pytest.raises(OSError), client:  # whoever reads all of it never comes to an end
        deque(map(client.sendall, repeat(chunk)))
    assert served.client.post("/v1/completions", json={"prompt": "ab"}).json()["choices"][0]["text"] == "AB"


def test_a_body_that_does_not_come(serve: Serve) -> None:
    served = serve(request_timeout=0.1)
    client = connect(served)
    client.sendall(head("Content-Length: 1000") + b"{")
    got = read(client)
    assert got.startswith(b"HTTP/1.1 408 ")
    assert b'"timeout"' in got


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "user": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"prompt": "a", "logit_bias": ' + b'{"a":' * 100_000,
        b'{"prompt": "\xff"}',
        b'{"prompt": "a", "user": "\xc3"}',
        b'{"prompt": "a", "\xf0\x90": 1}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "stop": "\\udfff"}',
        b'{"prompt": "a", "' + b"x" * 1_000_000 + b'": 1}',
        b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "stop": ["' + b"y" * 1_000_000 + b'"]}',
    ],
    ids=lambda body: body[:40].decode(errors="replace"),
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_hostile_bodies(served: Served, path: str, body: bytes) -> None:
    if "chat" in path:
        body = body.replace(b'"prompt": "a"', b'"messages": [{"role": "user", "content": "a"}]')
    response = served.client.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text[:200]
    assert len(response.content) < 10_000
    assert error_of(response)["type"] == "invalid_request_error"
    assert served.client.post("/v1/completions", json={"prompt": "ab"}).json()["choices"][0]["text"] == "AB"


@pytest.mark.parametrize("free", [0, MAX_NUM_SEQS])
@pytest.mark.parametrize("n", [1, 2])
def test_a_full_queue_refuses(serve: Serve, free: int, n: int) -> None:
    engine = FakeEngine(held_after=0, num_waiting=0, num_running=MAX_NUM_SEQS - free)
    served = serve(engine, chat_template="plain", max_queue_len=2)
    waiting: list[socket.socket] = []
    while served.do(lambda: served.state.admission.num_waiting(engine)) < 2:
        before = served.state.admission.unanswered
        waiting.append(ask(served, n=n, stream=len(waiting) % 2 == 0))
        served.wait(lambda: served.state.admission.unanswered == before + n)  # noqa: B023
    assert len(waiting) == (2 + free) // n
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": "ab"}),
        ("/v1/chat/completions", {"messages": TALK}),
    ]
    for path, fields in bodies:
        for stream in (False, True):
            response = served.client.post(path, json=fields | {"stream": stream})
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) > 0
            error = error_of(response)
            assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "queue_full", None)
    assert len(engine.requests) == len(waiting)
    waiting.pop().close()  # a client that leaves makes room
    served.wait(lambda: len(engine.aborted) == 1)
    served.wait(lambda: served.state.admission.unanswered == n * len(waiting))
    served.do(engine.open.set)
    assert served.client.post("/v1/completions", json={"prompt": "ab"}).status_code == 200
    for client in waiting:
        got = read(client, until=lambda got: any(end in got for end in ENDS))
        assert got.startswith(b"HTTP/1.1 200 ")
    served.wait(lambda: served.state.admission.unanswered == 0)


def test_the_engines_own_queue_counts(serve: Serve) -> None:
    served = serve(FakeEngine(num_waiting=2), max_queue_len=2)
    assert served.client.post("/v1/completions", json={"prompt": "ab"}).status_code == 429
    served.engine.num_waiting = 1
    assert served.client.post("/v1/completions", json={"prompt": "ab"}).status_code == 200


def test_requests_that_have_output_do_not_wait(serve: Serve) -> None:
    served = serve(FakeEngine(held_after=HELD, num_waiting=0, num_running=MAX_NUM_SEQS), max_queue_len=1)
    streams = []
    for _ in range(3):
        streams.append(ask(served, stream=True))
        served.wait(lambda: len(served.engine.running) == len(streams) and not served.state.admission.unanswered)
    for client in streams:
        client.close()


@pytest.mark.parametrize(
    "path, fields", [("/v1/completions", {"prompt": "ab" * 9}), ("/v1/chat/completions", {"messages": TALK})]
)
@pytest.mark.parametrize("stream, held", [(False, HELD), (True, 0)])
def test_a_request_that_takes_too_long(serve: Serve, path: str, fields: Any, stream: bool, held: int) -> None:
    served = serve(FakeEngine(held_after=held), chat_template="plain", request_timeout=0.5)
    response = served.client.post(path, json=fields | {"n": 2, "stream": stream})
    assert response.status_code == 504
    error = error_of(response)
    assert (error["type"], error["code"]) == ("server_error", "timeout")
    assert "0.5 s" in error["message"]
    assert served.do(lambda: served.engine.running) == []
    assert len(served.engine.aborted) == 1
    served.engine.held_after = None
    served.state.limits = served.state.admission.limits = Limits()
    assert served.client.post("/v1/completions", json={"prompt": "ab"}).status_code == 200


def test_a_stream_that_takes_too_long_ends_with_an_error(serve: Serve) -> None:
    served = serve(FakeEngine(held_after=HELD), request_timeout=2.0)  # the first tokens must come in time
    response = served.client.post("/v1/completions", json={"prompt": "x" * 20, "max_tokens": 30, "stream": True})
    assert response.status_code == 200
    lines = [line for line in response.text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    error = json.loads(lines[-2].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "timeout")
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-2]) == "X" * HELD
    assert served.do(lambda: served.engine.running) == []
