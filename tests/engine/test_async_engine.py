"""Streams of an engine in its own process, with a core that needs no model."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from tests.engine.async_tools import alive, deltas, fake_engine, importable, read, run, until, write_byte_tokenizer
from tests.engine.fake_core import MAX_MODEL_LEN, REFUSED, VOCAB_SIZE, said
from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import EngineClosedError, MemoryLimitError, ParameterError, PromptError
from tokenspeed.contracts.sampling import RequestOutputKind, SamplingParams
from tokenspeed.engine.async_engine import AsyncEngine
from tokenspeed.tokenizer.detokenizer import IncrementalDetokenizer

__all__ = ["importable"]
FOREVER = 10**6


def test_one_request_from_start_to_end() -> None:
    async def main() -> None:
        seen: list[tuple[int, int]] = []
        async with fake_engine(progress=lambda done, total: seen.append((done, total))) as engine:
            assert seen == [(1, 3), (2, 3), (3, 3)]
            assert (engine.info.model, engine.info.max_model_len) == ("fake", MAX_MODEL_LEN)
            assert engine.tokenizer is None
            assert engine.default_sampling_params() == SamplingParams(temperature=0.5)
            assert engine.health() == (True, "idle")
            stream = engine.submit([5, 6, 7], deltas(8), request_id="mine")
            outputs = [output async for output in stream]
            assert {output.request_id for output in outputs} == {"mine"}
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
            assert [token for output in outputs for token in output.outputs[0].token_ids] == said([5, 6, 7], 0, 8)
            assert stream.output.outputs[0].finish_reason == "length"
            await until(lambda: engine.health() == (True, "idle"))
            assert engine.stats() == {"aborts": 0, "steps": 8, "added": 1, "running": 0}

    run(main())


@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY])
def test_the_other_kinds_of_output(kind: RequestOutputKind) -> None:
    async def main() -> list[int]:
        async with fake_engine(step_s=0.002) as engine:
            params = SamplingParams(max_tokens=8, output_kind=kind)
            return [len(output.outputs[0].token_ids) async for output in engine.submit([5, 6, 7], params)]

    counts = run(main())
    assert counts[-1] == 8
    assert counts == sorted(counts)
    assert (len(counts) > 1) == (kind is RequestOutputKind.CUMULATIVE)


def test_256_streams_at_once_are_complete_and_in_order() -> None:
    async def main() -> None:
        async with fake_engine() as engine:
            prompts = [[20 + number % 200, 1, number % 250, 3] for number in range(256)]
            found = await asyncio.gather(*(read(engine.submit(prompt, deltas(60))) for prompt in prompts))
            assert found == [said(prompt, 0, 60) for prompt in prompts]
            await until(lambda: engine.stats()["running"] == 0)
            assert engine.stats()["aborts"] == 0

    run(main())


@pytest.mark.slow
def test_256_streams_of_a_real_scheduler_and_half_of_them_leave() -> None:
    async def stay(engine: AsyncEngine, number: int) -> None:
        prompt = [number] * (1 + number % 50)
        found = await read(engine.submit(prompt, deltas(60, ignore_eos=True)))
        assert found == [position % VOCAB_SIZE for position in range(len(prompt), len(prompt) + 60)]

    async def leave(engine: AsyncEngine, number: int) -> None:
        stream = engine.submit([number] * (1 + number % 50), deltas(3000, ignore_eos=True))
        for _ in range(number % 5):
            await anext(stream, None)  # a reader that was kept waiting finds everything in one output

    async def main() -> None:
        config = EngineConfig(max_num_seqs=100, max_num_batched_tokens=256)
        async with fake_engine("null", config=config) as engine:
            await asyncio.gather(*((leave if number % 2 else stay)(engine, number) for number in range(256)))
            await until(lambda: engine.health() == (True, "idle"))
            stats = engine.stats()
            assert stats["pages_held"] == stats["num_running"] == stats["num_waiting"] == 0
            assert stats["pages_available"] == stats["pages_total"] > 0

    run(main())


def test_one_client_leaves_and_another_goes_on() -> None:
    async def main() -> None:
        async with fake_engine(step_s=0.001) as engine:
            staying = engine.submit([1, 2, 3], deltas(FOREVER))
            async for _ in engine.submit([7, 8, 9], deltas(FOREVER)):
                break
            await until(lambda: engine.stats().get("aborts") == 1)
            assert engine.stats()["running"] == 1
            assert engine.health() == (True, "running")
            ids = [token for _ in range(5) for token in (await anext(staying)).outputs[0].token_ids]
            assert ids == said([1, 2, 3], 0, len(ids))
            assert not staying.output.finished

    run(main())


async def _cancel(engine: AsyncEngine) -> None:
    stream = engine.submit([1, 2], deltas(FOREVER))
    task = asyncio.create_task(read(stream))
    await until(lambda: engine.stats().get("running") == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: engine.stats().get("aborts") == 1)
    assert stream.output.outputs[0].finish_reason == "abort"


async def _close(engine: AsyncEngine) -> None:
    async with aclosing(engine.submit([1, 2], deltas(FOREVER))) as stream:
        await anext(stream)


async def _drop(engine: AsyncEngine) -> None:
    stream = engine.submit([1, 2], deltas(FOREVER))
    await anext(stream)
    cycle: list[object] = [stream]
    cycle.append(cycle)
    del stream, cycle
    await asyncio.to_thread(gc.collect)


async def _never_read(engine: AsyncEngine) -> None:
    engine.submit([1, 2], deltas(FOREVER))


@pytest.mark.parametrize("leave", [_cancel, _close, _drop, _never_read])
def test_leaving_a_stream_aborts_its_request(leave: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    async def main() -> None:
        async with fake_engine(step_s=0.001) as engine:
            await leave(engine)
            await until(lambda: engine.stats().get("aborts") == 1)
            await until(lambda: engine.health() == (True, "idle"))
            assert engine.stats()["running"] == 0

    run(main())


def test_abort_gives_a_last_output_to_the_reader() -> None:
    async def main() -> None:
        async with fake_engine(step_s=0.001) as engine:
            stream = engine.submit([1, 2, 3], deltas(FOREVER, n=2))
            first = await anext(stream)
            stream.abort()
            stream.abort()
            (last,) = [output async for output in stream]
            assert last.finished
            assert {completion.index: completion.finish_reason for completion in last.outputs} == {
                0: "abort",
                1: "abort",
            }
            ids = [token for output in (first, last) for found in output.outputs[:1] for token in found.token_ids]
            assert ids == said([1, 2, 3], 0, len(ids))
            await until(lambda: engine.stats().get("aborts") == 2)

    run(main())


def test_an_id_may_come_again_at_once() -> None:
    async def main() -> None:
        async with fake_engine(step_s=0.001) as engine:
            for round_ in range(20):
                stream = engine.submit([50 + round_, 2, 3], deltas(FOREVER), request_id="same")
                ids = (await anext(stream)).outputs[0].token_ids
                stream.abort()
                assert ids == said([50 + round_, 2, 3], 0, len(ids))

    run(main())


def test_a_slow_reader_gets_many_steps_in_one_output() -> None:
    async def main() -> None:
        async with fake_engine() as engine:
            stream = engine.submit([3, 4, 5], deltas(500, n=2))
            first = await anext(stream)
            await until(lambda: stream.output.finished)
            (rest,) = [output async for output in stream]
            assert rest.finished
            for index in (0, 1):
                parts = [found for output in (first, rest) for found in output.outputs if found.index == index]
                assert [token for part in parts for token in part.token_ids] == said([3, 4, 5], index, 500)
                assert parts[-1].finish_reason == "length"
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    run(main())


def test_several_samples() -> None:
    async def main() -> None:
        async with fake_engine() as engine:
            streams = [engine.submit([3, 4, 5, 6], deltas(9, n=3)) for _ in range(3)]
            found = await asyncio.gather(*(read(stream, index) for index, stream in enumerate(streams)))
            assert found == [said([3, 4, 5, 6], index, 9) for index in range(3)]

    run(main())


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_across_steps_end_samples_in_the_engine(tmp_path: Path, include: bool) -> None:
    async def main() -> None:
        config = EngineConfig(model=str(write_byte_tokenizer(tmp_path)))
        async with fake_engine(step_s=0.001, config=config) as engine:
            params = deltas(FOREVER, n=2, stop=["cätch"], include_stop_str_in_output=include)
            stream = engine.submit("un cat, cätch", params)
            texts = ["", ""]
            async for output in stream:
                for completion in output.outputs:
                    texts[completion.index] += completion.text
            end = "cätch" if include else ""
            assert texts == ["un cat, " + end, "n cat, " + end]
            for completion in stream.output.outputs:
                assert (completion.finish_reason, completion.stop_reason) == ("stop", "cätch")
            assert len(stream.output.outputs[1].token_ids) == len("n cat, cätch".encode())
            await until(lambda: engine.stats().get("aborts") == 2)
            assert engine.stats()["running"] == 0
            assert engine.health().reason == "idle"

    run(main())


def test_text_that_cannot_be_made_costs_one_request_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of a tokenizer ends the request it befalls with that bug, and the others of the same step go on."""
    cursed, push = 256 + 20, IncrementalDetokenizer.push

    def push_or_fail(self: IncrementalDetokenizer, ids: list[int]) -> str:
        if ids in ([cursed], []):
            raise ZeroDivisionError("no such text")
        return push(self, ids)

    monkeypatch.setattr(IncrementalDetokenizer, "push", push_or_fail)

    async def main() -> None:
        config = EngineConfig(model=str(write_byte_tokenizer(tmp_path)))
        async with fake_engine(step_s=0.001, config=config) as engine:
            doomed = engine.submit([70, 71, cursed], deltas(FOREVER))
            others = [asyncio.create_task(read(engine.submit([number, 72], deltas(60)))) for number in (60, 61, 62)]
            with pytest.raises(ZeroDivisionError, match="no such text"):
                await read(doomed)
            assert [completion.finish_reason for completion in doomed.output.outputs] == [None]
            assert await asyncio.gather(*others) == [said([number, 72], 0, 60) for number in (60, 61, 62)]
            await until(lambda: engine.health().reason == "idle")
            assert engine.stats()["aborts"] == 1

    run(main())


