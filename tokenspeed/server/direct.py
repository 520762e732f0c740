"""Pieces of a response's body written as they come: without a coroutine, which costs more than the write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

Write = Callable[[bytes], bool]
"""Writes a piece of a body at once; False, and nothing written, where it cannot now."""
_EXTENSION = "tokenspeed.write"


def offer_direct_write(cycle: RequestResponseCycle) -> None:
    """Put a `Write` for the response of a request into its scope."""
    flow = cycle.flow

    def write(data: bytes) -> bool:
        # What waits for a slow client is the reader's to merge, not the transport's to pile up.
        if flow.write_paused or cycle.disconnected or cycle.response_complete or not cycle.chunked_encoding:
            return False
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    cycle.scope["extensions"] = {_EXTENSION: {"call": write}}


def direct_write(scope: Mapping[str, Any]) -> Write | None:
    """How to write to the response of a request, once it has begun; None on a server that knows no such thing."""
    found: Write | None = scope.get("extensions", {}).get(_EXTENSION, {}).get("call")
    return found
