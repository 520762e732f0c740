"""From settings to a server: what `tokenspeed serve` starts."""

from __future__ import annotations

import logging
import socket

from tokenspeed.config.serving import OperationsConfig, ServeConfig
from tokenspeed.engine.async_engine import AsyncEngine
from tokenspeed.observability.loading import LoadingReport
from tokenspeed.observability.traces import open_exporter
from tokenspeed.server.access import Access
from tokenspeed.server.engine import Engine, Progress
from tokenspeed.server.logs import RequestLog, set_up_logging
from tokenspeed.server.profile import profile_folder
from tokenspeed.server.run import Manner, listen, run
from tokenspeed.server.spans import RequestSpans
from tokenspeed.server.state import ServerState

logger = logging.getLogger("tokenspeed.server")


def serve(config: ServeConfig) -> None:
    """Listen, load, serve, until a signal ends it. Raises ConfigError for what cannot be used, before anything is
    loaded, and what the first start of the engine raises."""
    state = make_state(config)
    set_up_logging(config.operations.log_format)
    observe_requests(state, config.operations)
    listening = listen(config.server.host, config.server.port)
    logger.info("listening on %s", address(state, listening))

    async def start(progress: Progress) -> Engine:
        stuck_after_s = config.operations.engine_stuck_timeout
        with LoadingReport() as report:

            def shown(done: int, total: int) -> None:
                report(done, total)
                progress(done, total)

            return await AsyncEngine.start(config.engine, progress=shown, stuck_after_s=stuck_after_s)

    run(state, start, listening, Manner.of(config))


def make_state(config: ServeConfig) -> ServerState:
    """What routes share, as configured. Raises ConfigError for files and folders that cannot be used."""
    folder = config.operations.profile_dir
    return ServerState(
        tuple(dict.fromkeys(config.server.served_model_name)),
        config.engine.chat_template,
        limits=config.limits,
        access=Access.of(config.access),
        admin_key=config.operations.admin_key,
        profile_dir=profile_folder(folder) if folder is not None else None,
        root_path=config.server.root_path,
    )


def observe_requests(state: ServerState, config: OperationsConfig) -> None:
    """Log and trace requests, as far as they are to be. Raises ConfigError where the packages for traces are
    missing."""
    if config.enable_log_requests:
        state.metrics.observers.append(RequestLog(state.prompt_text if config.log_prompts else None))
    if config.otlp_traces_endpoint is not None:
        export = open_exporter(config.otlp_traces_endpoint)
        state.metrics.observers.append(RequestSpans(export, lambda: state.names[0]))


def address(state: ServerState, listening: socket.socket) -> str:
    """Where a client finds the server."""
    host, port = listening.getsockname()[:2]
    return f"{state.access.scheme}://{f'[{host}]' if ':' in host else host}:{port}"
