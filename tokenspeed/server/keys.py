"""API keys: who may send requests. Keys themselves are neither kept nor logged, only their SHA-256 digests."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenspeed.contracts.errors import ConfigError
from tokenspeed.server.errors import ApiError, error_response

OPEN_PATHS = frozenset({"/health", "/openapi.json", "/version"})
METRICS_PATH = "/metrics"
ADMIN_PREFIX = "/admin/"
"""Has a guard and a key of its own."""
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


class ApiKeys:
    """Digests of the keys that are accepted; empty where none is asked for."""

    def __init__(self, digests: Iterable[bytes] = ()) -> None:
        self._digests = tuple(digests)

    @classmethod
    def load(cls, keys: Iterable[str], path: str | None) -> ApiKeys:
        """From keys, and a file that holds one SHA-256 digest in hex a line; blank lines and those after # count for
        nothing. Raises ConfigError for a key that no request could bring and for a file that cannot be used, and names
        no key."""
        given = [key.encode("utf-8", "surrogateescape") for key in keys]
        if not all(key.strip() for key in given):
            raise ConfigError("--api-key must not be empty")
        if any(key != key.strip() or _CONTROL.search(key) for key in given):
            raise ConfigError("--api-key must have no space or line end around it, and no control character in it")
        digests = [digest_of(key) for key in given]
        return cls([*digests, *(_read(Path(path)) if path is not None else ())])

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, key: bytes) -> bool:
        """Whether this is one of the keys, in a time that does not depend on it."""
        given, found = digest_of(key), False
        for digest in self._digests:
            found |= hmac.compare_digest(given, digest)
        return found


class KeyCheck:
    """Middleware: 401 for requests without a key, on all paths but `open_paths`."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, open_paths: Iterable[str]) -> None:
        self._app, self._keys, self._open = app, keys, frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope)
        is_open = path in self._open or path.startswith(ADMIN_PREFIX)
        if scope["type"] != "http" or is_open or self._keys.accept(bearer(scope)):
            await self._app(scope, receive, send)
            return
        error = ApiError(401, "this server needs an API key: Authorization: Bearer KEY", code="invalid_api_key")
        await error_response(error)(scope, receive, send)


def route_path(scope: Scope) -> str:
    """The path without --root-path, as the routes are looked up by."""
    path: str = scope.get("path", "")
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def bearer(scope: Scope) -> bytes:
    """The key that a request brings; empty for none."""
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    return key.strip(" \t").encode("latin-1") if scheme.lower() == "bearer" else b""


def digest_of(key: bytes) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key).digest()


def _read(path: Path) -> list[bytes]:
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"--api-key-file {path}: {reason}") from None
    digests = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if text and not _DIGEST.fullmatch(text):
            raise ConfigError(f"--api-key-file {path}, line {number}: not a SHA-256 digest of 64 hex digits")
        if text:
            digests.append(bytes.fromhex(text))
    if not digests:
        raise ConfigError(f"--api-key-file {path} holds no digest")
    return digests
