"""A server in a thread of its own, on a free port, with a fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import openai
import pytest
import uvicorn

from tests.server.fake_engine import FakeEngine
from tests.server.server_process import ServerProcess, started
from tokenspeed.config.serving import Limits
from tokenspeed.server.access import Access
from tokenspeed.server.app import create_app
from tokenspeed.server.connection import Connection
from tokenspeed.server.engine import Engine, Progress
from tokenspeed.server.run import HttpServer, listen
from tokenspeed.server.state import ServerState

GUARD_S = 30.0
"""Against hanging only: nothing waits for it."""
T = TypeVar("T")


@dataclass
class Served:
    """A running server. `client` speaks HTTP, `openai` the API."""

    url: str
    state: ServerState
    engine: FakeEngine
    client: httpx2.Client
    _loop: asyncio.AbstractEventLoop

    @cached_property
    def openai(self) -> openai.OpenAI:
        """Made on first use: it takes its time."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=GUARD_S)

    def do(self, action: Callable[[], T]) -> T:
        """Run something in the server's event loop."""

        async def act() -> T:
            return action()

        return asyncio.run_coroutine_threadsafe(act(), self._loop).result(GUARD_S)

    def wait(self, what: Callable[[], object]) -> None:
        """Until something is true in the server's event loop."""
        end = time.monotonic() + GUARD_S
        while not self.do(what):
            assert time.monotonic() < end, "it never happened"
            time.sleep(0.002)


Serve = Callable[..., Served]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(engine, names=(...), chat_template=None, max_n=3) starts a server that ends with the test."""
    ends: list[Callable[[], None]] = []

    def start(
        engine: FakeEngine | None = None,
        names: tuple[str, ...] = (),
        chat_template: str | None = None,
        access: Access | None = None,
        **limits: Any,
    ) -> Served:
        state = ServerState(names, chat_template, limits=Limits(**limits), access=access or Access())
        made, end = _start(engine or FakeEngine(), state)
        ends.append(end)
        return made

    yield start
    for end in ends:
        end()


@pytest.fixture
def served(serve: Serve) -> Served:
    return serve(chat_template="plain")


@pytest.fixture(scope="session")
def demo_server(demo_path: Path) -> Iterator[ServerProcess]:
    """`tokenspeed serve` with the demo model, once per worker, as the docs start it."""
    flags = ["--port", "0", "--chat-template", "plain", "--max-model-len", "256"]
    with started("tokenspeed.cli.main", ["serve", *flags]) as server:
        server.wait_until_ready()
        yield server
        assert server.terminate() == 0, server.log


def _start(engine: FakeEngine, state: ServerState) -> tuple[Served, Callable[[], None]]:
    listening = listen("127.0.0.1", 0)
    url = f"{state.access.scheme}://127.0.0.1:{listening.getsockname()[1]}"
    http = HttpServer(
        uvicorn.Config(
            create_app(state),
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            **state.access.tls_options(),
        )
    )
    started: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = []
    ready = threading.Event()

    async def load(progress: Progress) -> Engine:
        return engine

    async def main() -> None:
        await state.load(load)
        serving = asyncio.ensure_future(http.serve([listening]))
        started.append((asyncio.get_running_loop(), serving))
        ready.set()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        for server in http.servers:
            server.close()

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    assert ready.wait(GUARD_S)
    ((loop, serving),) = started
    client = httpx2.Client(base_url=url, timeout=GUARD_S, verify=False)  # or it reads all certificates
    made = Served(url, state, engine, client, loop)

    def end() -> None:
        client.close()
        if "openai" in vars(made):
            made.openai.close()
        loop.call_soon_threadsafe(serving.cancel)
        thread.join(GUARD_S)
        assert not thread.is_alive()

    return made, end
