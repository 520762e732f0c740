"""A client's connection: uvicorn's, with bounds on what a client may hold open, leave unread or send without end."""

from __future__ import annotations

import asyncio
import http
import logging
import re
import socket
import sys
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from tokenspeed.server.direct import offer_direct_writer
from tokenspeed.server.errors import ApiError, encode_error

logger = logging.getLogger("tokenspeed.server")
HEAD_S = 60.0
"""How long a connection may take to bring the first line and the headers of a request, from its first byte on; the
first request of a connection, from the connection on."""
MAX_HEAD_BYTES = 256 * 1024
"""What is neither a whole request nor a part of its body: line, headers, trailers, blank lines."""
STALLED_S = 120.0
"""How long a client may take nothing of what waits for it."""
MAX_PIPELINED = 32
"""Requests that may wait behind the one under way; a connection that brings more ends with their answers."""
_UPGRADE = re.compile(rb"(?<=\n)upgrade(?=:)", re.IGNORECASE)
_NO_UPGRADE = b"ignored"
_SILENT_S, _PROBE_S, _PROBES = 60, 15, 4
"""A connection without traffic is probed after this long, so often; then its client is gone."""


class Connection(HttpToolsProtocol):
    """One connection and its requests, one after the other.

    Differs from its base in this: a client that is slow to ask, never ends its headers or takes nothing is cut; one
    that leaves is noticed by all its requests, also while another one waits behind them; what is not HTTP does not get
    into the answer to what was; and an offer of another protocol (Java's clients make one with every request) costs a
    request nothing, where the parser would take its body for that protocol, or for the next request.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cycles: list[RequestResponseCycle] = []
        """Requests that have not been answered, in order."""
        self._head_bytes = 0
        self._in_head = self._in_body = False
        self._deaf = False
        """What comes is dropped: the connection ends with the answers that are due."""
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        for cycle in self._unanswered():
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        if not self._deaf:
            super().data_received(data if self._in_body else _without_upgrade(data))
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            if self._deaf:
                self.transport.abort()
                return
            self._refuse(431, f"the request's line and headers are longer than {MAX_HEAD_BYTES} bytes")
        self._time_head()

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Called by the parser, for which an exception here is one more thing that is not HTTP."""
        self._in_head, self._in_body = False, True
        if self.parser.should_upgrade():
            raise ValueError("an offer of another protocol that came in pieces")
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError(f"more than {MAX_PIPELINED} requests wait")
        super().on_headers_complete()
        offer_direct_writer(self.cycle)
        self._cycles = [*self._unanswered(), self.cycle]
        if self.pipeline:
            self.flow.resume_reading()  # or nobody would see the client leave

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._head_bytes, self._in_body = 0, False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Called for what is not HTTP."""
        self._refuse(400, msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writes()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def timeout_keep_alive_handler(self) -> None:
        """Called for a connection that has been idle for long."""
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self._watch_writes()  # a close waits for it

    def _unanswered(self) -> list[RequestResponseCycle]:
        return [cycle for cycle in self._cycles if not cycle.response_complete]

    def _time_head(self) -> None:
        waits = not self._unanswered() and self.timeout_keep_alive_task is None and not self.transport.is_closing()
        if waits and self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self._head_is_late)
        elif not waits and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._in_head:
            self._refuse(408, f"the request's headers did not come within {HEAD_S:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer what is no request, and close; after the answers that are due, and then without one of its own."""
        self._deaf = True
        due = self._unanswered()
        whole = [cycle for cycle in due if not cycle.more_body]
        if whole:
            whole[-1].keep_alive = False
            return
        if not any(cycle.response_started for cycle in due):
            self.transport.write(_answer(ApiError(status, message)))
        self.transport.close()

    def _watch_writes(self) -> None:
        if self._stall_timer is None:
            left = self.transport.get_write_buffer_size()
            self._stall_timer = self.loop.call_later(STALLED_S, self._check_writes, left)

    def _check_writes(self, before: int) -> None:
        self._stall_timer = None
        left = self.transport.get_write_buffer_size()
        if left >= before:
            logger.info("a client took nothing for %g s and was cut, %d bytes waited for it", STALLED_S, left)
            self.transport.abort()
        elif left:
            self._watch_writes()

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._stall_timer = None


def _without_upgrade(data: bytes) -> bytes:
    """What a request begins with, its Upgrade header under a name that says nothing; as long as before."""
    top, blank, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(_NO_UPGRADE, top) + blank + rest if _UPGRADE.search(top) else data


def notice_vanished(listening: socket.socket) -> None:
    """Have the system end connections whose client is gone without a word; those accepted inherit it."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        for option, value in (
            (socket.TCP_KEEPIDLE, _SILENT_S),
            (socket.TCP_KEEPINTVL, _PROBE_S),
            (socket.TCP_KEEPCNT, _PROBES),
            (socket.TCP_USER_TIMEOUT, _SILENT_S * _PROBES * 1000),
        ):
            listening.setsockopt(socket.IPPROTO_TCP, option, value)


def _answer(error: ApiError) -> bytes:
    body = encode_error(error)
    lines = [
        f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
