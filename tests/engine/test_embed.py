"""`LLM.embed`: the same vectors alone, beside others, in chunks and behind a cached prefix; what it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.engine.async_tools import deltas, fake_engine, importable, read, run
from tests.engine.test_async_model import config
from tests.engine.test_llm import random_ids
from tests.seeds import SEED
from tests.tiny_llama import CONTEXT, VOCAB
from tokenspeed.contracts.errors import ParameterError, PromptError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.contracts.step import Pooling
from tokenspeed.engine.async_engine import AsyncEngine
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.output import RequestMetrics, RequestOutput
from tokenspeed.engine.pooling import PooledOutput, embedding_of

__all__ = ["importable"]
WIDTH = 32
CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 2e-5}
"""Torch's products of other shapes add in another order."""
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
WAYS = ("last", "mean")


def vectors(llm: LLM, prompts: Sequence[list[int]], **settings: Any) -> npt.NDArray[np.float64]:
    outputs = llm.embed(prompts, use_tqdm=False, **settings)
    assert [output.prompt_token_ids for output in outputs] == list(prompts)
    return np.array([output.outputs.embedding for output in outputs])


@pytest.mark.parametrize("way", WAYS)
def test_alone_beside_others_and_in_chunks(llm: LLM, tiny_path: Path, way: str) -> None:
    prompts = random_ids(SEED, 1, 40, 3, 17, 100, 2, 16, 33)
    together = vectors(llm, prompts, pooling=way)
    assert together.shape == (len(prompts), WIDTH)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.01
    llm.core.cache.reset()
    alone = np.concatenate([vectors(llm, [prompt], pooling=way) for prompt in prompts])
    np.testing.assert_allclose(together, alone, **CLOSE)
    whole = LLM(str(tiny_path), dtype="float32", max_num_batched_tokens=512, block_size=16)
    np.testing.assert_allclose(vectors(whole, prompts, pooling=way), alone, **CLOSE)


def test_behind_a_cached_prefix(llm: LLM) -> None:
    (prompt,) = random_ids(SEED + 1, 41)
    fresh = {way: llm.embed(prompt, pooling=way, use_tqdm=False)[0] for way in WAYS}
    again = {way: llm.embed(prompt, pooling=way, use_tqdm=False)[0] for way in WAYS}
    assert [fresh[way].num_cached_tokens for way in WAYS] == [0, 0]
    assert [again[way].num_cached_tokens for way in WAYS] == [40, 0]
    for way in WAYS:
        np.testing.assert_allclose(again[way].outputs.embedding, fresh[way].outputs.embedding, **CLOSE)


def test_pages_of_an_embedding_serve_a_completion(llm: LLM) -> None:
    (prompt,) = random_ids(SEED + 2, 30)
    (fresh,) = llm.generate(prompt_token_ids=[prompt], sampling_params=GREEDY, use_tqdm=False)
    llm.core.cache.reset()
    for way in WAYS:
        llm.embed(prompt, pooling=way, use_tqdm=False)
    (output,) = llm.generate(prompt_token_ids=[prompt], sampling_params=GREEDY, use_tqdm=False)
    assert output.num_cached_tokens == 28
    assert output.outputs[0].token_ids == fresh.outputs[0].token_ids


def test_mean_is_the_mean_of_every_prefix_s_last(llm: LLM) -> None:
    """Attention is causal: a token's state does not depend on what follows."""
    (prompt,) = random_ids(SEED + 3, 19)
    lasts = vectors(llm, [prompt[: n + 1] for n in range(len(prompt))], normalize=False)
    mean = vectors(llm, [prompt], pooling="mean", normalize=False)
    np.testing.assert_allclose(mean[0], lasts.mean(0), **CLOSE)


@pytest.mark.parametrize("dimensions", [1, 7, WIDTH])
@pytest.mark.parametrize("way", WAYS)
def test_dimensions(llm: LLM, way: str, dimensions: int) -> None:
    prompts = random_ids(SEED + 4, 9, 22)
    whole = vectors(llm, prompts, pooling=way, normalize=False)
    cut = vectors(llm, prompts, pooling=way, normalize=False, dimensions=dimensions)
    np.testing.assert_allclose(cut, whole[:, :dimensions], **CLOSE)
    normal = vectors(llm, prompts, pooling=way, dimensions=dimensions)
    np.testing.assert_allclose(normal, cut / np.linalg.norm(cut, axis=1, keepdims=True), **CLOSE)


def test_a_vector_without_length_stays() -> None:
    output = RequestOutput("a", None, [1], [], RequestMetrics(0.0), pooled=np.zeros(3, np.float32))
    assert embedding_of(output, normalize=True, dimensions=None).tolist() == [0, 0, 0]
    assert PooledOutput.of(output, 5).prompt_token_ids == [1]


def test_a_prompt_may_fill_the_context(llm: LLM) -> None:
    (prompt,) = random_ids(SEED + 5, CONTEXT)
    assert vectors(llm, [prompt]).shape == (1, WIDTH)


