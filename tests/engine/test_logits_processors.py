"""`SamplingParams.logits_processors` through `LLM` on every backend: beside parameters that do the same; failing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.engine.async_tools import fake_engine, importable
from tests.engine.async_tools import run as run_async
from tests.engine.test_llm import random_ids, run
from tests.kernels.triton.gpu_fakes import FakeLink, open_fake_gpu
from tests.parity_tools import CASES, make_gguf
from tests.seeds import SEED
from tests.tiny_llama import VOCAB
from tokenspeed.contracts.errors import LogitsProcessorError, ParameterError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.scheduler.config import SchedulerConfig
from tokenspeed.scheduler.scheduler import Scheduler

__all__ = ["importable"]
Processor = Callable[..., torch.Tensor]
BANNED = list(range(0, VOCAB, 2))
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
HOT: dict[str, Any] = {"temperature": 1.5, "max_tokens": 12, "ignore_eos": True}
KINDS = {
    "greedy": HOT | {"temperature": 0.0},
    "sampled": HOT | {"seed": SEED},
    "filtered": HOT | {"seed": SEED + 1, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.3},
    "samples": HOT | {"seed": SEED + 2, "n": 3},
}


@pytest.fixture(scope="module", params=["ref", "walk", pytest.param("gpu", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Iterator[LLM]:
    """The tiny model by each backend, in chunks of prompts and with pages for a few sequences."""
    settings: dict[str, Any] = {"max_num_batched_tokens": 16, "block_size": 4, "max_num_seqs": 4}
    if request.param == "ref":
        llm = LLM(str(tiny_path), dtype="float32", **settings)
    elif request.param == "walk":
        case = CASES["gemma3"]
        made = make_gguf(case.with_k_widths(), "Q8_0", tmp_path_factory.mktemp("walk") / "model.gguf")
        llm = LLM(str(made.path), **settings)
    else:
        with pytest.MonkeyPatch.context() as patch:
            llm = open_fake_gpu(patch, tiny_path, FakeLink())
    assert llm.core.backend.name == {"ref": "ref", "walk": "cpu", "gpu": "gpu"}[request.param]
    yield llm
    llm.close()


@pytest.fixture
def any_llm(engine: LLM) -> Iterator[LLM]:
    engine.core.cache.reset()
    yield engine
    assert not engine.core.has_work
    assert not engine.core._processors
    assert not engine._failed
    engine.core.cache.check_idle()


def ban(output: list[int], logits: torch.Tensor) -> torch.Tensor:
    logits[BANNED] = -torch.inf
    return logits


def push(output: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits.index_add(0, torch.tensor([5, 6]), torch.tensor([9.0, -4.0]))


def force(tokens: list[int]) -> Processor:
    def forced(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor(tokens[len(output)]), 0.0)

    return forced


def break_down(output: list[int], logits: torch.Tensor) -> torch.Tensor:
    if len(output) == 3:
        raise ZeroDivisionError("a wheel came off")
    return logits


def samples(llm: LLM, prompt: list[int], params: SamplingParams) -> list[list[int]]:
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    return [completion.token_ids for completion in output.outputs]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_parameters_that_ban_and_push(any_llm: LLM, kind: str) -> None:
    (ids,) = random_ids(80, 21)
    for processor, same in ((ban, {"banned_token_ids": BANNED}), (push, {"logit_bias": {5: 9.0, 6: -4.0}})):
        processed = samples(any_llm, ids, SamplingParams(logits_processors=[processor], **KINDS[kind]))
        assert processed == samples(any_llm, ids, SamplingParams(**same, **KINDS[kind]))
        assert [len(tokens) for tokens in processed] == [12] * KINDS[kind].get("n", 1)


def test_rows_without_processors_get_what_they_get_alone(any_llm: LLM) -> None:
    prompts = random_ids(81, 3, 30, 9, 17, 1, 12)
    plain = [SamplingParams(seed=SEED + i, logprobs=2 if i == 4 else None, **HOT) for i in range(6)]
    mixed = [msgspec.structs.replace(p, logits_processors=[ban] if i % 2 else None) for i, p in enumerate(plain)]
    together = run(any_llm, prompts, mixed)
    assert together == [run(any_llm, [ids], [one])[0] for ids, one in zip(prompts, mixed, strict=True)]
    assert together[::2] == run(any_llm, prompts, plain)[::2]
    assert all(set(tokens).isdisjoint(BANNED) for tokens in together[1::2])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_forced_sequence_and_its_raw_log_probabilities(any_llm: LLM, temperature: float) -> None:
    ids, wanted = random_ids(82, 25, 10)
    params = SamplingParams(
        temperature=temperature, max_tokens=10, ignore_eos=True, logprobs=3, logits_processors=[force(wanted)]
    )
    (output,) = any_llm.generate(ids, params, use_tqdm=False)
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=3)
    (taught,) = any_llm.generate(ids + wanted, scored, use_tqdm=False)
    completion = output.outputs[0]
    assert completion.token_ids == wanted
    assert completion.logprobs is not None
    assert taught.prompt_logprobs is not None
    for token, ours, theirs in zip(wanted, completion.logprobs, taught.prompt_logprobs[25:], strict=True):
        assert theirs is not None
        assert ours[token].logprob == pytest.approx(theirs[token].logprob, abs=2e-2)
        assert {1, 2, 3} <= {entry.rank for entry in ours.values()}


def test_what_a_processor_sees(any_llm: LLM) -> None:
    """Each sample has its own output."""
    prompts = random_ids(83, 6, 19)
    calls: dict[int, list[list[int]]] = {}

    def look(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        calls.setdefault(len(prompt), []).append(output)
        assert prompt in prompts
        return logits

    params = SamplingParams(n=2, seed=SEED, logits_processors=[look], **HOT)
    outputs = any_llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
    for ids, output in zip(prompts, outputs, strict=True):
        expected = [completion.token_ids[:count] for completion in output.outputs for count in range(12)]
        assert sorted(calls[len(ids)]) == sorted(expected)


def test_processors_run_in_their_order(any_llm: LLM) -> None:
    (ids,) = random_ids(84, 5)
    last_wins = msgspec.structs.replace(GREEDY, logits_processors=[ban, force([8] * 6), force([9] * 6)])
    assert samples(any_llm, ids, last_wins) == [[9] * 6]
    banned = SamplingParams(logits_processors=[force([8] * 12)], banned_token_ids=[8], seed=1, **HOT)
    assert samples(any_llm, ids, banned) == [[0] * 12]  # what a row gets that allows no token


def test_a_failure_ends_its_request_alone(any_llm: LLM) -> None:
    prompts = random_ids(85, 7, 24, 2, 11)
    good = SamplingParams(seed=SEED, **HOT)
    bad = SamplingParams(seed=SEED, n=2, logits_processors=[ban, break_down], **HOT)
    expected = run(any_llm, prompts, good)
    with pytest.raises(LogitsProcessorError, match=r"logits processor break_down \(2 of 2\) raised Zero") as caught:
        any_llm.generate(prompt_token_ids=prompts, sampling_params=[good, bad, good, bad], use_tqdm=False)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    outputs = caught.value.outputs
    assert [output.prompt_token_ids for output in outputs] == prompts
    for number, output in enumerate(outputs):
        assert output.finished
        if number % 2:
            assert {completion.finish_reason for completion in output.outputs} == {"error"}
            assert all(len(completion.token_ids) <= 3 for completion in output.outputs)
        else:
            assert output.outputs[0].token_ids == expected[number]
    assert run(any_llm, prompts, good) == expected


def test_a_failure_ends_its_stream_alone(any_llm: LLM) -> None:
    first, second, third = random_ids(86, 20, 7, 3)
    (alone,) = run(any_llm, [first], GREEDY)
    going = any_llm.stream(first, GREEDY)
    next(going)
    failing = any_llm.stream(second, msgspec.structs.replace(GREEDY, logits_processors=[break_down]))
    dropped = any_llm.stream(third, msgspec.structs.replace(GREEDY, logits_processors=[break_down]))
    _, failed = next(failing)
    with pytest.raises(LogitsProcessorError, match="break_down"):
        list(failing)
    assert failed.outputs[0].finish_reason == "error"
    assert len(failed.outputs[0].token_ids) <= 3
    del dropped
    (_, output), *_ = reversed(list(going))
    assert output.outputs[0].token_ids == alone


def test_an_interrupt_in_a_processor_ends_the_call(any_llm: LLM) -> None:
    def interrupt(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    (ids,) = random_ids(87, 9)
    (expected,) = run(any_llm, [ids], GREEDY)
    with pytest.raises(KeyboardInterrupt):
        any_llm.generate(ids, msgspec.structs.replace(GREEDY, logits_processors=[interrupt]), use_tqdm=False)
    assert run(any_llm, [ids], GREEDY) == [expected]


def test_a_gpu_and_what_it_has_launched_before_a_failure(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps are under way there; the slow cases above have the rest."""
    llm = open_fake_gpu(monkeypatch, tiny_path, FakeLink())
    first, second, wanted = random_ids(90, 18, 3, 6)
    forced = msgspec.structs.replace(GREEDY, logits_processors=[force(wanted)])
    broken = msgspec.structs.replace(GREEDY, logits_processors=[break_down])
    with pytest.raises(LogitsProcessorError, match=r"break_down \(1 of 1\) raised ZeroDivisionError") as caught:
        llm.generate(prompt_token_ids=[first, second], sampling_params=[forced, broken], use_tqdm=False)
    good, failed = caught.value.outputs
    assert (good.outputs[0].token_ids, good.outputs[0].finish_reason) == (wanted, "length")
    assert failed.outputs[0].finish_reason == "error"
    assert not llm.core.has_work
    assert not llm.core._processors
    llm.core.cache.check_idle()


