"""Pieces of a response's body written as they come: without a coroutine, which costs more than the write."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

WriteText = Callable[[str], bool]
"""Writes a piece of a body that is made of a text, at once; False, and nothing written, where it cannot now."""
TextWriter = Callable[[bytes, bytes], WriteText]
"""(before, after): what stands around the text, which is written as JSON. For a response whose first piece is sent."""
_EXTENSION = "tokenspeed.write"
_encode = msgspec.json.encode


class _Pieces:
    """Pieces of one response, each written past the transport while that has nothing else to write."""

    __slots__ = ("_after", "_before", "_fd", "_flow", "_length", "_transport")

    def __init__(self, cycle: RequestResponseCycle, before: bytes, after: bytes) -> None:
        self._before, self._after = before, after + b"\r\n"
        self._length = len(before) + len(after)
        self._transport, self._flow = cycle.transport, cycle.flow
        encrypts = cycle.transport.get_extra_info("sslcontext") is not None
        self._fd = -1 if encrypts else cycle.transport.get_extra_info("socket").fileno()

    def write(self, text: str) -> bool:
        """Implements `WriteText`."""
        shown, transport = _encode(text), self._transport
        piece = b"%x\r\n%b%b%b" % (self._length + len(shown), self._before, shown, self._after)
        if transport.is_closing():  # its descriptor may be another connection's by now
            return False
        if self._fd < 0 or transport.get_write_buffer_size():
            return self._queue(piece)
        try:
            sent = os.write(self._fd, piece)
        except OSError:  # full, or closed by the client, which is the transport's to deal with
            sent = 0
        if sent < len(piece):
            transport.write(piece[sent:])
        return True

    def _queue(self, piece: bytes) -> bool:
        # What waits for a slow client is the reader's to merge, not the transport's to pile up.
        if self._flow.write_paused:
            return False
        self._transport.write(piece)
        return True


def offer_direct_writer(cycle: RequestResponseCycle) -> None:
    """Put a `TextWriter` for the response of a request into its scope."""

    def writer(before: bytes, after: bytes) -> WriteText:
        assert cycle.chunked_encoding
        return _Pieces(cycle, before, after).write

    cycle.scope["extensions"] = {_EXTENSION: {"call": writer}}


def direct_writer(scope: Mapping[str, Any]) -> TextWriter | None:
    """How to write to the response of a request, once it has begun; None on a server that knows no such thing."""
    found: TextWriter | None = scope.get("extensions", {}).get(_EXTENSION, {}).get("call")
    return found