def test_what_is_refused_before_it_is_sent() -> None:
    async def main() -> None:
        async with fake_engine() as engine:
            bad: list[Any] = [[], "", "text", [1, VOCAB_SIZE], [-1], [True], [2.0], [1] * MAX_MODEL_LEN]
            for prompt in bad:
                with pytest.raises(PromptError):
                    engine.submit(prompt, deltas())
            for fields in ({"stop_token_ids": [VOCAB_SIZE]}, {"stop": ["x"]}, {"logit_bias": {VOCAB_SIZE + 1: 1.0}}):
                with pytest.raises(ParameterError):
                    engine.submit([1], deltas(**fields))
            assert len(await read(engine.submit([1] * (MAX_MODEL_LEN - 1), deltas(2)))) == 2
            await until(lambda: engine.health().reason == "idle")
            assert engine.stats()["added"] == 1

    run(main())


def test_what_the_engine_refuses_leaves_others_alone() -> None:
    async def main() -> None:
        async with fake_engine(step_s=0.001) as engine:
            others = [asyncio.create_task(read(engine.submit([number, 2], deltas(50)))) for number in (1, 2)]
            with pytest.raises(MemoryLimitError, match="13 brings bad luck, at most 12 are allowed"):
                await read(engine.submit([REFUSED], deltas()))
            assert await asyncio.gather(*others) == [said([1, 2], 0, 50), said([2, 2], 0, 50)]
            assert engine.health().ok

    run(main())


