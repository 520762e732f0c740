"""The demo model with int8 and fp8 pages: how far its log-probabilities move, and that all else works."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.test_preemption import ITEMS, LENGTH, crowded
from tests.e2e.test_reference import differences, forced, scored_positions
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM

GREEDY = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
PROMPTS = [item["prompt_ids"] for item in ITEMS]


def tokens(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    outputs = llm.generate(prompt_token_ids=prompts, sampling_params=GREEDY, use_tqdm=False)
    llm.core.cache.check_idle()
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("kv, least, bound", [("int8", 0.0, 1.0), ("fp8", 0.0, 1.0)])
def test_narrow_pages(demo_path: Path, kv: str, least: float, bound: float) -> None:
    """bound: of the mean |dlogprob| over the reference's top 5."""
    llm = LLM(str(demo_path), kv_cache_dtype=kv, max_model_len=256, max_num_batched_tokens=11)
    assert llm.core.backend.name == "cpu"
    errors = differences(scored_positions(forced(llm)))
    mean = sum(errors) / len(errors)
    print(kv, mean)
    assert least <= mean <= bound
    expected = [tokens(llm, [ids])[0] for ids in PROMPTS]
    pairs = [ids + found[:30] for ids, found in zip(PROMPTS, expected, strict=True)]
    (cached,) = llm.generate(prompt_token_ids=pairs[:1], sampling_params=GREEDY, use_tqdm=False)
    assert cached.num_cached_tokens >= 32
    assert cached.outputs[0].token_ids[: LENGTH - 30] == expected[0][30:]
    pressed = crowded(demo_path, kv)
    assert tokens(pressed, PROMPTS) == expected
    assert pressed.core.scheduler.stats().num_preemptions >= 2
