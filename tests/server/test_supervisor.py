"""Restarts of a fake engine, one after the other, and what requests and /health are told meanwhile."""

from __future__ import annotations

import asyncio
import gc
import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from tests.server.fake_engine import FakeEngine
from tokenspeed.contracts.errors import EngineDeadError, MemoryLimitError, ModelNotFoundError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.server.engine import Engine, Progress
from tokenspeed.server.errors import ApiError
from tokenspeed.server.outage import HEALTHY_S, WINDOW_S, RestartPolicy
from tokenspeed.server.state import ServerState
from tokenspeed.server.supervisor import LEAST_LOAD_LIMIT_S, LOAD_SLACK, Supervisor

DEATH = EngineDeadError("the engine process ended with status 7")


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    yield
    gc.unfreeze()


class Engines:
    """Starts engines; one for each entry: an engine, an error, an integer: progress that is never more, or seconds
    after which there is an engine."""

    def __init__(self, *entries: FakeEngine | Exception | float) -> None:
        self.entries = list(entries)
        self.ended: list[int] = []
        """Loads that hung and were cancelled."""

    async def start(self, progress: Progress) -> Engine:
        entry = self.entries.pop(0)
        if isinstance(entry, Exception):
            raise entry
        if isinstance(entry, int):
            progress(entry, 100)
            try:
                await asyncio.sleep(600)
            finally:
                self.ended.append(entry)
        if isinstance(entry, float):
            await asyncio.sleep(entry)
            return FakeEngine()
        assert isinstance(entry, FakeEngine)
        return entry


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.001)


def supervised(
    engines: Engines,
    limit: int,
    test: Callable[[ServerState, asyncio.Task[None]], Awaitable[Any]],
    least_load_limit_s: float = LEAST_LOAD_LIMIT_S,
) -> None:
    """Run a test beside a supervisor with short delays."""

    async def main() -> None:
        state = ServerState()
        supervisor = Supervisor(state, engines.start, RestartPolicy(limit, 0.002), least_load_limit_s)
        running = asyncio.create_task(supervisor.run())
        try:
            await test(state, running)
        finally:
            running.cancel()
            await asyncio.wait({running})

    asyncio.run(main())


def refusal(state: ServerState) -> tuple[int, str | None, str]:
    with pytest.raises(ApiError) as caught:
        state.ready()
    return caught.value.status, caught.value.code, caught.value.message


def test_a_dead_engine_is_replaced() -> None:
    first, second = FakeEngine(held_after=1), FakeEngine()

    async def test(state: ServerState, running: asyncio.Task[None]) -> None:
        await until(lambda: state.engine is first)
        stream = first.submit([65], SamplingParams(max_tokens=5), request_id="r")
        await anext(stream)
        first.die(DEATH)
        with pytest.raises(EngineDeadError, match="status 7"):
            async for _ in stream:
                pass
        await until(lambda: state.engine is second)
        assert state.health() == (True, "idle")
        assert state.ready() is second
        assert first.killed == str(DEATH)
        assert state.metrics.engine_restarts == 1

    supervised(Engines(first, second), 5, test)


def test_requests_of_a_stuck_engine_are_told_so() -> None:
    first, second = FakeEngine(held_after=0), FakeEngine()

    async def test(state: ServerState, running: asyncio.Task[None]) -> None:
        await until(lambda: state.engine is first)
        stream = first.submit([65], SamplingParams(max_tokens=5), request_id="r")
        first.hang("the engine is stuck: no step finished for 61 s")
        with pytest.raises(EngineDeadError, match="stuck: no step finished for 61 s"):
            await anext(stream)
        await until(lambda: state.engine is second)

    supervised(Engines(first, second), 5, test)


def test_what_is_told_until_the_next_one_is_loaded() -> None:
    first = FakeEngine()

    async def test(state: ServerState, running: asyncio.Task[None]) -> None:
        await until(lambda: state.engine is first)
        first.die(DEATH)
        await until(lambda: "40%" in state.health()[1])
        told = f"{DEATH}; restart 1 of at most 3 in 10 min: loading the model: 40% (it may take 60 s)"
        assert state.health() == (False, told)
        assert refusal(state) == (503, "restarting", told)
        with pytest.raises(ApiError, match="restart 1"):
            _ = state.tokenizer
        state.draining = True
        assert state.health() == (False, "shutting down")

    supervised(Engines(first, 40), 3, test)


