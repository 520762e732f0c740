"""Who asks, as far as a log may know it."""

from __future__ import annotations

import hashlib
import secrets
from contextvars import ContextVar

from starlette.types import ASGIApp, Receive, Scope, Send

client_of_request: ContextVar[str] = ContextVar("client_of_request", default="")
"""The hash of the address that the request under way came from; of a request's own context."""
_KEY = secrets.token_bytes(16)
"""Another one in every process: hashes of addresses could be looked up otherwise."""


class NoteClient:
    """Middleware: sets `client_of_request`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope.get("client"):
            client_of_request.set(address_hash(scope["client"][0]))
        await self._app(scope, receive, send)


def address_hash(address: str) -> str:
    """12 hex digits; the same address has the same ones as long as the process lives."""
    return hashlib.blake2s(address.encode(), key=_KEY, digest_size=6).hexdigest()
