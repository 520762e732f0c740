"""Prompts longer than the attention window, against transformers in float32 on weights from our loader.

Greedy tokens must be the same for every chunk size, page size, use of the prefix cache and company in the batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.seeds import SEED
from tokenspeed.bench.hf import hf_model
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.output import RequestOutput
from tokenspeed.formats.gguf import open_gguf
from tokenspeed.models.registry import define, shipped_configs
from tokenspeed.weights.loader import load_weights

NEW_TOKENS = 8
LEAST_MARGIN = 1e-3
"""Of the best logit over the second: closer ones may be swapped by rounding."""
WINDOW = 512
SHARED = 680
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)


class Oracle:
    """Greedy continuations by transformers, and how clear each choice was."""

    def __init__(self, demo_path: Path) -> None:
        file = open_gguf(demo_path)
        definition = define(file)
        weights = load_weights(file, definition.weights)
        self.model: Any = hf_model(shipped_configs()["gemma-3-270m"], definition, weights, torch.float32)
        self.known: dict[tuple[int, ...], tuple[list[int], float]] = {}

    def greedy(self, ids: list[int]) -> tuple[list[int], float]:
        """The next NEW_TOKENS ids and the smallest margin among them."""
        key = tuple(ids)
        if key not in self.known:
            prompt = torch.tensor([ids])
            with torch.inference_mode():
                made = self.model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=NEW_TOKENS,
                    min_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            best = torch.stack(made.logits)[:, 0].topk(2).values
            self.known[key] = made.sequences[0, len(ids) :].tolist(), float((best[:, 0] - best[:, 1]).min())
        return self.known[key]


class Prompts:
    """Pieces of a real text put together at random, drawn again where the oracle finds a near-tie."""

    def __init__(self, oracle: Oracle, text_ids: list[int], seed: int) -> None:
        self.oracle, self.text_ids, self.rng = oracle, text_ids, random.Random(seed)
        self.made: dict[str, list[int]] = {}

    def piece(self, length: int) -> list[int]:
        start = self.rng.randrange(1, len(self.text_ids) - length)
        return self.text_ids[start : start + length]

    def get(self, name: str, build: Callable[[], list[int]]) -> list[int]:
        while name not in self.made:
            ids = build()
            if self.oracle.greedy(ids)[1] > LEAST_MARGIN:
                self.made[name] = ids
        return self.made[name]

    def base(self) -> list[int]:
        return self.get("base", lambda: self.text_ids[:1] + self.piece(699))

    def sibling(self) -> list[int]:
        """Shares 680 ids with `base`."""
        return self.get("sibling", lambda: self.base()[:SHARED] + self.piece(41))

    def long(self) -> list[int]:
        return self.get("long", lambda: self.base() + self.piece(800))

    def long_sibling(self) -> list[int]:
        return self.get("long sibling", lambda: self.long()[:1001] + self.piece(102))

    def short(self, number: int) -> list[int]:
        """Every second one begins like `base`."""
        shared = self.base() if number % 2 else self.text_ids[:1]
        return self.get(f"short {number}", lambda: shared[: 4 * number + 1] + self.piece(self.rng.randrange(1, 30)))


@pytest.fixture(scope="session")
def prompts(demo_path: Path, loaded_demo: LLM) -> Prompts:
    license_text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    print(f"seed {SEED}")
    return Prompts(Oracle(demo_path), loaded_demo.get_tokenizer().encode(license_text), SEED)


def make_llm(path: Path, chunk: int, page: int, caching: bool) -> LLM:
    return LLM(
        str(path),
        dtype="float32",
        max_model_len=1600,
        max_num_seqs=16,
        max_num_batched_tokens=chunk,
        block_size=page,
        enable_prefix_caching=caching,
    )


def run(llm: LLM, prompts: list[list[int]]) -> list[RequestOutput]:
    outputs = llm.generate(prompt_token_ids=prompts, sampling_params=GREEDY, use_tqdm=False)
    llm.core.cache.check_idle()
    return outputs


def check(outputs: list[RequestOutput], oracle: Oracle) -> None:
    for output in outputs:
        tokens, margin = oracle.greedy(output.prompt_token_ids)
        assert margin > LEAST_MARGIN
        assert output.outputs[0].token_ids == tokens


def check_alone(llm: LLM, prompts: Prompts, caching: bool, page: int) -> None:
    first, second = run(llm, [prompts.base()]), run(llm, [prompts.sibling()])
    check(first + second, prompts.oracle)
    assert first[0].num_cached_tokens == 0
    assert second[0].num_cached_tokens == (SHARED // page * page if caching else 0)


@pytest.mark.slow
def test_one_token_at_a_time_with_the_cache(demo_path: Path, prompts: Prompts) -> None:
    check_alone(make_llm(demo_path, 1, 16, True), prompts, True, 16)


@pytest.mark.slow
def test_one_token_at_a_time_without_the_cache(demo_path: Path, prompts: Prompts) -> None:
    outputs = run(make_llm(demo_path, 1, 4, False), [prompts.base()])
    check(outputs, prompts.oracle)
    assert outputs[0].num_cached_tokens == 0


@pytest.mark.parametrize("chunk, page, caching", [(512, 4, True), pytest.param(512, 16, False, marks=pytest.mark.slow)])
def test_alone(demo_path: Path, prompts: Prompts, chunk: int, page: int, caching: bool) -> None:
    check_alone(make_llm(demo_path, chunk, page, caching), prompts, caching, page)


def mixed_batch(prompts: Prompts) -> list[list[int]]:
    long = [prompts.base(), prompts.long(), prompts.sibling(), prompts.long_sibling()]
    short = [prompts.short(number) for number in range(12)]
    return [ids for i in range(4) for ids in (long[i], *short[3 * i : 3 * i + 3])]


@pytest.mark.slow
@pytest.mark.parametrize("page", [4, 16])
def test_alone_in_small_chunks(demo_path: Path, prompts: Prompts, page: int) -> None:
    check_alone(make_llm(demo_path, 7, page, True), prompts, True, page)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunk", "page", "caching"),
    [(21, 4, True), (21, 16, False), (512, 4, True), (512, 4, False), (512, 16, True), (512, 16, False)],
)
def test_batch_of_16(demo_path: Path, prompts: Prompts, chunk: int, page: int, caching: bool) -> None:
    llm, batch = make_llm(demo_path, chunk, page, caching), mixed_batch(prompts)
    assert len(batch) == 16
    assert sum(len(ids) > WINDOW for ids in batch) == 4
    assert {len(ids) for ids in batch} >= {700, 1500}
    outputs = run(llm, batch)
    check(outputs, prompts.oracle)
    assert (sum(output.num_cached_tokens for output in outputs) > 0) == caching
    again = run(llm, batch[:3])
    check(again, prompts.oracle)
    assert [out.num_cached_tokens for out in again] == [
        (len(ids) - 1) // page * page if caching else 0 for ids in batch[:3]
    ]
