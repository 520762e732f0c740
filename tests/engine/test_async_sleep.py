"""Sleep and waking across the two processes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.engine.async_tools import deltas, fake_engine, importable, read, run, until
from tests.engine.fake_core import said
from tests.engine.test_async_model import config
from tests.engine.test_llm import random_ids
from tokenspeed.contracts.errors import (
    EngineAsleepError,
    EngineClosedError,
    EngineDeadError,
    MemoryLimitError,
    ParameterError,
    UnsupportedError,
)
from tokenspeed.engine.async_engine import AsyncEngine

__all__ = ["importable"]
FOREVER = 10**6


def test_requests_under_way_are_finished_first() -> None:
    async def main() -> None:
        async with fake_engine(step_s=0.005) as engine:
            stream = engine.submit([5, 6, 7], deltas(30))
            running = asyncio.create_task(read(stream))
            await until(lambda: bool(stream.output.outputs[0].token_ids))
            sleeping = asyncio.create_task(engine.sleep())
            await asyncio.sleep(0)
            with pytest.raises(EngineAsleepError, match="wake_up"):
                engine.submit([1], deltas(2))
            assert not sleeping.done()
            assert await sleeping == 0
            assert await running == said([5, 6, 7], 0, 30)
            assert engine.is_sleeping()
            await until(lambda: engine.health() == (True, "asleep"))
            assert await engine.sleep() == 0
            await engine.wake_up(tags=["weights"])
            assert engine.is_sleeping()
            await engine.wake_up()
            await engine.wake_up()
            assert not engine.is_sleeping()
            assert await read(engine.submit([8, 9], deltas(5))) == said([8, 9], 0, 5)

    run(main())


def test_those_that_take_too_long_are_aborted() -> None:
    async def main() -> None:
        async with fake_engine(step_s=0.001) as engine:
            streams = [engine.submit([7, 8], deltas(FOREVER)) for _ in range(3)]
            await until(lambda: engine.stats().get("running") == 3)
            assert await engine.sleep(timeout=0.05) == 3
            for stream in streams:
                await read(stream)
                assert stream.output.outputs[0].finish_reason == "abort"
            await engine.wake_up()
            assert await read(engine.submit([8, 9], deltas(5))) == said([8, 9], 0, 5)

    run(main())


def test_many_at_once_take_turns() -> None:
    async def main() -> None:
        async with fake_engine(step_s=0.001) as engine:
            await asyncio.gather(*((engine.wake_up if at % 2 else engine.sleep)() for at in range(10)))
            assert not engine.is_sleeping()
            assert await read(engine.submit([8, 9], deltas(5))) == said([8, 9], 0, 5)

    run(main())


def test_who_stops_waiting_changes_nothing() -> None:
    async def main() -> None:
        async with fake_engine(step_s=0.05) as engine:
            endless = engine.submit([7, 8], deltas(FOREVER))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(engine.sleep(), 0.1)
            assert not engine.is_sleeping()  # it had not told the engine yet
            endless.abort()
            sleeping = asyncio.create_task(engine.sleep())
            await asyncio.sleep(0.02)  # its message is on the way, the answer is not
            sleeping.cancel()
            assert engine.is_sleeping()
            await engine.wake_up()
            assert not engine.is_sleeping()
            assert await read(engine.submit([8, 9], deltas(5))) == said([8, 9], 0, 5)

    run(main())


def test_what_cannot_be_asked_for_changes_nothing() -> None:
    async def main() -> None:
        async with fake_engine() as engine:
            with pytest.raises(UnsupportedError, match="level 2"):
                await engine.sleep(2)
            with pytest.raises(ParameterError, match="'all'"):
                await engine.wake_up(tags=["all"])
            assert not engine.is_sleeping()
        with pytest.raises(EngineClosedError):
            await engine.sleep()
        with pytest.raises(EngineClosedError):
            await engine.wake_up()

    run(main())


def test_refusals_of_the_engine_keep_their_class() -> None:
    async def main() -> None:
        async with fake_engine("no-sleep") as engine:
            with pytest.raises(UnsupportedError, match="no bed"):
                await engine.sleep()
            assert not engine.is_sleeping()
            assert await read(engine.submit([8, 9], deltas(5))) == said([8, 9], 0, 5)
        async with fake_engine("no-wake") as engine:
            await engine.sleep()
            with pytest.raises(MemoryLimitError, match="somebody else"):
                await engine.wake_up()
            assert engine.is_sleeping()

    run(main())


def test_an_engine_that_dies_of_it() -> None:
    async def main() -> None:
        async with fake_engine("exit-on-wake") as engine:
            await engine.sleep()
            with pytest.raises(EngineDeadError, match="ended with status 7"):
                await engine.wake_up()
            with pytest.raises(EngineDeadError):
                engine.submit([1], deltas(1))

    run(main())


def test_closing_ends_the_wait() -> None:
    async def main() -> None:
        async with fake_engine(step_s=5.0) as engine:
            sleeping = asyncio.create_task(engine.sleep())
            await asyncio.sleep(0.1)
            await engine.close(timeout=0)
            with pytest.raises(EngineClosedError):
                await sleeping

    run(main())


def test_a_real_model(tiny_path: Path) -> None:
    async def main() -> None:
        engine = await AsyncEngine.start(config(tiny_path))
        try:
            prompts = random_ids(62, 30, 7)
            found = []
            for _ in range(2):
                streams = [engine.submit(prompt, deltas(9, temperature=0)) for prompt in prompts]
                found.append(await asyncio.gather(*map(read, streams)))
                assert {stream.output.num_cached_tokens for stream in streams} == {0}
                assert await engine.sleep() == 0
                await until(lambda: engine.stats()["pages_cached"] == 0)
                await engine.wake_up()
            assert found[0] == found[1]
        finally:
            await engine.close()

    run(main())
