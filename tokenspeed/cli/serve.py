"""`tokenspeed serve`: the model behind an HTTP server that OpenAI's clients know."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from tokenspeed.cli.flags import add_engine_flags, add_limit_flags, engine_settings, limit_settings
from tokenspeed.config.engine import EngineConfig
from tokenspeed.config.serving import Limits
from tokenspeed.contracts.errors import ConfigError


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model with OpenAI's endpoints: /v1/completions, /v1/chat/completions, /v1/models; and "
        "/health, /metrics, /version. SIGTERM finishes what runs, then ends. Without a model: Gemma 3 270M.",
    )
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help="the same as --model")
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    group.add_argument("--port", type=int, default=8000, metavar="N", help="port; 0 takes a free one (default: 8000)")
    group.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        default=[],
        help="names that requests may use, the first one is answered (default: the model as given)",
    )
    group.add_argument(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that running requests get after SIGTERM (default: 30)",
    )
    _add_access_flags(parser)
    add_limit_flags(parser)
    add_engine_flags(parser)
    parser.set_defaults(run=run)


def _add_access_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("access")
    group.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        default=[],
        help="a key that requests must bring (may be given again); other users of this machine can see it: a file of "
        "digests shows none",
    )
    group.add_argument("--api-key-file", metavar="FILE", help="SHA-256 digests of keys, in hex, one a line")
    group.add_argument(
        "--metrics-need-key", action="store_true", help="/metrics needs a key too; /health and /version never do"
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        metavar="ORIGIN",
        default=[],
        help="an origin whose web pages may call this server, * is any (may be given again; default: none)",
    )
    group.add_argument("--ssl-certfile", metavar="FILE", help="certificate chain in PEM: serve over TLS")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="its private key, where it is in a file of its own")


def run(options: argparse.Namespace) -> None:
    """Listen, load, serve."""
    config = EngineConfig.from_kwargs(engine_settings(options) | {"model": _model(options)})
    if options.ssl_keyfile is not None and options.ssl_certfile is None:
        raise ConfigError("--ssl-keyfile needs --ssl-certfile")
    limits = Limits(**limit_settings(options))
    if not options.drain_timeout >= 0:
        raise ConfigError(f"--drain-timeout must be at least 0, got {options.drain_timeout}")
    from tokenspeed.engine.async_engine import AsyncEngine
    from tokenspeed.server.access import Access, Tls, check_origin
    from tokenspeed.server.engine import Engine, Progress
    from tokenspeed.server.keys import ApiKeys
    from tokenspeed.server.run import listen, run
    from tokenspeed.server.state import ServerState

    async def start(progress: Progress) -> Engine:
        return await AsyncEngine.start(config, progress=progress)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    access = Access(
        ApiKeys.load(options.api_key, options.api_key_file),
        options.metrics_need_key,
        [check_origin(origin) for origin in options.cors_origin],
        Tls(options.ssl_certfile, options.ssl_keyfile) if options.ssl_certfile is not None else None,
    )
    listening = listen(options.host, options.port)
    host, port = listening.getsockname()[:2]
    logging.getLogger("tokenspeed.server").info(
        "listening on %s://%s:%d", access.scheme, f"[{host}]" if ":" in host else host, port
    )
    state = ServerState(
        tuple(dict.fromkeys(options.served_model_name)), config.chat_template, limits=limits, access=access
    )
    run(state, start, listening, options.drain_timeout)


def _model(options: argparse.Namespace) -> str | None:
    named, flagged = options.model_argument, options.model
    if named is not None and flagged is not None and named != flagged:
        raise ConfigError(f"two models: {named} and --model {flagged}")
    return named if named is not None else flagged
