"""Who asks, as far as a log may know it, and what the request is called outside.

traceparent and tracestate: https://www.w3.org/TR/trace-context/.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Awaitable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

ID_PATTERN = "[!-~]{1,128}"
"""Of an x-request-id that is taken over: printable, without spaces."""
REQUEST_ID = b"x-request-id"
_SANE_ID = re.compile(ID_PATTERN.encode())
_TRACE = frozenset({b"traceparent", b"tracestate"})
_KEY = secrets.token_bytes(16)
"""Another one in every process: hashes of addresses could be looked up otherwise."""


@dataclass(frozen=True)
class Caller:
    """client: a hash of the address. request_id: the x-request-id that is answered. trace: the headers of the trace
    that the request belongs to, by name, as they came."""

    client: str = ""
    request_id: str = ""
    trace: Mapping[str, str] = field(default_factory=dict)


NOBODY = Caller()
caller_of_request: ContextVar[Caller] = ContextVar("caller_of_request", default=NOBODY)
"""Of the request under way, in its own context."""


class NoteCaller:
    """Middleware: sets `caller_of_request`, and answers x-request-id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        caller = note(scope["headers"], scope.get("client"))
        caller_of_request.set(caller)

        def send_named(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID, caller.request_id.encode())]
            return send(message)

        await self._app(scope, receive, send_named)


def note(headers: Iterable[tuple[bytes, bytes]], client: tuple[str, int] | None) -> Caller:
    """headers: names in lower case. An x-request-id that is too long or not printable is replaced by one of our own,
    and so are several; of several traceparent headers none counts."""
    ids: list[bytes] = []
    trace: dict[str, list[str]] = {}
    for name, value in headers:
        if name == REQUEST_ID:
            ids.append(value)
        elif name in _TRACE:
            trace.setdefault(name.decode(), []).append(value.decode("latin-1"))
    sane = len(ids) == 1 and _SANE_ID.fullmatch(ids[0])
    return Caller(
        address_hash(client[0]) if client else "",
        ids[0].decode() if sane else secrets.token_hex(12),
        {name: ",".join(values) for name, values in trace.items()} if len(trace.get("traceparent", ())) == 1 else {},
    )


def address_hash(address: str) -> str:
    """12 hex digits; the same address has the same ones as long as the process lives."""
    return hashlib.blake2s(address.encode(), key=_KEY, digest_size=6).hexdigest()
