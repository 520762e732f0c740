"""A server of known timing: `python -m tokenspeed.bench.timed_server FIRST_MS GAP_MS` prints its address.

It answers `max_tokens` tokens, the first one FIRST_MS after the request was read, the others GAP_MS apart, and notes
what it really did: `GET /did` gives, for each request since the last such question, when it was read and when each
event was handed to the system. A thread per connection.
"""

from __future__ import annotations

import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

_EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Did(msgspec.Struct):
    """A request that was answered, in seconds of one clock. read: its last byte was there. events: each event with a
    token was handed over."""

    read: float
    events: list[float]

    @property
    def ttft(self) -> float:
        """From reading it to its first token."""
        return self.events[0] - self.read

    @property
    def tpot(self) -> float:
        """Between tokens, in the mean."""
        return (self.events[-1] - self.events[0]) / (len(self.events) - 1)


class TimedServer(socketserver.ThreadingTCPServer):
    """first_s, gap_s: of every answer."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, first_s: float, gap_s: float) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.first_s, self.gap_s = first_s, gap_s
        self.did: list[Did] = []

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Connection(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True
    server: TimedServer

    def handle(self) -> None:
        while self._answer():
            pass

    def _answer(self) -> bool:
        line, length = self.rfile.readline().decode(), 0
        while (header := self.rfile.readline().strip().lower()) != b"":
            if header.startswith(b"content-length:"):
                length = int(header.split(b":")[1])
        if not line:
            return False
        body = self.rfile.read(length)
        read = time.monotonic()
        path = line.split()[1]
        if length:
            self._stream(path, msgspec.json.decode(body), read)
        elif path.endswith("/did"):
            did, self.server.did = self.server.did, []
            self._json(did)
        else:
            self._json({"object": "list", "data": [{"id": "timed", "object": "model"}]})
        return True

    def _json(self, value: Any) -> None:
        body = msgspec.json.encode(value)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self.wfile.write(head % len(body) + body)

    def _stream(self, path: str, body: Any, read: float) -> None:
        is_chat, tokens, events = "chat" in path, _max_tokens(body), list[float]()
        word = {"index": 0, "delta": {"content": " word"}} if is_chat else {"index": 0, "text": " word"}
        token = {"id": "x", "model": "timed", "created": 0, "choices": [{**word, "finish_reason": None}]}
        usage = {"prompt_tokens": _prompt_tokens(body), "completion_tokens": tokens}
        usage["total_tokens"] = sum(usage.values())
        event = _chunk(msgspec.json.encode(token))
        last = msgspec.json.encode({"id": "x", "model": "timed", "created": 0, "choices": [], "usage": usage})
        self.wfile.write(_EVENTS)
        for number in range(tokens):
            _wait_until(read + self.server.first_s + number * self.server.gap_s)
            events.append(time.monotonic())
            self.wfile.write(event)
        # Before the end is sent: who has read it may ask at once.
        self.server.did.append(Did(read, events))
        self.wfile.write(_chunk(last) + _chunk(b"[DONE]") + b"0\r\n\r\n")


def _max_tokens(body: dict[str, Any]) -> int:
    """Of a request, by either name that it has."""
    return int(body.get("max_tokens") or body.get("max_completion_tokens") or 16)


def _prompt_tokens(body: dict[str, Any]) -> int:
    """Of a request: ids, or words of a text."""
    prompt = body.get("prompt") or " ".join(str(each["content"]) for each in body["messages"])
    return len(prompt.split()) if isinstance(prompt, str) else len(prompt)


def _wait_until(due: float) -> None:
    """By time.monotonic."""
    left = due - time.monotonic()
    if left > 0:
        time.sleep(left)


def _chunk(data: bytes) -> bytes:
    event = b"data: " + data + b"\n\n"
    return b"%x\r\n" % len(event) + event + b"\r\n"


@contextmanager
def timed_server(first_ms: float, gap_ms: float) -> Iterator[str]:
    """One as a process of its own; gives its address."""
    command = [sys.executable, "-m", "tokenspeed.bench.timed_server", str(first_ms), str(gap_ms)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate()


if __name__ == "__main__":
    with TimedServer(*(float(each) / 1e3 for each in sys.argv[1:3])) as server:
        print(server.url, flush=True)
        threading.excepthook = lambda _: None  # a client that hangs up ends its thread
        server.serve_forever()
