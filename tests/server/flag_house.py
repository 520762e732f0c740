"""What the tests of flags look through: parsed flags as a config, an app, an engine, a whole `tokenspeed serve`."""

from __future__ import annotations

import asyncio
import gc
import re
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from tests.server.fake_engine import FakeEngine
from tokenspeed.cli.main import main, parser
from tokenspeed.cli.serve import serve_config
from tokenspeed.config.serving import ServeConfig
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.core import EngineCore
from tokenspeed.engine.intake import Intake
from tokenspeed.runner.build import open_model
from tokenspeed.server import serve
from tokenspeed.server.app import create_app
from tokenspeed.server.engine import Engine, Progress
from tokenspeed.server.state import ServerState

Asked = tuple[str, str, dict[str, Any]]
"""Method, path, and keywords of the HTTP client."""
ALICE, BOB = "sk-alice", "sk-bob"


def get(path: str, key: str = "", **headers: str) -> Asked:
    return "GET", path, {"headers": headers | ({"authorization": f"Bearer {key}"} if key else {})}


def post(path: str, **body: Any) -> Asked:
    return "POST", path, {"json": body}


@dataclass
class Driven:
    """What an engine did: tokens and cached prompt tokens by prompt, the largest step, most sequences at once."""

    tokens: list[list[int]]
    cached: list[int]
    largest_step: int = 0
    most_running: int = 0


@dataclass
class House:
    """Everything that flags reach."""

    tmp: Path
    patch: pytest.MonkeyPatch
    log: pytest.LogCaptureFixture
    tiny: Path
    """A tiny random model."""
    quantised: Callable[[], Path]
    """A tiny .gguf file in Q8_0, made once."""
    started: dict[str, Any] = field(default_factory=dict)
    """What the engine of `serve` was started with."""
    _visit: asyncio.Future[None] | None = None

    def config(self, *flags: str) -> ServeConfig:
        return serve_config(parser().parse_args(["serve", *flags]))

    def talk(self, flags: Sequence[str], *asked: Asked, engine: FakeEngine | None = None) -> list[httpx2.Response]:
        """Requests to an app made of the flags, with a fake engine."""
        config = self.config(*flags)
        made = engine or FakeEngine()

        async def load(progress: Progress) -> Engine:
            return made

        async def ask() -> list[httpx2.Response]:
            state = serve.make_state(config)
            serve.observe_requests(state, config.operations)
            await state.load(load)
            return await _answers(state, asked)

        return asyncio.run(ask())

    def statuses(self, flags: Sequence[str], *asked: Asked, engine: FakeEngine | None = None) -> list[int]:
        return [response.status_code for response in self.talk(flags, *asked, engine=engine)]

    def serve(
        self,
        flags: Sequence[str],
        during: Callable[[str, FakeEngine], Awaitable[None]],
        engine: FakeEngine | None = None,
    ) -> FakeEngine:
        """`tokenspeed serve` in this process, with a fake engine, until `during`, which gets the address, ends."""
        made, failed = engine or FakeEngine(), []

        async def visit() -> None:
            try:
                await during(self.address(), made)
            except BaseException as error:
                failed.append(error)
            finally:
                signal.raise_signal(signal.SIGTERM)

        async def start(config: Any, **settings: Any) -> Engine:
            self.started = settings | {"config": config}
            self._visit = asyncio.ensure_future(visit())
            return made

        self.log.set_level("INFO", "tokenspeed")
        self.patch.setattr(serve, "AsyncEngine", SimpleNamespace(start=start))
        try:
            assert main(["serve", "--port", "0", *flags]) == 0
        finally:
            gc.unfreeze()
        if failed:
            raise failed[0]
        return made

    def address(self) -> str:
        """Of the server that was started last."""
        return re.findall(r"listening on (\S+)", self.log.text)[-1]

    def core(self, *flags: str) -> EngineCore:
        """An engine of the tiny model, or of another --model, without a process."""
        config = self.config("--model", str(self.tiny), "--kv-cache-memory-bytes", str(1 << 20), *flags).engine
        return EngineCore(config, open_model(config))


async def _answers(state: ServerState, asked: Sequence[Asked]) -> list[httpx2.Response]:
    transport = httpx2.ASGITransport(app=create_app(state), client=("127.0.0.1", 5))
    async with httpx2.AsyncClient(transport=transport, base_url="http://here", timeout=30) as client:
        return [await client.request(method, path, **fields) for method, path, fields in asked]


def drive(core: EngineCore, *prompts: Sequence[int], max_tokens: int = 3) -> Driven:
    """Run prompts together to their ends, greedily."""
    intake, params = Intake(core.info, None, 0), SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        core.add(intake.request(str(number), list(prompt), params, priority=0, cache_salt=""))
    driven = Driven([[] for _ in prompts], [0] * len(prompts))
    while core.has_work:
        for update in core.step():
            at = int(update.request_id)
            driven.tokens[at] += update.new_token_ids
            driven.cached[at] = max(driven.cached[at], update.num_cached_tokens)
        driven.largest_step = max(driven.largest_step, core.ring[-1].record.num_tokens)
        driven.most_running = max(driven.most_running, core.scheduler.num_running)
    return driven
