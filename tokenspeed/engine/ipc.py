"""The socket between the serving process and the engine process: one zmq PAIR over a Unix socket in a private folder.

A socket belongs to the thread that made it.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from tokenspeed.contracts.errors import ConfigError
from tokenspeed.engine.messages import FromEngine, ToEngine

MAX_INBOX = 256
"""Most messages the engine takes in between two steps, so that a flood of requests does not hold up running ones."""
_LONGEST_PATH = 100
"""Unix sockets take about 107 bytes of path."""
_LINGER_MS = 2000
_encoder = msgspec.msgpack.Encoder()


class EngineChannel:
    """The engine's end. Sending blocks while a thousand messages are unread, so a stalled reader stalls the engine
    instead of filling its memory."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.connect(endpoint)
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    def send(self, message: FromEngine) -> None:
        """Queue a message for the serving process."""
        self._socket.send(_encoder.encode(message))

    def receive(self, wait: bool) -> list[ToEngine]:
        """Messages that have come, MAX_INBOX at most; with `wait`, at least one."""
        messages: list[ToEngine] = []
        while len(messages) < MAX_INBOX:
            try:
                raw = self._socket.recv(0 if wait and not messages else zmq.NOBLOCK)
            except zmq.Again:
                break
            messages.append(self._decoder.decode(raw))
        return messages

    def close(self) -> None:
        """Deliver what was sent, for two seconds at most, and close."""
        self._socket.close(_LINGER_MS)
        self._context.term()


class ServingChannel:
    """The serving process's end, on the running event loop. `on_message` is called in order, from the loop."""

    def __init__(self, on_message: Callable[[FromEngine], None]) -> None:
        """Bind. Raises ConfigError where the temporary directory's path is too long for a socket."""
        self._on_message = on_message
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._folder = Path(tempfile.mkdtemp(prefix="tokenspeed-"))
        path = self._folder / "engine"
        if len(str(path)) > _LONGEST_PATH:
            self._folder.rmdir()
            raise ConfigError(f"TMPDIR is too long for a socket: {path} has more than {_LONGEST_PATH} characters")
        self.endpoint = f"ipc://{path}"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)  # Sending never waits; the queue's length is what the server admits.
        self._socket.bind(self.endpoint)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self.drain)

    def send(self, message: ToEngine) -> None:
        """Queue a message for the engine; without one connected, it is dropped."""
        if self._socket.closed:
            return
        try:
            self._socket.send(_encoder.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return
        # The descriptor signals an edge, and sending may have taken it.
        if self._socket.poll(0):
            self._loop.call_soon(self.drain)

    def drain(self) -> None:
        """Hand out every message that has come."""
        while not self._socket.closed:
            try:
                raw = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_message(self._decoder.decode(raw))

    def close(self) -> None:
        """Close the socket and remove its folder."""
        if not self._socket.closed:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close(_LINGER_MS)
            self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)