def test_starts_that_fail_are_counted_until_no_more_is_tried() -> None:
    engines = Engines(FakeEngine(), MemoryLimitError("too little"), OSError("no process"), FakeEngine(), FakeEngine())

    async def test(state: ServerState, running: asyncio.Task[None]) -> None:
        await until(lambda: state.engine is not None)
        first = state.engine
        assert isinstance(first, FakeEngine)
        first.die(DEATH)
        await until(lambda: state.engine not in (None, first))
        third = state.engine
        assert isinstance(third, FakeEngine)
        third.die(EngineDeadError("again"))
        await running
        ok, reason = state.health()
        assert not ok
        assert "again" in reason
        assert "--max-engine-restarts allows 3" in reason
        assert refusal(state) == (503, "engine_dead", reason)
        assert len(engines.entries) == 1

    supervised(engines, 3, test)


def test_a_load_that_hangs_is_ended_and_counts_as_a_failed_restart(caplog: pytest.LogCaptureFixture) -> None:
    engines = Engines(FakeEngine(), 40, TimeoutError("of its own"), 70, FakeEngine())

    async def test(state: ServerState, running: asyncio.Task[None]) -> None:
        await until(lambda: state.engine is not None)
        assert isinstance(state.engine, FakeEngine)
        state.engine.die(DEATH)
        async with asyncio.timeout(20):
            await running
        took = re.compile(r"restart (\d) of at most 3 in 10 min failed: (.*) longer than \d+ s, and was ended")
        failures = [took.sub(r"\1 took", text) for text in caplog.messages if "failed:" in text]
        assert failures == ["1 took", "restart 2 of at most 3 in 10 min failed: of its own", "3 took"]
        ok, reason = state.health()
        assert not ok
        assert re.match(r"a restart failed: the load took longer than \d+ s, and was ended; not restarted: 3 r", reason)
        assert engines.ended == [40, 70]
        assert len(engines.entries) == 1

    supervised(engines, 3, test, least_load_limit_s=0.02)


def test_a_restart_may_take_a_multiple_of_the_first_load() -> None:
    first_load_s = 0.05
    engines = Engines(first_load_s, 40)

    async def test(state: ServerState, running: asyncio.Task[None]) -> None:
        await until(lambda: state.engine is not None)
        assert isinstance(state.engine, FakeEngine)
        state.engine.die(DEATH)
        await until(lambda: state.outage is not None and state.outage.limit_s is not None)
        assert state.outage is not None
        assert state.outage.limit_s is not None
        assert state.outage.limit_s >= 0.9 * LOAD_SLACK * first_load_s

    supervised(engines, 3, test, least_load_limit_s=0.02)


def test_the_first_load_is_not_tried_again() -> None:
    async def test(state: ServerState, running: asyncio.Task[None]) -> None:
        with pytest.raises(ModelNotFoundError):
            await running

    supervised(Engines(ModelNotFoundError("nowhere"), FakeEngine()), 5, test)


def test_counters_go_on_and_gauges_fall() -> None:
    first, second = FakeEngine(), FakeEngine()

    async def test(state: ServerState, running: asyncio.Task[None]) -> None:
        await until(lambda: state.engine is first)
        assert b'num_preemptions_total{model_name="fake"} 4.0' in state.metrics.render()
        first.die(DEATH)
        await until(lambda: state.outage is not None)
        assert b'num_requests_waiting{model_name="fake"} 0.0' in state.metrics.render()
        assert b'num_preemptions_total{model_name="fake"} 4.0' in state.metrics.render()
        await until(lambda: state.engine is second)
        assert b'num_preemptions_total{model_name="fake"} 8.0' in state.metrics.render()
        assert b'device_idle_seconds_total{model_name="fake"} 2.5' in state.metrics.render()
        assert b'step_time_seconds_sum{model_name="fake"} 15.0' in state.metrics.render()
        assert b'engine_restarts_total{model_name="fake"} 1.0' in state.metrics.render()

    supervised(Engines(first, second), 5, test)


def test_delays_double_and_begin_again_after_a_minute_of_health() -> None:
    policy = RestartPolicy(100)
    assert [policy.next_delay(0.0, 3.0) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert policy.next_delay(0.0, HEALTHY_S - 1) == 60
    assert [policy.next_delay(0.0, lived) for lived in (HEALTHY_S, 0.0, 0.0)] == [1, 2, 4]


def test_restarts_are_counted_over_ten_minutes() -> None:
    policy = RestartPolicy(2)
    assert policy.next_delay(0.0, 0.0) == 1
    assert policy.next_delay(100.0, 0.0) == 2
    assert policy.next_delay(WINDOW_S - 1, 0.0) is None
    assert policy.next_delay(WINDOW_S, 0.0) == 4
    assert policy.next_delay(WINDOW_S, 0.0) is None
    assert RestartPolicy(0).next_delay(0.0, 0.0) is None
