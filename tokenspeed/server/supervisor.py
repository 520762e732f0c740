"""Keeps a server's engine alive: loads it, and loads another when it dies or is stuck."""

from __future__ import annotations

import asyncio
import gc
import logging
import time

from tokenspeed.contracts.errors import EngineDeadError
from tokenspeed.server.engine import StartEngine
from tokenspeed.server.outage import WINDOW_S, Outage, RestartPolicy
from tokenspeed.server.state import ServerState

logger = logging.getLogger("tokenspeed.server")
LEAST_LOAD_LIMIT_S = 60.0
LOAD_SLACK = 10.0
"""A restart may take so many times as long to load as the first load took: files may have left the page cache."""


class Supervisor:
    """The engines of one server, one after the other. least_load_limit_s: what a restart may take to load at least."""

    def __init__(
        self,
        state: ServerState,
        start: StartEngine,
        policy: RestartPolicy,
        least_load_limit_s: float = LEAST_LOAD_LIMIT_S,
    ) -> None:
        self._state, self._start, self._policy = state, start, policy
        self._load_limit_s = least_load_limit_s

    async def run(self) -> None:
        """Load, and restart until that is given up. Raises what the first load raises."""
        self._load_limit_s = max(self._load_limit_s, LOAD_SLACK * await self._load())
        lived_s, reason = await self._until_unwell()
        while (delay := self._policy.next_delay(time.monotonic(), lived_s)) is not None:
            lived_s, reason = await self._restart(reason, delay)
        self._give_up(reason)

    async def _load(self) -> float:
        """Seconds that it took."""
        began = time.monotonic()
        await self._state.load(self._start)
        took_s = time.monotonic() - began
        # What is loaded stays: the collector need not walk it again.
        gc.collect()
        gc.freeze()
        logger.info("ready: %s", ", ".join(self._state.names))
        return took_s

    async def _until_unwell(self) -> tuple[float, str]:
        """Wait for the engine to fail and end it; how long it lived, and why it failed."""
        engine, began = self._state.engine, time.monotonic()
        assert engine is not None
        reason = await engine.unwell()
        lived_s = time.monotonic() - began
        logger.error("%s", reason)
        self._state.lose_engine(Outage(reason))
        await engine.kill(reason)  # until it has ended, `state` holds it: a shutdown meanwhile must end it, too
        self._state.engine = None
        return lived_s, reason

    async def _restart(self, reason: str, delay_s: float) -> tuple[float, str]:
        step = f"restart {self._policy.recent} of at most {self._policy.limit} in {WINDOW_S / 60:.0f} min"
        self._state.outage = Outage(reason, step, due=time.monotonic() + delay_s)
        logger.info("%s, in %g s", step, delay_s)
        await asyncio.sleep(delay_s)
        self._state.outage = Outage(reason, step, limit_s=self._load_limit_s)
        try:
            await self._load_in_time()
        except Exception as error:  # whatever it is, the next try may do better, and a server that ends cannot
            logger.error("%s failed: %s", step, error, exc_info=error)
            return 0.0, f"a restart failed: {error}"
        return await self._until_unwell()

    async def _load_in_time(self) -> None:
        limit = asyncio.timeout(self._load_limit_s)
        try:
            async with limit:
                await self._load()
        except TimeoutError:
            if not limit.expired():  # the load raised it itself
                raise
            raise EngineDeadError(f"the load took longer than {self._load_limit_s:.0f} s, and was ended") from None

    def _give_up(self, reason: str) -> None:
        step = f"not restarted: {self._policy.recent} restarts in {WINDOW_S / 60:.0f} min are counted, "
        step += f"--max-engine-restarts allows {self._policy.limit}"
        logger.error("%s", step)
        self._state.outage = Outage(reason, step, final=True)
