"""What is hardly HTTP: requests that never end, come one behind the other, or are none."""

from __future__ import annotations

import itertools
import json
import random
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import pytest

from tests.seeds import SEED
from tests.server.conftest import Serve, Served
from tests.server.fake_engine import FakeEngine
from tests.server.fault_tools import JSON, Proof, completion, connect, done, events, head, read, resident_mb, tokens_of
from tests.server.server_process import GUARD_S, ServerProcess, started
from tokenspeed.server import connection, limits
from tokenspeed.server.run import listen

MAX_BODY = 1_000_000
ENDLESS_MB = 4000
"""Sent by what is to be cut; far more than its limit and all buffers."""
HELD = 4


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    flags = ["--max-body-bytes", str(MAX_BODY), "--request-timeout", "3"]
    with started("tests.server.serve_fake", ["ok", "0.001", "HEAD_S=2", "MAX_HEAD_BYTES=100000", *flags]) as made:
        made.wait_until_ready()
        yield made
        assert made.terminate() == 0, made.log


@pytest.fixture
def proven(server: ServerProcess) -> Iterator[ServerProcess]:
    """The server; afterwards nothing may be left of what the test did, nor in memory."""
    proof = Proof(server)
    yield server
    proof.check()
    assert resident_mb(server.process.pid) < proof.resident_mb + 40


@contextmanager
def open_connection(server: ServerProcess | Served) -> Iterator[socket.socket]:
    with closing(connect(server.url)) as client:
        yield client


