"""One server's life: listen, load, serve, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn
import uvloop

from tokenspeed.config.serving import ServeConfig
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.server.app import create_app
from tokenspeed.server.connection import Connection, notice_vanished
from tokenspeed.server.engine import StartEngine
from tokenspeed.server.outage import RestartPolicy
from tokenspeed.server.state import ServerState
from tokenspeed.server.supervisor import Supervisor

logger = logging.getLogger("tokenspeed.server")
KEEP_ALIVE_S = 75
"""Longer than the idle limit of common proxies and clients, so that they close first and no request meets a close."""
_DATE_S = 1.0
LAST_WRITES_S = 5.0
"""How long clients may take to read what was left when the engine had drained."""


@dataclass(frozen=True)
class Manner:
    """How a server lives and ends. drain_timeout: seconds that running requests get after SIGTERM. max_engine_restarts:
    how many engines that fail are replaced, in ten minutes. log_level: of uvicorn."""

    drain_timeout: float
    max_engine_restarts: int
    log_level: str = "warning"

    @classmethod
    def of(cls, config: ServeConfig) -> Manner:
        """As configured."""
        operations = config.operations
        return cls(config.server.drain_timeout, operations.max_engine_restarts, operations.uvicorn_log_level)


class HttpServer(uvicorn.Server):
    """uvicorn, without its own way with signals: it would end the process with the signal it got. And it ends when it
    is told to, without looking ten times a second whether it was: each look costs as much as a token or two."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._left = asyncio.Event()

    def leave(self) -> None:
        """Take no more connections, and end when those there are have ended."""
        self.should_exit = True
        self._left.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # which sets the Date of responses
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._left.wait(), _DATE_S)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ConfigError naming host and port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        notice_vanished(made)
        made.bind(address)
        made.listen(2048)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot listen on --host {host} --port {port}: {error}") from None
    made.setblocking(False)
    return made


def run(state: ServerState, start: StartEngine, listening: socket.socket, manner: Manner) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs within `drain_timeout` seconds; a second one ends at once.

    HTTP answers from the first moment on: /health tells of the loading. Raises what the start of the engine raises.
    """
    supervisor = Supervisor(state, start, RestartPolicy(manner.max_engine_restarts))
    uvloop.run(Life(state, supervisor, listening, manner).run())


class Life:
    """The tasks of one server."""

    def __init__(self, state: ServerState, supervisor: Supervisor, listening: socket.socket, manner: Manner) -> None:
        self._state, self._supervisor = state, supervisor
        self._listening, self._drain_timeout = listening, manner.drain_timeout
        self._http = HttpServer(
            uvicorn.Config(
                create_app(state),
                loop="none",
                http=Connection,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level=manner.log_level,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                **state.access.tls_options(),
            )
        )
        self._signals = 0
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """See `run`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        serving = asyncio.ensure_future(self._http.serve([self._listening]))
        engines = asyncio.ensure_future(self._supervisor.run())
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({serving, engines, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if engines.done():
                engines.result()
                await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await self._end(serving, engines, stopping)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _end(
        self, serving: asyncio.Future[None], engines: asyncio.Future[None], stopping: asyncio.Future[Any]
    ) -> None:
        self._state.draining = True
        self._http.leave()
        stopping.cancel()
        engines.cancel()
        await asyncio.wait({engines})
        engine = self._state.engine
        if engine is not None:
            logger.info("finishing what runs, within %g s", self._drain_timeout)
            await self._unless_hurried(engine.drain(self._drain_timeout))
        await self._unless_hurried(asyncio.wait({serving}, timeout=LAST_WRITES_S))
        self._http.force_exit = True
        if engine is not None:
            await engine.close()
        await serving

    async def _unless_hurried(self, work: Coroutine[Any, Any, object]) -> None:
        task, hurry = asyncio.ensure_future(work), asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait({task, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        elif error := task.exception():
            logger.error("draining failed", exc_info=error)
