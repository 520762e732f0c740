"""The socket between the serving process and the engine process: a Unix socket pair, of which the engine inherits an
end.

Each message is its length (4 bytes, little-endian) and msgpack. Nothing but a read stands between a message and its
reader: a queue with threads of its own costs a wake-up more on either side of every step.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from tokenspeed.engine.messages import FromEngine, Stop, ToEngine

MAX_INBOX = 256
"""Most messages the engine takes in between two steps, so that a flood of requests does not hold up running ones."""
MAX_UNREAD = 16 << 20
"""Bytes that the engine keeps for a serving process that does not read; beyond them it waits."""
_READ = 256 << 10
_KERNEL_BUFFER = 1 << 20
_HEADER = 4
_length_at = struct.Struct("<I").unpack_from
_CLOSE_S = 2.0
_encoder = msgspec.msgpack.Encoder()
Message = TypeVar("Message")


class EngineChannel:
    """The engine's end."""

    def __init__(self, fd: int) -> None:
        """fd: of the end that the process inherited; it is this channel's from now on."""
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self._socket.set_inheritable(False)  # or what the engine starts would hold the connection open after its end
        self._frames = _Frames(msgspec.msgpack.Decoder(ToEngine))
        self._unsent = _Unsent(self._socket)
        self._inbox: deque[ToEngine] = deque()
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def send(self, message: FromEngine) -> None:
        """Send a message, or keep it for a serving process that is slow to read; waits beyond MAX_UNREAD bytes, so a
        stalled reader stalls the engine instead of filling its memory."""
        self._unsent.send(message)
        while len(self._unsent) > MAX_UNREAD:
            self._unsent.wait()

    def receive(self, wait: bool) -> list[ToEngine]:
        """Messages that have come, MAX_INBOX at most; with `wait`, at least one. Stop where nobody is at the other
        end."""
        inbox = self._inbox
        if len(inbox) < MAX_INBOX:
            self._read()
        while wait and not inbox:
            self._wait()
            self._read()
        return [inbox.popleft() for _ in range(min(len(inbox), MAX_INBOX))]

    def close(self) -> None:
        """Deliver what was sent, as long as some of it goes within two seconds, and close."""
        while self._unsent and self._unsent.wait(_CLOSE_S):
            pass
        self._socket.close()

    def _read(self) -> None:
        self._unsent.flush()
        try:
            self._inbox += self._frames.read(self._socket)
        except BlockingIOError:
            pass
        except (EOFError, ConnectionError):
            self._inbox.append(Stop())

    def _wait(self) -> None:
        self._poll.modify(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        self._poll.poll()


class ServingChannel:
    """The serving process's end, on the running event loop. `on_message` is called in order, from the loop."""

    def __init__(self, on_message: Callable[[FromEngine], None]) -> None:
        self._on_message = on_message
        self._socket, self.engine_end = socket.socketpair()
        """engine_end: what the engine process is to inherit; closed by `connected`."""
        self._socket.setblocking(False)
        for end in (self._socket, self.engine_end):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _KERNEL_BUFFER)
        self._frames = _Frames(msgspec.msgpack.Decoder(FromEngine))
        self._unsent = _Unsent(self._socket)
        self._writing = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._read)

    def connected(self) -> None:
        """The engine process has its end: with this process's copy closed, the end of the engine is the end of the
        stream."""
        self.engine_end.close()

    def send(self, message: ToEngine) -> None:
        """Send a message, or keep it until the engine reads; without one any more, it is dropped."""
        if self._socket.fileno() < 0:
            return
        self._unsent.send(message)
        if self._unsent and not self._writing:
            self._writing = True
            self._loop.add_writer(self._socket, self._flush)

    def drain(self) -> None:
        """Hand out every message that has come."""
        while self._socket.fileno() >= 0 and self._read():
            pass

    def close(self) -> None:
        """Close both ends. May be called again."""
        self._leave()
        self.engine_end.close()

    def _read(self) -> bool:
        """Hand out what one read gives; whether there may be more."""
        try:
            messages = self._frames.read(self._socket)
        except BlockingIOError:
            return False
        except (EOFError, ConnectionError):
            self._leave()
            return False
        for message in messages:
            self._on_message(message)
        return True

    def _flush(self) -> None:
        self._unsent.flush()
        if not self._unsent:
            self._writing = False
            self._loop.remove_writer(self._socket)

    def _leave(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()


class _Frames(Generic[Message]):
    """Cuts what is read into messages."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[Message]) -> None:
        self._decode = decoder.decode
        self._chunk = memoryview(bytearray(_READ))
        self._kept = bytearray()

    def read(self, source: socket.socket) -> list[Message]:
        """Messages completed by one read. Raises BlockingIOError where there is nothing, EOFError at the end."""
        data = self._chunk
        count = source.recv_into(data)
        if count == 0:
            raise EOFError
        if self._kept:
            self._kept += data[:count]
            count = len(self._kept)
            if count < _HEADER or count < _HEADER + _length_at(self._kept)[0]:
                return []
            data, self._kept = memoryview(self._kept), bytearray()
        messages: list[Message] = []
        at = 0
        while count - at >= _HEADER and (end := at + _HEADER + _length_at(data, at)[0]) <= count:
            messages.append(self._decode(data[at + _HEADER : end]))
            at = end
        if at < count:
            self._kept += data[at:count]
        return messages


class _Unsent:
    """Bytes on their way to a socket that does not block."""

    def __init__(self, target: socket.socket) -> None:
        self._target = target
        self._left = bytearray()
        self._frame = bytearray()
        self._poll = select.poll()
        self._poll.register(target, select.POLLOUT)

    def __len__(self) -> int:
        return len(self._left)

    def send(self, message: Any) -> None:
        """Send what fits of it, after what is left of others; with nobody at the other end, nothing."""
        frame = self._frame
        _encoder.encode_into(message, frame, _HEADER)
        frame[:_HEADER] = (len(frame) - _HEADER).to_bytes(_HEADER, "little")
        if self._left:
            self._left += frame
            self.flush()
        else:
            sent = self._write(frame)
            if sent < len(frame):
                self._left += frame[sent:]

    def flush(self) -> None:
        """Send what fits of what is left."""
        if self._left:
            del self._left[: self._write(self._left)]

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until some of it has been sent; whether that was within `timeout` seconds."""
        before = len(self._left)
        self._poll.poll(None if timeout is None else timeout * 1e3)
        self.flush()
        return len(self._left) < before

    def _write(self, data: bytearray) -> int:
        try:
            return self._target.send(data)
        except BlockingIOError:
            return 0
        except OSError:  # who is to read it is gone, which the end of its process tells
            return len(data)