def error_of(got: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of an answer."""
    top, _, body = got.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(body)["error"]


def pour(client: socket.socket, part: bytes) -> int:
    """Send it until the connection ends, or ENDLESS_MB; how many bytes went."""
    sent = 0
    try:
        while sent < ENDLESS_MB * 1e6:
            client.sendall(part)
            sent += len(part)
    except OSError:
        pass
    return sent


CHUNKED = head("/v1/completions", JSON, "Transfer-Encoding: chunked")
ENDLESS = {
    "body": (CHUNKED, b"10000\r\n" + b"x" * 0x10000 + b"\r\n"),
    "tiny chunks": (CHUNKED, b"1\r\nx\r\n" * 10_000),
    "chunk extension": (CHUNKED + b"1;", b"x" * 65536),
    "trailers": (CHUNKED + b"0\r\n", b"a: b\r\n" * 10_000),
    "trailer": (CHUNKED + b"0\r\na: ", b"x" * 65536),
    "headers": (b"GET /health HTTP/1.1\r\n", b"a: b\r\n" * 10_000),
    "header": (b"GET /health HTTP/1.1\r\na: ", b"x" * 65536),
    "header name": (b"GET /health HTTP/1.1\r\n", b"x" * 65536),
    "path": (b"GET /", b"x" * 65536),
    "blank lines": (b"", b"\r\n" * 30_000),
    "method": (b"", b"G" * 65536),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_never_ends_is_cut(proven: ServerProcess, kind: str) -> None:
    before, part = ENDLESS[kind]
    with open_connection(proven) as client:
        client.sendall(before)
        assert pour(client, part) < ENDLESS_MB * 1e6
        got = read(client)
    assert not got or got.startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 431 ", b"HTTP/1.1 400 ")), got[:100]


ROUTES = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/admin/sleep")
SLOW_BODIES = {
    f"{path} {headers}": (head(path, JSON, headers), drop)
    for path in ROUTES
    for headers, drop in (("Transfer-Encoding: chunked", b"1\r\n \r\n"), ("Content-Length: 9999", b" "))
}
SLOW_HEADS = {
    "a letter": (b"P", b""),
    "headers": (b"POST /v1/completions HTTP/1.1\r\n", b"x-more: y\r\n"),
    "a header": (b"POST /v1/completions HTTP/1.1\r\nx: ", b"y"),
    "path": (b"GET /", b"a"),
}
SECOND = {"second": (completion(), b"GET /health HTTP/1.1\r\nx: y")}
"""The headers of a connection's second request."""
SILENT = {"nothing": (b"", b""), "blank lines": (b"\r\n", b"\r\n")}


def drip(url: str, sent: dict[str, tuple[bytes, bytes]]) -> dict[str, bytes]:
    """Begin with the first, add the second again and again, until the connection ends; what came, by name."""
    clients = {name: connect(url) for name in sent}
    for name, client in clients.items():
        client.sendall(sent[name][0])
        client.settimeout(0.002)
    got = dict.fromkeys(sent, b"")
    end = time.monotonic() + GUARD_S
    while clients:
        assert time.monotonic() < end, f"never cut: {list(clients)}"
        for name, client in list(clients.items()):
            try:
                more = client.recv(65536)
            except TimeoutError:
                with suppress(ConnectionError):
                    client.sendall(sent[name][1])
                continue
            except ConnectionError:
                more = b""
            got[name] += more
            if not more:
                clients.pop(name).close()
    return got


def test_what_comes_in_drops_is_cut(proven: ServerProcess) -> None:
    """And a connection that rests between two requests, for as long as all of this takes, is not."""
    with open_connection(proven) as rests:
        rests.sendall(completion())
        assert read(rests, lambda got: b"fallback_ops" in got).startswith(b"HTTP/1.1 200 ")
        found = drip(proven.url, SLOW_BODIES | SLOW_HEADS | SECOND | SILENT)
        rests.sendall(completion())
        assert read(rests, lambda got: b"fallback_ops" in got).startswith(b"HTTP/1.1 200 ")
    for name in SLOW_BODIES:
        status, error = error_of(found[name])
        assert (status, error["code"]) == (408, "timeout"), name
        assert "body" in error["message"]
    for name in SLOW_HEADS:
        status, error = error_of(found[name])
        assert (status, error["type"]) == (408, "invalid_request_error"), name
        assert "headers" in error["message"]
    first, second = found["second"].split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200 ")
    assert second.startswith(b"408 ")
    for name in SILENT:
        assert found[name] == b"", name


BODIES = {
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "half a character": b'{"prompt": "a", "user": "\xe2\x82"}',
    "deep": b'{"prompt": ' + b"[" * 400_000,
    "deep and whole": b'{"prompt": [1], "metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    "huge number": b'{"prompt": [1], "seed": ' + b"9" * 500_000 + b"}",
    "huge list": b'{"prompt": [' + b"1," * 400_000 + b"1]}",
    "many fields": b"{" + b",".join(b'"a%d": 1' % number for number in range(50_000)) + b"}",
    "nothing": b"",
    "no JSON": b"\x00" * 1000,
}


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_bodies_that_are_no_request(proven: ServerProcess, path: str, kind: str) -> None:
    body = BODIES[kind] if "chat" not in path else BODIES[kind].replace(b'"prompt"', b'"messages"')
    with open_connection(proven) as client:
        client.sendall(head(path, JSON, f"Content-Length: {len(body)}") + body)
        status, error = error_of(read(client, lambda got: b'"error"' in got))
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert len(error["message"]) <= 2000


@pytest.mark.parametrize("seed", [SEED + number for number in range(5)])
def test_garbage(proven: ServerProcess, seed: int) -> None:
    """TLS to a port without it, or another protocol: no first byte of a method."""
    noise = random.Random(seed)
    with open_connection(proven) as client:
        client.sendall(bytes([noise.randrange(128, 256)]) + noise.randbytes(noise.randrange(2000)))
        status, error = error_of(read(client))
    assert (status, error["type"]) == (400, "invalid_request_error")


def test_requests_in_one_go_are_answered_in_order(proven: ServerProcess) -> None:
    count = 5
    with open_connection(proven) as client:
        for _ in range(2):
            client.sendall(b"".join(completion(prompt=[number, 7]) for number in range(1, count + 1)))
            got = read(client, lambda got: got.count(b"fallback_ops") == count)
            answers = [json.loads(part[: part.rindex(b"}") + 1]) for part in got.split(b"\r\n\r\n")[1:]]
            assert [tokens_of([answer]) for answer in answers] == [
                [number, 7, number, 7] for number in range(1, count + 1)
            ]


def test_more_requests_in_one_go_than_may_wait(proven: ServerProcess) -> None:
    with open_connection(proven) as client:
        client.sendall(completion() * 200)
        got = read(client)
    assert got.count(b"HTTP/1.1 200 ") == got.count(b"fallback_ops") == connection.MAX_PIPELINED + 1
    assert b"HTTP/1.1 4" not in got


def test_garbage_behind_a_request_does_not_get_into_its_answer(proven: ServerProcess) -> None:
    for noise in (b"\x80\x81\r\n", b"GET / HTTP/9.9\r\n\r\n", b"x" * 10):
        with open_connection(proven) as client:
            client.sendall(completion(stream=True, max_tokens=100) + noise)
            got = read(client)
        assert done(got), got[-100:]
        assert len(tokens_of(events(got))) == 100
        assert got.count(b"HTTP/1.1") == 1


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"


@pytest.mark.parametrize("name", [b"Upgrade", b"upgrade", b"UPGRADE"])
@pytest.mark.parametrize("parts", [1, 2])
def test_an_offer_of_another_protocol_is_passed_over(proven: ServerProcess, name: bytes, parts: int) -> None:
    """As Java's HTTP client makes it with every request."""
    asked = completion(prompt=[5, 9]).replace(b"\r\n", b"\r\n" + OFFER.replace(b"Upgrade:", name + b":"), 1)
    middle = asked.index(b"\r\n\r\n") + 4
    with open_connection(proven) as client:
        for _ in range(2):
            for part in [asked] if parts == 1 else [asked[:middle], asked[middle:]]:
                client.sendall(part)
                time.sleep(0.05 * (parts - 1))
            got = read(client, lambda got: b"fallback_ops" in got and got.endswith(b"}}"))
            assert tokens_of([json.loads(got.partition(b"\r\n\r\n")[2])]) == [5, 9, 5, 9]


def test_a_body_is_never_taken_for_the_next_request(proven: ServerProcess) -> None:
    inner = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    top = head("/v1/completions", JSON, f"Content-Length: {len(inner)}").replace(b"\r\n", b"\r\n" + OFFER, 1)
    for cut in (top.index(b"Upgrade: ") + 3, top.index(b"Upgrade: "), len(top)):
        with open_connection(proven) as client:
            with suppress(OSError):  # refused
                for part in (top[:cut], top[cut:], inner):
                    client.sendall(part)
                    time.sleep(0.05)
            got = read(client, lambda got: b'"error"' in got and got.endswith(b"}}"))
            with suppress(OSError):
                client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                got += read(client)
        assert got.startswith(b"HTTP/1.1 400 ")
        assert got.count(b"HTTP/1.1") == 1 + (b'"status"' in got)
        assert b'"version"' not in got


def test_who_leaves_with_a_request_behind_the_one_under_way(serve: Serve) -> None:
    """Both go: the one under way must hear of it though the other came last."""
    served = serve(FakeEngine(held_after=HELD))
    for stream, at_once in itertools.product((True, False), repeat=2):
        with open_connection(served) as client:
            asked = completion(prompt="x" * 20, max_tokens=30, stream=stream, return_token_ids=False)
            client.sendall(asked * (1 + at_once))
            served.wait(lambda: len(served.engine.running) == 1)
            if not at_once:
                client.sendall(asked)
        served.wait(lambda: served.engine.running == [])
    assert len(served.engine.requests) == 4


def test_the_bound_of_a_body_without_a_request_timeout(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_S", 0.1)
    for settings in ({}, {"request_timeout": 300.0}):
        served = serve(**settings)
        with open_connection(served) as client:
            client.sendall(head("/v1/completions", JSON, "Content-Length: 9") + b"{")
            status, error = error_of(read(client))
        assert (status, error["message"]) == (408, "the body did not come within 0.1 s")


def test_clients_that_vanish_are_noticed_by_the_system() -> None:
    with closing(listen("127.0.0.1", 0)) as listening:
        listening.setblocking(True)
        with closing(connect(f"http://127.0.0.1:{listening.getsockname()[1]}")):
            accepted, _ = listening.accept()
            with closing(accepted):
                assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 240_000
