"""`AsyncEngine` and a real model in `python -m tokenspeed.engine.core`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.engine.async_tools import deltas, importable, read, run, until
from tests.engine.test_llm import random_ids
from tests.tiny_llama import CONTEXT, VOCAB
from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import MemoryLimitError, PromptError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.async_engine import AsyncEngine
from tokenspeed.engine.llm import LLM

__all__ = ["importable"]


def config(path: Path, **settings: object) -> EngineConfig:
    """As the fixture `llm` has it."""
    made = {"model": str(path), "dtype": "float32", "max_num_batched_tokens": 16, "block_size": 4}
    return EngineConfig.from_kwargs(made | settings)


def test_the_same_greedy_tokens_as_in_this_process(llm: LLM, tiny_path: Path) -> None:
    prompts = random_ids(50, 3, 21, 40, 1)
    params = SamplingParams(temperature=0, max_tokens=20)
    expected = [
        output.outputs[0].token_ids
        for output in llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
    ]

    async def main() -> None:
        seen: list[tuple[int, int]] = []
        engine = await AsyncEngine.start(config(tiny_path), progress=lambda done, total: seen.append((done, total)))
        try:
            assert seen[-1][0] == seen[-1][1] > 0
            assert (engine.info.model, engine.info.vocab_size) == (str(tiny_path), VOCAB)
            assert engine.info.max_model_len == CONTEXT
            assert engine.tokenizer is None
            leaving = engine.submit(prompts[0], deltas(100, temperature=0))
            streams = [engine.submit(prompt, deltas(20, temperature=0)) for prompt in prompts]
            await anext(leaving)
            del leaving
            found = await asyncio.gather(*(read(stream) for stream in streams))
            assert list(found) == expected
            assert all(stream.output.finished for stream in streams)
            with pytest.raises(PromptError, match="no tokenizer"):
                engine.submit("text", deltas())
            await until(lambda: engine.health() == (True, "idle"))
            # Nothing is left of any of them: a request for the whole context still fits.
            assert len(await read(engine.submit([1] * (CONTEXT - 2), deltas(2, temperature=0, ignore_eos=True)))) == 2
        finally:
            await engine.close()

    run(main())


def test_samples_of_one_prompt_repeat_under_a_seed(tiny_path: Path) -> None:
    async def main() -> None:
        engine = await AsyncEngine.start(config(tiny_path))
        try:
            params = deltas(12, n=3, seed=5, ignore_eos=True)
            (prompt,) = random_ids(51, 9)
            found = []
            for _ in range(2):
                stream = engine.submit(prompt, params)
                await read(stream)
                found.append([completion.token_ids for completion in stream.output.outputs])
            assert found[0] == found[1]
            assert len({tuple(ids) for ids in found[0]}) == 3
        finally:
            await engine.close()

    run(main())


def test_an_error_of_the_start_keeps_its_class(tiny_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(MemoryLimitError, match="--kv-cache-memory-bytes"):
            await AsyncEngine.start(config(tiny_path, kv_cache_memory_bytes=1 << 60))

    run(main())