def test_drain_finishes_what_runs_and_takes_nothing_new() -> None:
    async def main() -> None:
        async with fake_engine(step_s=0.001) as engine:
            running = asyncio.create_task(read(engine.submit([1, 2], deltas(60))))
            await asyncio.sleep(0)
            draining = asyncio.create_task(engine.drain(timeout=20))
            await asyncio.sleep(0)
            with pytest.raises(EngineClosedError, match="draining"):
                engine.submit([1], deltas())
            assert await draining == 0
            assert await running == said([1, 2], 0, 60)

    run(main())


def test_drain_aborts_what_does_not_finish_in_time() -> None:
    async def main() -> None:
        async with fake_engine(step_s=0.001) as engine:
            streams = [engine.submit([1, 2], deltas(FOREVER)) for _ in range(3)]
            assert await engine.drain(timeout=0.05) == 3
            for stream in streams:
                (output,) = [output async for output in stream]
                assert (output.finished, output.outputs[0].finish_reason) == (True, "abort")
            await until(lambda: engine.stats().get("aborts") == 3)
            assert await engine.drain(timeout=0) == 0

    run(main())


def test_close_ends_streams_and_process() -> None:
    async def main() -> None:
        async with fake_engine(step_s=0.001) as engine:
            assert engine.pid is not None
            stream = engine.submit([1, 2], deltas(FOREVER))
            await anext(stream)
            assert alive(engine.pid)
            await engine.close()
            assert not alive(engine.pid)
            with pytest.raises(EngineClosedError, match="closed"):
                await read(stream)
            with pytest.raises(EngineClosedError, match="closed"):
                engine.submit([1], deltas())
            assert not engine.health().ok
            await engine.close()

    run(main())


def test_requests_without_a_seed_repeat_under_a_configured_one() -> None:
    async def seeds(seed: int | None) -> list[int]:
        async with fake_engine(config=EngineConfig(seed=seed)) as engine:
            made = [engine._intake.request(str(i), [1], deltas(), 0, "") for i in range(3)]
            named = engine._intake.request("x", [1], deltas(seed=7), 0, "")
            assert named.seed == 7
            return [request.seed for request in made]

    assert run(seeds(1)) == run(seeds(1)) != run(seeds(2))
    assert len(set(run(seeds(None)))) == 3
