"""The GPU runner on a device that is not there: the reference's tokens, through graphs and without waiting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.triton.gpu_fakes import SETTINGS, FakeLink, open_fake_gpu
from tests.seeds import SEED
from tests.tiny_llama import write_tiny
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM

PROMPTS = [[1, 5, 9], [1, *range(3, 40)], [1, 7], [1, *range(20, 45)], [1, 8, 8, 8, 8]]
PLAIN = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 4},
    {"temperature": 1.3, "min_p": 0.05, "seed": 5},
]
SLOW = [
    {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "seed": 6},
    {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 2},
    {"temperature": 0.9, "logit_bias": {7: 4.0}, "seed": 7},
    {"temperature": 0.0, "min_tokens": 4},
]
Opened = tuple[LLM, FakeLink]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    print(f"seed {SEED}")
    return write_tiny(tmp_path_factory.mktemp("tiny"), SEED)


@pytest.fixture
def open_gpu(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Opened]:
    link = FakeLink()
    return lambda **settings: (open_fake_gpu(monkeypatch, tiny, link, **settings), link)


def run(llm: LLM, params: list[SamplingParams]) -> list[Any]:
    outputs = llm.generate(prompt_token_ids=PROMPTS, sampling_params=params, use_tqdm=False)
    return [(output.outputs[0].token_ids, output.outputs[0].finish_reason) for output in outputs]


def params_of(kinds: list[dict[str, Any]]) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=12 + i, **kinds[i % len(kinds)]) for i in range(len(PROMPTS))]


@pytest.mark.parametrize("kinds", [PLAIN[:1], PLAIN, SLOW, [*PLAIN, *SLOW]], ids=["greedy", "plain", "slow", "mixed"])
def test_tokens_are_those_of_the_reference(tiny: Path, open_gpu: Callable[..., Opened], kinds: list[Any]) -> None:
    gpu, link = open_gpu()
    params = params_of(kinds)
    wanted = run(LLM(str(tiny), **SETTINGS), params)
    assert run(gpu, params) == wanted
    assert not gpu.core.has_work
    if kinds == PLAIN[:1]:
        assert sum(graph.replays for graph in link.graphs) > 10


def test_two_steps_are_under_way(open_gpu: Callable[..., Opened]) -> None:
    gpu, _ = open_gpu()
    launched: list[int] = []
    waits: list[int] = []
    executor: Any = gpu.core.executor
    launch, wait = executor.launch, executor._ring.wait

    def counted(plan: Any) -> Any:
        launched.append(len(waits))
        return launch(plan)

    def counted_wait(number: int, rows: int) -> list[int]:
        waits.append(number)
        return wait(number, rows)

    executor.launch, executor._ring.wait = counted, counted_wait
    gpu.generate(prompt_token_ids=[[1, 2, 3]], sampling_params=SamplingParams(temperature=0, max_tokens=8))
    # Step i is launched when at most i - 1 steps have been waited for.
    assert len(launched) >= 8
    assert all(waited <= max(0, number - 1) for number, waited in enumerate(launched))


def test_prefix_hits_preemption_and_slots_used_again(tiny: Path, open_gpu: Callable[..., Opened]) -> None:
    executor: Any = LLM(str(tiny), **SETTINGS).core.executor
    page_bytes = executor._table._arena.shape.page_bytes
    room = {"kv_cache_memory_bytes": 16 * page_bytes, "max_model_len": 60}  # two long sequences cannot share it
    gpu, _ = open_gpu(**room)
    reference = LLM(str(tiny), **(SETTINGS | room))
    for _ in range(3):
        params = params_of(PLAIN)
        assert run(gpu, params) == run(reference, params)
    gpu.core.cache.check_idle()


def test_captures_are_bounded_per_step_and_start_eagerly(open_gpu: Callable[..., Opened]) -> None:
    gpu, link = open_gpu()
    greedy = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    gpu.generate(prompt_token_ids=[[1, 2, 3]], sampling_params=greedy, use_tqdm=False)
    assert link.graphs == []  # every bucket ran once
    gpu.generate(prompt_token_ids=[[1, 2, 3]], sampling_params=greedy, use_tqdm=False)
    executor: Any = gpu.core.executor
    decode, prompt = sorted(executor.graphs.captured())
    assert decode == (1, 1, False, False, True, False)
    assert prompt == (4, 1, True, False, False, False)
