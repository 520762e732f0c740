"""A batch from its first line to its last: many lines under way, each answered for itself."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import uvloop

from tokenspeed.config.serving import Limits
from tokenspeed.contracts.errors import EngineDeadError
from tokenspeed.contracts.sampling import MAX_LOGPROBS, MAX_N
from tokenspeed.server.batch.endpoints import ENDPOINTS, answer
from tokenspeed.server.batch.lines import Line, LineFeed, Read, split_lines
from tokenspeed.server.batch.requests import DUPLICATE, MAX_LINE_BYTES, custom_id_of, line_fields, request_of
from tokenspeed.server.batch.results import BatchError, Results, key_of_custom_id, key_of_line, result
from tokenspeed.server.engine import Engine, StartEngine
from tokenspeed.server.errors import ApiError, encode_error
from tokenspeed.server.state import ServerState

_ANY = 2**31 - 1
BATCH_LIMITS = Limits(
    max_choices=_ANY,
    max_n=MAX_N,
    max_stop=_ANY,
    max_stop_len=_ANY,
    max_logprobs=MAX_LOGPROBS,
    max_queue_len=_ANY,
)
"""A server's own limits are against strangers."""


@dataclass
class Tally:
    """Lines with content so far: those answered by this run, those that an earlier one had answered, and of both those
    answered with an error. end: bytes of the input up to the last one."""

    answered: int = 0
    kept: int = 0
    failed: int = 0
    end: int = 0


Report = Callable[[Tally], None]


def run(
    state: ServerState,
    start: StartEngine,
    read: Read,
    results: Results,
    tally: Tally,
    in_flight: int,
    report: Report = lambda tally: None,
) -> None:
    """Load, answer every line, end. `tally` is kept up to date; report: told of it. in_flight: most lines under way.

    Raises what the start of the engine raises, EngineDeadError where the engine fails, ConfigError where input or
    output do, and KeyboardInterrupt after SIGINT or SIGTERM. What was answered until then is in `results`.
    """
    try:
        uvloop.run(_run(state, start, read, Batch(state, results, tally, report), in_flight))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        results.close()


async def _run(state: ServerState, start: StartEngine, read: Read, batch: Batch, in_flight: int) -> None:
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    await state.load(start)
    assert state.engine is not None
    try:
        await batch.run(state.engine, LineFeed(split_lines(read, MAX_LINE_BYTES)), in_flight)
    finally:
        await state.engine.close()


class Batch:
    """The lines of one batch. Memory is that of the lines under way, and 16 bytes for each custom_id."""

    def __init__(self, state: ServerState, results: Results, tally: Tally, report: Report) -> None:
        self._state, self._results, self._report = state, results, report
        self._seen = set[bytes]()
        self.tally = tally

    async def run(self, engine: Engine, feed: LineFeed, in_flight: int) -> None:
        """Answer all lines, `in_flight` at a time. Raises as `run` does."""
        workers = [asyncio.ensure_future(self._work(feed)) for _ in range(in_flight)]
        work = asyncio.gather(*workers)
        unwell = asyncio.ensure_future(engine.unwell())
        try:
            either: set[asyncio.Future[Any]] = {work, unwell}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                await engine.kill(unwell.result())
                raise EngineDeadError(unwell.result())
            work.result()
        finally:
            for task in (*workers, unwell):  # one that fails leaves the others running
                task.cancel()
            await asyncio.gather(work, *workers, unwell, return_exceptions=True)

    async def _work(self, feed: LineFeed) -> None:
        while (line := await feed.next()) is not None:
            if line.raw.strip():
                await self._take(line)

    async def _take(self, line: Line) -> None:
        self.tally.end = line.end
        key, custom_id = key_of_line(line), None
        try:
            fields = line_fields(line)
            custom_id = custom_id_of(fields, line.number)
            own = key_of_custom_id(custom_id)
            if own in self._seen:
                text = f"line {line.number}: custom_id {custom_id!r} is that of an earlier line"
                raise ApiError(400, text, "custom_id", DUPLICATE)
            self._seen.add(own)
            key = own
            if self._keeps(key):
                return
            request = request_of(fields, line.number, ENDPOINTS)
        except ApiError as error:
            if not self._keeps(key):
                trouble = BatchError(error.code or "", error.message)
                self._add(key, custom_id, error.status, encode_error(error), trouble)
            return
        status, body = await answer(ENDPOINTS[request.url], self._state, request.body)
        self._add(key, custom_id, status, body)

    def _keeps(self, key: bytes) -> bool:
        """Whether an earlier run has answered the line."""
        if key not in self._results.finished:
            return False
        self._results.finished.remove(key)
        self.tally.kept += 1
        self._report(self.tally)
        return True

    def _add(
        self, key: bytes, custom_id: str | None, status: int, body: bytes, error: BatchError | None = None
    ) -> None:
        self._results.add(result(key, custom_id, status, body, error))
        self.tally.answered += 1
        self.tally.failed += status >= 400
        self._report(self.tally)