@pytest.mark.parametrize(
    "prompts, settings, error, message",
    [
        ([0] * (CONTEXT + 1), {}, PromptError, f"{CONTEXT + 1} tokens, max_model_len {CONTEXT} allows no more"),
        ([], {}, None, ""),
        ([[]], {}, PromptError, "empty"),
        ([VOCAB], {}, PromptError, f"{VOCAB} is not in the vocabulary"),
        ("text", {}, PromptError, "no tokenizer"),
        ([1], {"pooling": "max"}, ParameterError, "pooling must be one of last, mean, got 'max'"),
        ([1], {"dimensions": 0}, ParameterError, f"dimensions must be from 1 to {WIDTH}"),
        ([1], {"dimensions": WIDTH + 1}, ParameterError, f"to {WIDTH}, those of this model, got {WIDTH + 1}"),
        ([1], {"dimensions": True}, ParameterError, "dimensions"),
    ],
)
def test_refusals(llm: LLM, prompts: Any, settings: Any, error: type[Exception] | None, message: str) -> None:
    if error is None:
        assert llm.embed(prompts, use_tqdm=False) == []
        return
    with pytest.raises(error, match=message):
        llm.embed(prompts, use_tqdm=False, **settings)
    assert not llm.core.has_work


def test_what_needs_another_head(llm: LLM) -> None:
    with pytest.raises(ParameterError, match="has a language head: it scores tokens that are named"):
        llm.classify([[1, 2]], use_tqdm=False)
    with pytest.raises(PromptError, match="no tokenizer"):
        llm.score("query", ["document"])


def test_beside_completions_in_another_process(llm: LLM, tiny_path: Path) -> None:
    prompts = random_ids(SEED + 6, 30, 7, 18, 45)
    asked = [Pooling("embedding"), Pooling("embedding", mean=True)] * 2
    wanted = [
        vectors(llm, [p], pooling=WAYS[ask.mean], normalize=False)[0] for p, ask in zip(prompts, asked, strict=True)
    ]
    said = llm.generate(prompt_token_ids=prompts, sampling_params=GREEDY, use_tqdm=False)

    async def main() -> None:
        engine = await AsyncEngine.start(config(tiny_path))
        try:
            assert (engine.info.hidden_size, engine.info.num_labels) == (WIDTH, 0)
            texts = [engine.submit(p, deltas(12, temperature=0, ignore_eos=True)) for p in prompts]
            streams = [engine.submit(p, ask) for p, ask in zip(prompts, asked, strict=True)]
            leaving = engine.submit(prompts[0], Pooling("embedding", mean=True))
            leaving.abort()
            assert await asyncio.gather(*map(read, texts)) == [each.outputs[0].token_ids for each in said]
            for stream, vector in zip(streams, wanted, strict=True):
                (output,) = [output async for output in stream]
                assert (output.finished, output.outputs[0].finish_reason) == (True, "stop")
                assert output.pooled is not None
                np.testing.assert_allclose(output.pooled, vector, **CLOSE)
            (last,) = [output async for output in leaving]
            assert (last.outputs[0].finish_reason, last.pooled) == ("abort", None)
            with pytest.raises(PromptError, match="allows no more"):
                engine.submit([1] * (CONTEXT + 1), Pooling("embedding"))
            with pytest.raises(ParameterError, match="token_ids"):
                engine.submit([1], Pooling("score", token_ids=[VOCAB]))
            scores = [output async for output in engine.submit(prompts[1], Pooling("score", token_ids=[5, 3, 5]))]
            assert scores[0].pooled is not None
            assert scores[0].pooled[0] == scores[0].pooled[2] != scores[0].pooled[1]
        finally:
            await engine.close()

    run(main())


def test_logits_of_named_tokens_are_those_of_log_probabilities(llm: LLM) -> None:
    (prompt,) = random_ids(SEED + 7, 25)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
    (said,) = llm.generate(prompt_token_ids=[prompt], sampling_params=params, use_tqdm=False)
    assert said.outputs[0].logprobs is not None
    known = said.outputs[0].logprobs[0]
    ids = list(known)[::-3]
    (output,) = llm._pool([prompt], Pooling("score", token_ids=ids), False)
    assert output.pooled is not None
    wanted = [known[token].logprob - known[ids[0]].logprob for token in ids]
    np.testing.assert_allclose(output.pooled - output.pooled[0], wanted, **CLOSE)


def test_an_engine_that_computes_nothing() -> None:
    async def main() -> None:
        async with fake_engine("null") as engine:
            for pooling, size in ((Pooling("embedding"), 8), (Pooling("score", token_ids=[1, 2]), 2)):
                (output,) = [output async for output in engine.submit([1, 2, 3], pooling)]
                assert output.pooled is not None
                assert output.pooled.tolist() == list(range(1, size + 1))

    run(main())
