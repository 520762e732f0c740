"""Pieces of a response's body written as they come: without a coroutine, which costs more than the write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

Write = Callable[[bytes], bool]
"""Writes a piece of a body at once; False, and nothing written, where it cannot now."""
_EXTENSION = "tokenspeed.write"


class DirectProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which puts a `Write` for each request into its scope."""

    def on_headers_complete(self) -> None:
        """The request's own cycle is known from here on; its application runs later."""
        super().on_headers_complete()
        if self.cycle is not None:
            self.cycle.scope["extensions"] = {_EXTENSION: {"call": _writer(self.cycle)}}


def direct_write(scope: Mapping[str, Any]) -> Write | None:
    """How to write to the response of a request, once it has begun; None on a server that knows no such thing."""
    found: Write | None = scope.get("extensions", {}).get(_EXTENSION, {}).get("call")
    return found


def _writer(cycle: RequestResponseCycle) -> Write:
    flow = cycle.flow

    def write(data: bytes) -> bool:
        # What waits for a slow client is the reader's to merge, not the transport's to pile up.
        if flow.write_paused or cycle.disconnected or cycle.response_complete or not cycle.chunked_encoding:
            return False
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    return write
