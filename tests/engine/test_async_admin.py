"""Pausing, resetting the prefix cache and profiling, across the two processes."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial

import pytest

from tests.engine.async_tools import deltas, fake_engine, importable, read, run, until
from tests.engine.fake_core import said
from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import EngineBusyError, EngineClosedError, EngineDeadError
from tokenspeed.engine.async_engine import AsyncEngine

__all__ = ["importable"]
FOREVER = 10**6


def test_a_pause_holds_new_requests_and_lets_the_others_go_on() -> None:
    async def main() -> None:
        async with fake_engine(step_s=0.001) as engine:
            running = engine.submit([1, 2, 3], deltas(60))
            await anext(running)
            engine.pause()
            held = [engine.submit([number, 9], deltas(4, n=2)) for number in (5, 6, 7)]
            reading = [asyncio.create_task(read(stream)) for stream in held]
            assert engine.stats()["num_waiting"] == 6
            held[1].abort()
            assert engine.stats()["num_waiting"] == 4
            await read(running)
            assert running.output.outputs[0].token_ids == said([1, 2, 3], 0, 60)
            await until(lambda: engine.health() == (True, "paused"))
            assert engine.stats()["added"] == 1
            assert not reading[0].done()
            assert engine.is_paused()
            engine.resume()
            assert not engine.is_paused()
            assert await reading[0] == said([5, 9], 0, 4)
            assert await reading[1] == []
            assert await reading[2] == said([7, 9], 0, 4)
            await until(lambda: engine.health() == (True, "idle"))
            assert engine.stats()["added"] == 3
            assert engine.stats()["aborts"] == 0, "the engine never knew the one that was aborted"
            assert await read(engine.submit([8], deltas(2))) == [8, 8]

    run(main())


def test_what_a_pause_holds_does_not_hold_up_a_drain() -> None:
    async def main() -> None:
        async with fake_engine(step_s=0.001) as engine:
            engine.pause()
            stream = engine.submit([5], deltas(4))
            assert await engine.drain(timeout=600) == 1
            assert [output.outputs[0].finish_reason async for output in stream] == ["abort"]
            with pytest.raises(EngineClosedError):
                engine.resume()

    run(main())


def test_what_a_pause_holds_dies_with_the_engine() -> None:
    async def main() -> None:
        async with fake_engine() as engine:
            engine.pause()
            stream = engine.submit([5], deltas(4))
            profiling = asyncio.create_task(engine.profile(5, timeout=600))
            await asyncio.sleep(0)
            await engine.kill("it had to go")
            with pytest.raises(EngineDeadError, match="it had to go"):
                await anext(stream)
            with pytest.raises(EngineDeadError, match="it had to go"):
                await profiling
            with pytest.raises(EngineDeadError, match="it had to go"):
                engine.pause()

    run(main())


def test_unwell_tells_of_the_end() -> None:
    async def main() -> None:
        async with fake_engine() as engine:
            waiting = asyncio.create_task(engine.unwell())
            await read(engine.submit([5], deltas(4)))
            assert not waiting.done()
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            assert "SIGKILL" in await waiting

    run(main())


def has_hits(engine: AsyncEngine, hits: int) -> bool:
    return engine.stats().get("prefix_hit_tokens") == hits


def test_resetting_the_prefix_cache() -> None:
    async def main() -> None:
        async with fake_engine("null") as engine:
            prompt = list(range(64))
            for hits in (0, 48, 96):
                await read(engine.submit(prompt, deltas(1)))
                await until(partial(has_hits, engine, hits))
            await engine.reset_prefix_cache()
            await read(engine.submit(prompt, deltas(1)))
            await until(lambda: engine.stats()["prefix_queried_tokens"] == 256)
            assert engine.stats()["prefix_hit_tokens"] == 96
            stream = engine.submit([1], deltas(FOREVER))
            await anext(stream)
            with pytest.raises(EngineBusyError, match=r"1 requests are under way.*before the prefix cache is reset"):
                await engine.reset_prefix_cache()

    run(main())


def test_times_in_the_queue_and_of_steps() -> None:
    async def main() -> None:
        config = EngineConfig(max_num_seqs=1)
        async with fake_engine("null", config=config) as engine:
            long, short = engine.submit([1, 2], deltas(400)), engine.submit([3], deltas(2))
            gone = engine.submit([4], deltas(2))
            await anext(long)
            gone.abort()
            await read(short)
            queued = [stream.output.metrics.queue_s for stream in (long, short)]
            assert queued[0] is not None
            assert queued[1] is not None
            assert 0 <= queued[0] < queued[1]
            assert gone.output.metrics.queue_s is None
            engine.pause()
            held = engine.submit([3], deltas(2))
            await asyncio.sleep(0.05)
            engine.resume()
            await read(held)
            assert held.output.metrics.queue_s is not None
            assert held.output.metrics.queue_s >= 0.05
            await until(lambda: engine.health() == (True, "idle"))
            *counts, total = engine.step_times()
            assert sum(counts) >= 404
            assert total > 0

    run(main())


def test_a_profile_has_every_phase_of_every_step() -> None:
    async def main() -> None:
        async with fake_engine("null") as engine:
            profiling = asyncio.create_task(engine.profile(7, timeout=600))
            await asyncio.sleep(0)
            with pytest.raises(EngineBusyError, match="profile"):
                await engine.profile(1, timeout=1)
            assert engine.health() == (True, "running") or engine.health() == (True, "idle")
            await read(engine.submit([1, 2, 3], deltas(30)))
            spans = await profiling
            for name in ("schedule", "launch", "collect", "update", "send"):
                steps = [span.step_id for span in spans if span.name == name]
                assert steps[:7] == list(range(7)), name
            assert sum(span.name == "collect" for span in spans) == 7
            assert all(span.seconds >= 0 for span in spans)
            starts = [span.start for span in spans if span.name == "collect"]
            assert starts == sorted(starts)

    run(main())


def test_a_profile_of_an_idle_engine_ends_at_its_limit_and_another_may_follow() -> None:
    async def main() -> None:
        async with fake_engine("null") as engine:
            assert await engine.profile(5, timeout=0.01) == []
            cut = asyncio.create_task(engine.profile(5, timeout=600))
            await asyncio.sleep(0)
            cut.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cut
            profiling = asyncio.create_task(engine.profile(2, timeout=600))
            await asyncio.sleep(0)
            await read(engine.submit([1, 2, 3], deltas(9)))
            assert sum(span.name == "collect" for span in await profiling) == 2

    run(main())
