"""`LLM` in the names and shapes of vLLM's offline API."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tests.seeds import SEED
from tests.tiny_llama import CONTEXT, VOCAB
from tokenspeed import LLM as EXPORTED
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.output import Logprob, RequestOutput

GREEDY = SamplingParams(temperature=0, max_tokens=6)


def random_ids(seed: int, *lengths: int) -> list[list[int]]:
    rng = random.Random(SEED + seed)
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]


def ids_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def run(llm: LLM, ids: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[list[int]]:
    return ids_of(llm.generate(prompt_token_ids=ids, sampling_params=params, use_tqdm=False))


def test_the_package_exports_it() -> None:
    assert EXPORTED is LLM


def test_shapes_of_a_result(demo_llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3, prompt_logprobs=2)
    (output,) = demo_llm.generate("The three primary colors are", params, use_tqdm=False)
    (completion,) = output.outputs
    assert (output.prompt, output.finished, completion.index) == ("The three primary colors are", True, 0)
    assert output.prompt_token_ids == demo_llm.get_tokenizer().encode("The three primary colors are")
    assert completion.text == demo_llm.get_tokenizer().decode(completion.token_ids)
    assert completion.text.startswith(" red, blue")
    assert len(completion.token_ids) == 5
    assert (completion.finish_reason, completion.stop_reason) == ("length", None)
    assert completion.logprobs is not None
    for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        assert [entry.rank for entry in entries.values()] == [1, 2, 3]
        assert next(iter(entries)) == token
        assert entries[token].decoded_token == demo_llm.get_tokenizer().token_text(token)
        assert all(isinstance(entry, Logprob) and entry.logprob < 0 for entry in entries.values())
    sums = [entries[token].logprob for token, entries in zip(completion.token_ids, completion.logprobs, strict=True)]
    assert completion.cumulative_logprob == pytest.approx(sum(sums))
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token, scored in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert scored is not None
        assert token in scored
        assert 2 <= len(scored) <= 3
        assert {1, 2} <= {entry.rank for entry in scored.values()}


def test_nothing_is_reported_that_was_not_asked_for(llm: LLM) -> None:
    (output,) = llm.generate([1, 2, 3], GREEDY, use_tqdm=False)
    assert output.prompt is None
    assert output.prompt_logprobs is None
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None
    assert output.outputs[0].text == ""


@pytest.mark.parametrize("count", [0, 1, 7])
def test_logprobs_hold_the_sampled_token_beside_the_best(llm: LLM, count: int) -> None:
    params = SamplingParams(temperature=3.0, seed=SEED, max_tokens=20, logprobs=count, prompt_logprobs=count)
    (output,) = llm.generate(random_ids(0, 19)[0], params, use_tqdm=False)
    completion = output.outputs[0]
    assert completion.logprobs is not None
    assert output.prompt_logprobs is not None
    for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        assert len(entries) == count + (entries[token].rank > count)
    for token, scored in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert scored is not None
        assert len(scored) == count + (scored[token].rank > count)


def test_prompt_logprobs_do_not_depend_on_chunks_or_cache(llm: LLM) -> None:
    (ids,) = random_ids(1, 50)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    first, second = (llm.generate(prompt_token_ids=ids, sampling_params=params, use_tqdm=False)[0] for _ in range(2))
    prefix = llm.generate(prompt_token_ids=ids[:9], sampling_params=params, use_tqdm=False)[0]
    assert first.prompt_logprobs == second.prompt_logprobs
    assert second.num_cached_tokens == 0
    assert first.prompt_logprobs is not None
    assert prefix.prompt_logprobs is not None
    for ours, theirs, token in zip(first.prompt_logprobs[1:9], prefix.prompt_logprobs[1:], ids[1:9], strict=True):
        assert ours is not None
        assert theirs is not None
        assert ours[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-4)


PROMPT = "Once upon a time"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda text, ids: {"prompts": text},
        lambda text, ids: {"prompts": [text]},
        lambda text, ids: {"prompts": {"prompt": text}},
        lambda text, ids: {"prompts": [{"prompt_token_ids": ids}]},
        lambda text, ids: {"prompts": {"prompt": text, "prompt_token_ids": ids}},
        lambda text, ids: {"prompts": ids},
        lambda text, ids: {"prompts": [ids]},
        lambda text, ids: {"prompt_token_ids": ids},
        lambda text, ids: {"prompt_token_ids": [ids]},
        lambda text, ids: {"prompt_token_ids": np.array([ids])},
        lambda text, ids: {"prompts": np.array(ids)},
    ],
)
def test_ways_to_give_a_prompt(demo_llm: LLM, wrap: Any) -> None:
    ids = demo_llm.get_tokenizer().encode(PROMPT)
    given = wrap(PROMPT, ids)
    params = SamplingParams(temperature=0, max_tokens=1)
    (output,) = demo_llm.generate(**given, sampling_params=params, use_tqdm=False)
    assert output.prompt_token_ids == ids
    assert all(type(token) is int for token in output.prompt_token_ids)
    has_text = PROMPT in str(given)
    assert output.prompt == (PROMPT if has_text else None)


def test_no_prompts_give_no_results(llm: LLM) -> None:
    assert llm.generate([], use_tqdm=False) == []


def test_results_keep_the_order_of_prompts(llm: LLM) -> None:
    ids = random_ids(2, 30, 1, 17, 3, 60, 5)
    params = [SamplingParams(temperature=0, max_tokens=count) for count in (9, 1, 30, 4, 2, 8)]
    outputs = llm.generate(prompt_token_ids=ids, sampling_params=params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == ids
    assert [len(tokens) for tokens in ids_of(outputs)] == [9, 1, 30, 4, 2, 8]
    alone = [run(llm, [each], [one])[0] for each, one in zip(ids, params, strict=True)]
    assert ids_of(outputs) == alone


def test_more_prompts_than_fit_at_once(tiny_path: Any) -> None:
    llm = LLM(str(tiny_path), dtype="float32", max_num_seqs=3, max_num_batched_tokens=5)
    ids = random_ids(3, *range(1, 12))
    assert run(llm, ids, GREEDY) == [run(llm, [each], GREEDY)[0] for each in ids]
    llm.core.cache.check_idle()


@pytest.mark.parametrize("shown", [False, True])
def test_progress_bar(llm: LLM, capfd: pytest.CaptureFixture[str], shown: bool) -> None:
    llm.generate(random_ids(4, 3, 5), GREEDY, use_tqdm=shown)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("generating: 100%" in err and "2/2" in err) if shown else err == ""


@pytest.mark.parametrize("kv", ["auto", "bfloat16", "float32", "int8", "fp8", "fp8_e4m3"])
def test_kv_cache_dtype(tiny_path: Any, kv: str) -> None:
    llm = LLM(str(tiny_path), dtype="float32", kv_cache_dtype=kv)
    assert str(llm.core.kv_dtype) == "torch." + {
        "auto": "float32",
        "fp8": "float8_e4m3fn",
        "fp8_e4m3": "float8_e4m3fn",
    }.get(kv, kv)
    assert len(run(llm, random_ids(5, 40), GREEDY)[0]) == 6


def test_prefix_cache_can_be_left_out(tiny_path: Any) -> None:
    llm = LLM(str(tiny_path), dtype="float32", enable_prefix_caching=False)
    for _ in range(2):
        (output,) = llm.generate(random_ids(6, 40)[0], GREEDY, use_tqdm=False)
        assert output.num_cached_tokens == 0


def test_prefix_cache_gives_the_same_tokens(llm: LLM) -> None:
    (ids,) = random_ids(7, 41)
    first, second = (llm.generate(ids, GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 40)
    assert ids_of([first]) == ids_of([second])


def test_the_context_bounds_a_request(llm: LLM) -> None:
    (output,) = llm.generate(
        random_ids(8, CONTEXT - 9)[0], SamplingParams(temperature=0, max_tokens=None), use_tqdm=False
    )
    assert len(output.outputs[0].token_ids) == 9
    assert output.outputs[0].finish_reason == "length"


def test_metrics(llm: LLM) -> None:
    (output,) = llm.generate(random_ids(9, 5)[0], GREEDY, use_tqdm=False)
    timings = output.metrics.timings(len(output.outputs[0].token_ids))
    assert 0 < timings["tpot_ms"] < 1e4
    assert 0 < timings["ttft_ms"] < 1e4
