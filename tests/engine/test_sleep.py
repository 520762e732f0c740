"""`LLM.sleep` and `wake_up` on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.test_llm import GREEDY, random_ids, run
from tokenspeed.contracts.errors import (
    EngineAsleepError,
    EngineBusyError,
    EngineClosedError,
    ParameterError,
    UnsupportedError,
)
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM

SAMPLED = SamplingParams(temperature=1, seed=3, max_tokens=9, n=2)


def test_the_same_tokens_from_an_empty_cache(llm: LLM) -> None:
    prompts = random_ids(60, 21, 3, 40)
    before = run(llm, prompts, GREEDY), run(llm, prompts, SAMPLED)
    pages = llm.core.executor._arena.kv  # type: ignore[attr-defined]
    assert pages.any()
    assert llm.core.cache.num_cached_pages > 0
    llm.sleep(level=1)
    llm.sleep()
    assert llm.is_sleeping()
    assert llm.core.cache.num_cached_pages == 0
    assert not pages.any()
    with pytest.raises(EngineAsleepError, match="call wake_up first"):
        run(llm, prompts, GREEDY)
    with pytest.raises(EngineAsleepError):
        llm.stream({"prompt_token_ids": prompts[0]}, GREEDY)
    assert not llm.core.has_work
    llm.wake_up()
    llm.wake_up()
    assert not llm.is_sleeping()
    (output, *_) = llm.generate(prompt_token_ids=prompts, sampling_params=GREEDY, use_tqdm=False)
    assert output.num_cached_tokens == 0
    assert (run(llm, prompts, GREEDY), run(llm, prompts, SAMPLED)) == before


def test_a_stream_that_is_half_read_keeps_it_awake(llm: LLM) -> None:
    (prompt,) = random_ids(61, 30)
    wanted = run(llm, [prompt], GREEDY)
    streams = [llm.stream({"prompt_token_ids": prompt}, GREEDY) for _ in range(2)]
    next(streams[0])
    with pytest.raises(EngineBusyError, match="2 requests are under way: finish or abort them"):
        llm.sleep()
    assert not llm.is_sleeping()
    assert [list(stream)[-1][1].outputs[0].token_ids for stream in streams] == wanted * 2
    llm.sleep()
    llm.wake_up()


def test_a_stream_that_was_dropped_does_not(llm: LLM) -> None:
    stream = llm.stream({"prompt_token_ids": [1, 2, 3]}, GREEDY)
    next(stream)
    del stream
    llm.sleep()
    assert llm.is_sleeping()
    llm.wake_up()
    assert not llm.is_sleeping()


@pytest.mark.parametrize("level", [0, 2, None])
def test_other_levels_are_refused(llm: LLM, level: int) -> None:
    with pytest.raises(UnsupportedError, match=f"sleep level {level} is not supported, only 1"):
        llm.sleep(level)
    assert not llm.is_sleeping()


def test_tags_say_what_to_wake(llm: LLM) -> None:
    llm.sleep()
    with pytest.raises(ParameterError, match="tags must be of weights, kv_cache, got 'kv'"):
        llm.wake_up(tags=["weights", "kv"])
    llm.wake_up(tags=["weights"])
    assert llm.is_sleeping()
    llm.wake_up(tags=["kv_cache"])
    assert not llm.is_sleeping()


def test_who_was_closed_takes_nothing(tiny_path: Path) -> None:
    llm = LLM(str(tiny_path), dtype="float32")
    llm.sleep()
    llm.close()
    with pytest.raises(EngineClosedError, match="closed"):
        run(llm, [[1, 2]], GREEDY)
    llm.close()
