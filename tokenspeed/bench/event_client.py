"""Many streams read by one loop that does no more than count: a client light enough for a server on the same cores."""

from __future__ import annotations

import re
import selectors
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from tokenspeed.contracts.errors import ConfigError

_USAGE = re.compile(rb'"completion_tokens":(\d+)')
_READ = 64 << 10


@dataclass
class Stream:
    """One response. Times are perf_counter's; gaps lie between two reads that brought events."""

    socket: socket.socket
    request: bytes
    sent: float = 0.0
    first: float = 0.0
    last: float = 0.0
    events: int = 0
    gaps: list[float] = field(default_factory=list)
    tail: bytes = b""

    @property
    def tokens(self) -> int:
        """Of the usage in its last event. Raises ConfigError for a response that has none."""
        found = _USAGE.findall(self.tail)
        if not found:
            raise ConfigError(f"a stream without usage, it ends with {self.tail[-200:]!r}")
        return int(found[-1])

    def send(self) -> None:
        """Ask."""
        self.sent = perf_counter()
        self.socket.sendall(self.request)

    def read(self) -> bool:
        """Take what is there; whether that was the end."""
        data = self.socket.recv(_READ)
        now = perf_counter()
        events = data.count(b"data: ")
        if events:
            if self.events == 0:
                self.first = now
            else:
                self.gaps.append(now - self.last)
            self.last = now
            self.events += events
        self.tail = (self.tail + data)[-1024:]
        return not data or self.tail.endswith(b"\r\n0\r\n\r\n")


def read_all(port: int, requests: Sequence[bytes]) -> list[Stream]:
    """Send all requests to this machine's `port`, each on a connection of its own, and read every response to its
    end."""
    streams = [Stream(socket.create_connection(("127.0.0.1", port)), request) for request in requests]
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(stream.socket, selectors.EVENT_READ, stream)
            stream.send()
        while selector.get_map():
            for key, _ in selector.select():
                if key.data.read():
                    selector.unregister(key.fileobj)
                    key.data.socket.close()
    return streams
