"""For tests of faults: raw connections, and the proof that a fault has left nothing behind."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tests.server.server_process import GUARD_S, ServerProcess

JSON = "Content-Type: application/json"


def until(true: Callable[[], object], what: str = "it never happened") -> None:
    """Wait for something to become true."""
    end = time.monotonic() + GUARD_S
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def connect(url: str, receive_buffer: int | None = None) -> socket.socket:
    """A connection to a server. receive_buffer: bytes that the system takes in before the test reads."""
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(GUARD_S)
    client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
    return client


def head(path: str, *headers: str, method: str = "POST") -> bytes:
    """First line and headers."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


def completion(path: str = "/v1/completions", **fields: Any) -> bytes:
    """A whole request; by default of some tokens with their ids."""
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 4, "return_token_ids": True} | fields).encode()
    return head(path, JSON, f"Content-Length: {len(body)}") + body


def read(client: socket.socket, until: Callable[[bytearray], bool] = lambda got: False) -> bytes:
    """What comes, to the end of the connection or until it is enough."""
    got = bytearray()
    with suppress(ConnectionError):
        while not until(got) and (more := client.recv(65536)):
            got += more
    return bytes(got)


def done(got: bytes | bytearray) -> bool:
    """Whether a stream has ended as it should."""
    return got.endswith(b"0\r\n\r\n")


def events(got: bytes) -> list[Any]:
    """Of a stream, its [DONE] left out."""
    return [json.loads(line[6:]) for line in got.split(b"\n") if line.startswith(b"data: {")]


def tokens_of(got: list[Any], index: int = 0) -> list[int]:
    """Ids of a choice, from the events or the body of a completion."""
    choices = [choice for event in got for choice in event.get("choices", []) if choice["index"] == index]
    return [token for choice in choices for token in choice["token_ids"]]


def resident_mb(pid: int) -> float:
    """Memory of a process, in 1e6 bytes."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Proof:
    """Taken before a fault; `check` holds what is there afterwards against it."""

    def __init__(self, server: ServerProcess, **fields: Any) -> None:
        self._server = server
        self._fields = {"prompt": [5, 4, 3, 2], "max_tokens": 12, "ignore_eos": True, "return_token_ids": True} | fields
        self._answers = self._ask()
        self._files = self._num_files()
        self.resident_mb = resident_mb(server.process.pid)

    def check(self) -> None:
        """Nothing runs, waits, holds pages or a file, and the next requests get what they got before."""
        until(lambda: self._server.get("/health").json() == {"status": "ok", "reason": "idle"}, "not idle")
        until(lambda: not any(self._busy()), f"left behind: {self._busy()}")
        until(lambda: self._server.post("/admin/reset_prefix_cache").status_code == 200, "requests are left")
        until(lambda: self._stats().get("pages_cached", 0) == 0, "prefixes are left")
        until(lambda: self._num_files() <= self._files, f"more than {self._files} files are open")
        assert self._ask() == self._answers

    def _ask(self) -> list[list[int]]:
        bodies = [
            self._server.post("/v1/completions", **self._fields | settings).json()
            for settings in ({"temperature": 0}, {"seed": 11, "temperature": 1.0})
        ]
        return [tokens_of([body]) for body in bodies]

    def _busy(self) -> list[float]:
        stats = self._stats()
        return [stats.get(name, 0) for name in ("running", "num_running", "num_waiting", "pages_held")]

    def _stats(self) -> dict[str, float]:
        return self._server.get("/admin/state").json()["stats"]

    def _num_files(self) -> int:
        return len(os.listdir(f"/proc/{self._server.process.pid}/fd"))
