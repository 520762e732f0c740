"""`tokenspeed serve`: the model behind an HTTP server that OpenAI's clients know."""

from __future__ import annotations

import argparse
import logging
import os
from typing import TYPE_CHECKING, Any

from tokenspeed.cli.flags import add_engine_flags, add_limit_flags, engine_settings, limit_settings
from tokenspeed.config.engine import EngineConfig
from tokenspeed.config.serving import Limits
from tokenspeed.contracts.errors import ConfigError

if TYPE_CHECKING:
    from tokenspeed.server.access import Access


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model with OpenAI's endpoints: /v1/completions, /v1/chat/completions, /v1/models; and "
        "/health, /metrics, /version, /admin. SIGTERM finishes what runs, then ends. Without a model: Gemma 3 270M.",
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
    _add_operation_flags(parser)
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


def _add_operation_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("operations")
    group.add_argument(
        "--max-engine-restarts",
        type=int,
        default=5,
        metavar="N",
        help="most restarts of an engine that fails, in ten minutes; then the server stays unhealthy (default: 5)",
    )
    group.add_argument(
        "--engine-stuck-timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="an engine with work that finishes no step for so many seconds is stuck, and restarted (default: 60)",
    )
    group.add_argument(
        "--admin-key",
        metavar="KEY",
        help="what requests to /admin must carry as Authorization: Bearer KEY; without it /admin answers to this "
        "machine alone (TOKENSPEED_ADMIN_KEY in the environment is the same, and is not seen by who lists processes)",
    )
    group.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="lines of the log (default: text)"
    )
    group.add_argument("--log-prompts", action="store_true", help="log the prompt of each request with its line")
    group.add_argument(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="send a trace of each request there, as OTLP over HTTP (http://collector:4318/v1/traces); needs the extra "
        "traces",
    )
    group.add_argument(
        "--profile-dir", metavar="DIR", help="where POST /admin/profile writes its files; without it, it is refused"
    )


def _check_operation_flags(options: argparse.Namespace) -> None:
    if options.max_engine_restarts < 0:
        raise ConfigError(f"--max-engine-restarts must be at least 0, got {options.max_engine_restarts}")
    if not options.engine_stuck_timeout > 0:
        raise ConfigError(f"--engine-stuck-timeout must be above 0, got {options.engine_stuck_timeout}")


def _access(options: argparse.Namespace) -> Access:
    """Raises ConfigError for files that cannot be used, and for an origin that none would ever be."""
    from tokenspeed.server.access import Access, Tls, check_origin
    from tokenspeed.server.keys import ApiKeys

    certificate, key = options.ssl_certfile, options.ssl_keyfile
    if key is not None and certificate is None:
        raise ConfigError("--ssl-keyfile needs --ssl-certfile")
    return Access(
        ApiKeys.load(options.api_key, options.api_key_file),
        options.metrics_need_key,
        [check_origin(origin) for origin in options.cors_origin],
        Tls(certificate, key) if certificate is not None else None,
    )


def _admin_key(options: argparse.Namespace) -> str | None:
    """Raises ConfigError for an empty one, which would let everybody in, and for one that no header can carry."""
    key: str | None = options.admin_key if options.admin_key is not None else os.environ.get("TOKENSPEED_ADMIN_KEY")
    if key is not None and not (key.strip() and key.isascii() and key.isprintable()):
        raise ConfigError("--admin-key must be of printable ASCII characters and not empty")
    return key


def run(options: argparse.Namespace) -> None:
    """Listen, load, serve."""
    config = EngineConfig.from_kwargs(engine_settings(options) | {"model": _model(options)})
    limits = Limits(**limit_settings(options))
    if not options.drain_timeout >= 0:
        raise ConfigError(f"--drain-timeout must be at least 0, got {options.drain_timeout}")
    _check_operation_flags(options)
    from tokenspeed.engine.async_engine import AsyncEngine
    from tokenspeed.observability.traces import open_exporter
    from tokenspeed.server.engine import Engine, Progress
    from tokenspeed.server.logs import RequestLog, set_up_logging
    from tokenspeed.server.profile import profile_folder
    from tokenspeed.server.run import listen, run
    from tokenspeed.server.spans import RequestSpans
    from tokenspeed.server.state import ServerState

    async def start(progress: Progress) -> Engine:
        return await AsyncEngine.start(config, progress=progress, stuck_after_s=options.engine_stuck_timeout)

    state = ServerState(
        tuple(dict.fromkeys(options.served_model_name)),
        config.chat_template,
        limits=limits,
        access=_access(options),
        admin_key=_admin_key(options),
        profile_dir=profile_folder(options.profile_dir) if options.profile_dir is not None else None,
    )
    set_up_logging(options.log_format)
    state.metrics.observers.append(RequestLog(state.prompt_text if options.log_prompts else None))
    if options.otlp_traces_endpoint is not None:
        export = open_exporter(options.otlp_traces_endpoint)
        state.metrics.observers.append(RequestSpans(export, lambda: state.names[0]))
    listening = listen(options.host, options.port)
    host, port = listening.getsockname()[:2]
    logging.getLogger("tokenspeed.server").info(
        "listening on %s://%s:%d", state.access.scheme, f"[{host}]" if ":" in host else host, port
    )
    run(state, start, listening, options.drain_timeout, options.max_engine_restarts)


def _model(options: argparse.Namespace) -> str | None:
    named, flagged = options.model_argument, options.model
    if named is not None and flagged is not None and named != flagged:
        raise ConfigError(f"two models: {named} and --model {flagged}")
    return named if named is not None else flagged