class EveryoneIn:
    """Admits whoever comes, so that pages run out."""

    version = 0

    def admits(self, *_: Any) -> bool:
        return True

    def refresh(self, *_: Any) -> None:
        pass

    def ended(self, *_: Any) -> None:
        pass

    def changed(self) -> None:
        self.version += 1


def test_preemption_changes_nothing(tiny_path: Path) -> None:
    prompts = random_ids(88, 20, 21, 22)
    params = [SamplingParams(seed=SEED + i, **(HOT | {"max_tokens": 40}), logits_processors=[ban]) for i in range(3)]
    roomy = LLM(str(tiny_path), dtype="float32", block_size=4)
    page_bytes = roomy.core.page_shape.page_bytes
    crowded = LLM(
        str(tiny_path), dtype="float32", block_size=4, max_model_len=64, kv_cache_memory_bytes=30 * page_bytes
    )
    crowded.core.scheduler = Scheduler(SchedulerConfig(4, 64, 64), crowded.core.cache, EveryoneIn())
    assert run(crowded, prompts, params) == run(roomy, prompts, params)
    assert crowded.core.scheduler.stats().num_preemptions >= 1
    assert not crowded.core._processors
    crowded.core.cache.check_idle()


def test_rows_beside_one_with_processors_do_without_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A screened head reads all of its rows for the one that has processors, and for no other."""
    case = replace(CASES["gemma3"].with_k_widths(), seed=SEED % 2**31)
    llm = LLM(str(make_gguf(case, "Q8_0", tmp_path / "model.gguf").path))
    backend: Any = llm.core.backend
    picked: list[int] = []
    read: list[int] = []
    pick, logits = backend.pick, backend.logits

    def counted_pick(rows: list[int], asks: Any) -> Any:
        picked.append(len(rows))
        return pick(rows, asks)

    def counted_logits(rows: list[int]) -> torch.Tensor:
        read.append(len(rows))
        return logits(rows)

    monkeypatch.setattr(backend, "pick", counted_pick)
    monkeypatch.setattr(backend, "logits", counted_logits)
    prompts = random_ids(89, 4, 5, 6)
    params = [GREEDY] * 3
    plain = run(llm, prompts, params)
    assert read == []
    params[1] = msgspec.structs.replace(params[1], logits_processors=[ban])
    processed = run(llm, prompts, params)
    assert (set(picked), set(read)) == ({3, 2}, {1})
    assert (processed[0], processed[2]) == (plain[0], plain[2])
    assert set(processed[1]).isdisjoint(BANNED)


def test_another_process_refuses_them() -> None:
    async def main() -> None:
        async with fake_engine() as engine:
            with pytest.raises(ParameterError, match="logits_processors cannot go to an engine in another process"):
                engine.submit([1], SamplingParams(logits_processors=[ban]))
            assert engine.health().reason == "idle"

    run_async(main())
