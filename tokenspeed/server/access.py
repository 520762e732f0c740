"""Who may reach the server, and how: keys, origins of web pages, TLS."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from tokenspeed.config.serving import AccessConfig
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.server.keys import METRICS_PATH, OPEN_PATHS, ApiKeys, KeyCheck


@dataclass(frozen=True)
class Tls:
    """Files in PEM. `keyfile`: None where the certificate's file holds the key too. Raises ConfigError where they
    cannot be used together."""

    certfile: str
    keyfile: str | None = None

    def __post_init__(self) -> None:
        files = f"--ssl-certfile {self.certfile}" + (f" --ssl-keyfile {self.keyfile}" if self.keyfile else "")
        try:
            # Without a password OpenSSL would ask for one on the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certfile, self.keyfile, password="")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ConfigError(f"{files}: {error.strerror if isinstance(error, OSError) else error}") from None


@dataclass(frozen=True)
class Access:
    """By default everybody who reaches the port, over plain HTTP, but no web page of another origin.

    metrics_need_key: /metrics needs one of the keys too; /health, /version and /openapi.json never do. cors_origins:
    "*" is any.
    """

    keys: ApiKeys = field(default_factory=ApiKeys)
    metrics_need_key: bool = False
    cors_origins: Sequence[str] = ()
    tls: Tls | None = None

    @classmethod
    def of(cls, config: AccessConfig) -> Access:
        """As configured. Raises ConfigError for files that cannot be used, and for an origin that none would ever
        be."""
        return cls(
            ApiKeys.load(config.api_key, config.api_key_file),
            config.metrics_need_key,
            [check_origin(origin) for origin in config.cors_origin],
            Tls(config.ssl_certfile, config.ssl_keyfile) if config.ssl_certfile is not None else None,
        )

    @property
    def scheme(self) -> str:
        """Of the server's addresses."""
        return "http" if self.tls is None else "https"

    @property
    def open_paths(self) -> frozenset[str]:
        """Those that need no key, besides those of /admin."""
        return OPEN_PATHS if self.metrics_need_key else OPEN_PATHS | {METRICS_PATH}

    def guard(self, app: FastAPI) -> None:
        """Put the checks before the routes of `app`."""
        if self.keys:
            app.add_middleware(KeyCheck, keys=self.keys, open_paths=self.open_paths)
        if self.cors_origins:  # the last one added comes first: a preflight brings no key
            app.add_middleware(
                CORSMiddleware,
                allow_origins=list(self.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type", "traceparent", "tracestate", "x-request-id"],
                expose_headers=["x-request-id"],
            )

    def tls_options(self) -> dict[str, Any]:
        """Keywords of uvicorn's Config."""
        return {} if self.tls is None else {"ssl_certfile": self.tls.certfile, "ssl_keyfile": self.tls.keyfile}


def check_origin(origin: str) -> str:
    """An origin as browsers send it. Raises ConfigError for anything else, which would never match."""
    scheme, _, host = origin.partition("://")
    if origin != "*" and (scheme not in ("http", "https") or not host or "/" in host):
        raise ConfigError(f"--cors-origin must be * or like https://chat.example.org:8443, got {origin!r}")
    return origin
