"""The engine's greedy tokens are those of transformers, however the work is cut into steps, pages and batches."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet

from tests.parity_cases import MORE_FAMILY_CASES
from tests.parity_tools import CONTEXT, FAMILY_CASES, Tiny, oracle_logits, random_prompt
from tokenspeed import LLM, SamplingParams

NEW_TOKENS = 32
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
MIN_MARGIN = 1e-4
"""Between the best and the second logit; a seed that leaves less says nothing about equal tokens."""


def prompts_of(checkpoint: Tiny) -> list[list[int]]:
    """Different lengths; three share a prefix of 33 tokens, two full pages of 16 and a bit."""
    seed = checkpoint.case.seed
    shared = random_prompt(33, seed)
    tails = [random_prompt(length, seed + length) for length in (7, 2)]
    return [shared, *(shared + tail for tail in tails), random_prompt(21, seed + 100), random_prompt(1, seed + 200)]


def open_llm(checkpoint: Tiny, **settings: Any) -> LLM:
    dtypes = {"dtype": "float32", "kv_cache_dtype": "float32"}
    return LLM(str(checkpoint.path), device="cpu", max_model_len=CONTEXT, **dtypes | settings)


def generate(llm: LLM, prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Tokens and number of cached prompt tokens of each prompt."""
    outputs = llm.generate(prompt_token_ids=prompts, sampling_params=GREEDY, use_tqdm=False)
    assert all(output.outputs[0].text == "" for output in outputs)
    return [output.outputs[0].token_ids for output in outputs], [output.num_cached_tokens for output in outputs]


@pytest.fixture(scope="module")
def expected(tiny):
    """Greedy tokens per case, once the oracle has agreed: fed with them, its argmax is each time the next."""
    known: dict[tuple[str, str], list[list[int]]] = {}

    def tokens_of(name: str, fmt: str = "F32") -> list[list[int]]:
        if (name, fmt) not in known:
            checkpoint = tiny(name, fmt)
            llm = open_llm(checkpoint, enable_prefix_caching=False, max_num_seqs=1)
            tokens, _ = generate(llm, prompts_of(checkpoint))
            for prompt, new in zip(prompts_of(checkpoint), tokens, strict=True):
                assert_greedy(checkpoint, prompt, new)
            known[name, fmt] = tokens
        return known[name, fmt]

    return tokens_of


def assert_greedy(checkpoint: Tiny, prompt: list[int], new: list[int]) -> None:
    assert len(new) == NEW_TOKENS
    logits = oracle_logits(checkpoint.oracle, prompt + new[:-1])[len(prompt) - 1 :]
    best = logits.topk(2)
    assert best.indices[:, 0].tolist() == new
    assert (best.values[:, 0] - best.values[:, 1]).min() > MIN_MARGIN, "choose another seed"


FORMATS = ("F32", "gguf-F32", "gguf-Q8_0", "gguf-Q4_0", "gguf-Q5_0", "gguf-K")
CUTS = tuple(product((1, 3, 64), (4, 16)))
"""Most tokens of a step, and of a page."""


def of_families(values: Iterable[Any], fast: Any) -> list[ParameterSet]:
    """Every case and value; of the later families all values but one are slow."""
    marks = {name: [pytest.mark.slow] for name in MORE_FAMILY_CASES}
    return [
        pytest.param(name, value, marks=[] if value == fast else marks.get(name, []))
        for name in (*FAMILY_CASES, *MORE_FAMILY_CASES)
        for value in values
    ]


@pytest.mark.parametrize("name, fmt", of_families(FORMATS, "F32"))
def test_alone(expected, name, fmt):
    tokens = expected(name, fmt)
    assert len({token for new in tokens for token in new}) > len(tokens), "a model that repeats itself tests little"


@pytest.mark.parametrize("name, cut", of_families(CUTS, (3, 4)))
def test_batched_and_chunked(tiny, expected, name, cut):
    chunk, page_size = cut
    checkpoint = tiny(name, "F32")
    settings = {"max_num_batched_tokens": chunk, "block_size": page_size}
    llm = open_llm(checkpoint, enable_prefix_caching=False, **settings)
    tokens, cached = generate(llm, prompts_of(checkpoint))
    assert tokens == expected(name)
    assert cached == [0] * len(cached)


@pytest.mark.parametrize("name, cut", of_families(CUTS, (64, 16)))
def test_prefix_cache(tiny, expected, name, cut):
    chunk, page_size = cut
    checkpoint = tiny(name, "F32")
    prompts = prompts_of(checkpoint)
    llm = open_llm(checkpoint, max_num_batched_tokens=chunk, block_size=page_size)
    alone, hits = generate(llm, prompts[:1])
    assert (alone, hits) == (expected(name)[:1], [0])
    tokens, hits = generate(llm, prompts)
    assert tokens == expected(name)
    full_pages = [(len(prompt) - 1) // page_size * page_size for prompt in prompts]
    assert hits[:3] == [min(full, 32) for full in full_pages[:3]]
    assert hits[3:] == [0, 0]
    again, hits = generate(llm, prompts)
    assert again == tokens
    assert hits == full_pages
