"""A light client of HTTP/1.1 and server-sent events: a parser in C, one clock reading per arrival, and nothing per
event that measuring does not need."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import cast
from urllib.parse import urlsplit

import httptools

from tokenspeed.contracts.errors import ConfigError

OnEvent = Callable[[float, bytes], None]
"""Called with the time of arrival (perf_counter, s) and the data of an event."""
_ERROR_TEXT = 500


class RequestFailed(Exception):
    """A response that is not 200, or that ended early; the message says which."""


@dataclass(frozen=True)
class Endpoint:
    """Where requests go. `prefix` is the path before /completions and the like."""

    host: str
    port: int
    prefix: str
    tls: bool
    headers: tuple[str, ...] = ()

    @classmethod
    def parse(cls, base_url: str, api_key: str | None = None) -> Endpoint:
        """From http(s)://host[:port][/path]; "/v1" is added where it is missing. Raises ConfigError."""
        parts = urlsplit(base_url)
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise ConfigError(f"--base-url {base_url}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--base-url must look like http://host:port, got {base_url!r}")
        path = parts.path.rstrip("/")
        headers = (f"Authorization: Bearer {api_key}",) if api_key else ()
        prefix = path if path.endswith("/v1") else f"{path}/v1"
        return cls(parts.hostname, port, prefix, parts.scheme == "https", headers)

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of a whole request."""
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {self.host}:{self.port}", *self.headers]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Client:
    """Connections to one endpoint, kept open and used again."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._idle: list[_Connection] = []
        self._tls = ssl.create_default_context() if endpoint.tls else None

    async def get(self, path: str) -> bytes:
        """The body of a GET. Raises RequestFailed, OSError."""
        return await self._exchange(self.endpoint.request("GET", path), None)

    async def stream(self, request: bytes, on_event: OnEvent) -> None:
        """Send a request, made by `Endpoint.request`, and hand over its events. Raises RequestFailed, OSError."""
        await self._exchange(request, on_event)

    async def post(self, request: bytes) -> bytes:
        """The body of the answer to a request, made by `Endpoint.request`. Raises RequestFailed, OSError."""
        return await self._exchange(request, None)

    def close(self) -> None:
        """Close what is open."""
        while self._idle:
            self._idle.pop().close()

    async def _exchange(self, request: bytes, on_event: OnEvent | None) -> bytes:
        connection = await self._connection()
        try:
            body = await connection.exchange(request, on_event)
        except BaseException:
            connection.close()
            raise
        self._keep(connection)
        return body

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        loop, endpoint = asyncio.get_running_loop(), self.endpoint
        _, made = await loop.create_connection(_Connection, endpoint.host, endpoint.port, ssl=self._tls)
        return made

    def _keep(self, connection: _Connection) -> None:
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._end: asyncio.Future[None] | None = None
        self._on_event: OnEvent | None = None
        self._now = 0.0
        self._buffer = b""
        self._keep_alive = True
        self._parser = httptools.HttpResponseParser(self)

    @property
    def reusable(self) -> bool:
        return self._keep_alive and self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes, on_event: OnEvent | None) -> bytes:
        """Send, and wait for the end of the response. The body comes back where no events are asked for."""
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._on_event, self._buffer = on_event, b""
        self._end = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._end
        status = self._parser.get_status_code()
        if status != 200:
            text = self._buffer[:_ERROR_TEXT].decode(errors="replace")
            raise RequestFailed(f"HTTP {status}: {' '.join(text.split())}")
        return self._buffer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class is none of asyncio's

    def data_received(self, data: bytes) -> None:
        self._now = perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self._keep_alive = False
        self._fail(f"the connection was closed before the response ended{f': {error}' if error else ''}")

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        if self._on_event is None or self._parser.get_status_code() != 200:
            self._buffer += body
            return
        *lines, self._buffer = (self._buffer + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._on_event(self._now, line[5:].strip())

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._keep_alive = self._parser.should_keep_alive()
        if self._end is not None and not self._end.done():
            self._end.set_result(None)

    def _fail(self, reason: str) -> None:
        if self._end is not None and not self._end.done():
            self._end.set_exception(RequestFailed(reason))
