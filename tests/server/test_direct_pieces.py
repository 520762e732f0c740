"""Pieces written past the transport: all of them, whole and in order, whatever takes them."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.seeds import SEED
from tests.server.conftest import Serve
from tests.server.fault_tools import completion, connect, done, read
from tests.server.test_api_keys import make_certificate
from tokenspeed.server.access import Access, Tls
from tokenspeed.server.direct import WriteText, direct_writer, offer_direct_writer

BEFORE, AFTER = b'data: {"text":', b"}\n\n"
NAME = "n" * 200_000
"""Is in every event: all of them are more than the system keeps for a connection."""
TOKENS = 90


class Transport:
    """One whose connection is a socket pair; it keeps what it is given."""

    def __init__(self, encrypts: bool) -> None:
        self._info: dict[str, Any] = {"sslcontext": "one" if encrypts else None}
        self.socket, self.client = socket.socketpair()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self._info["socket"] = self.socket
        self.kept, self.closing = bytearray(), False

    def get_extra_info(self, name: str) -> Any:
        return self._info[name]

    def get_write_buffer_size(self) -> int:
        return len(self.kept)

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes) -> None:
        self.kept += data

    def close(self) -> None:
        self.socket.close()
        self.client.close()


@pytest.fixture
def plain() -> Iterator[Transport]:
    transport = Transport(encrypts=False)
    yield transport
    transport.close()


def writer_of(transport: Transport, paused: bool = False) -> WriteText:
    flow = SimpleNamespace(write_paused=paused)
    cycle: Any = SimpleNamespace(transport=transport, flow=flow, chunked_encoding=True, scope={})
    offer_direct_writer(cycle)
    writer = direct_writer(cycle.scope)
    assert writer is not None
    return writer(BEFORE, AFTER)


def texts_of(stream: bytes) -> list[str]:
    """Of the chunks, each of which has to be one event."""
    found = []
    while stream:
        size, _, rest = stream.partition(b"\r\n")
        piece, end, stream = rest[: int(size, 16)], rest[int(size, 16) :][:2], rest[int(size, 16) + 2 :]
        assert (piece[: len(BEFORE)], piece[-len(AFTER) :], end) == (BEFORE, AFTER, b"\r\n")
        found.append(msgspec.json.decode(piece[len(BEFORE) : -len(AFTER)], type=str))
    return found


@pytest.mark.parametrize("seed", [SEED, SEED + 1, SEED + 2])
def test_a_reader_that_is_slow_at_times(plain: Transport, seed: int) -> None:
    rng, write, got = random.Random(seed), writer_of(plain), bytearray()
    texts = ["".join(rng.choices('aü🦜"\\\n', k=rng.choice((0, 1, 5, 3000)))) for _ in range(200)]
    waited = passed = 0
    for text in texts:
        before = len(plain.kept)
        assert write(text)
        waited += len(plain.kept) > before
        passed += len(plain.kept) == 0
        if rng.random() < 0.3:
            got += read_all(plain)
    got += read_all(plain)
    assert texts_of(bytes(got)) == texts
    assert min(waited, passed) > 0


def read_all(transport: Transport) -> bytes:
    """What came, and what waited."""
    transport.client.setblocking(False)
    got = bytearray()
    try:
        while True:
            got += transport.client.recv(1 << 20)
    except BlockingIOError:
        transport.client.setblocking(True)
    got += transport.kept
    transport.kept.clear()
    return bytes(got)


def test_an_encrypted_connection_is_the_transports() -> None:
    transport = Transport(encrypts=True)
    assert writer_of(transport)("secret")
    assert texts_of(bytes(transport.kept)) == ["secret"]
    transport.close()


def test_a_client_that_left_is_the_transports_to_notice(plain: Transport) -> None:
    plain.client.close()
    assert writer_of(plain)("to nobody")
    assert texts_of(bytes(plain.kept)) == ["to nobody"]


def test_nothing_is_written_to_a_connection_that_closes(plain: Transport) -> None:
    write, plain.closing = writer_of(plain), True
    assert not write("late")
    assert read_all(plain) == b""


def test_nothing_more_piles_up(plain: Transport) -> None:
    write, plain.kept = writer_of(plain, paused=True), bytearray(b"much")
    assert not write("more")
    assert read_all(plain) == b"much"


def test_all_text_comes_to_a_reader_that_begins_late(serve: Serve) -> None:
    served = serve(names=(NAME,))
    prompt = list(b"abc" * (TOKENS // 3))
    asked = completion(prompt=prompt, max_tokens=TOKENS, stream=True, return_token_ids=False)
    with closing(connect(served.url, 4096)) as client:
        client.sendall(asked)
        served.wait(lambda: served.engine.requests and not served.engine.running)
        events = events_of(unchunked(read(client, done)))
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == "ABC" * (TOKENS // 3)
    assert len(events) < TOKENS


def test_over_tls(serve: Serve, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    served = serve(access=Access(tls=Tls(str(certificate), str(key))))
    asked = {"prompt": list(b"abc" * (TOKENS // 3)), "max_tokens": TOKENS, "stream": True}
    events = events_of(served.client.post("/v1/completions", json=asked).content)
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == "ABC" * (TOKENS // 3)


def unchunked(response: bytes) -> bytes:
    body, rest = bytearray(), response.partition(b"\r\n\r\n")[2]
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return bytes(body)


def events_of(body: bytes) -> list[Any]:
    """[DONE] left out."""
    return [msgspec.json.decode(line[6:]) for line in body.splitlines() if line.startswith(b"data: {")]
