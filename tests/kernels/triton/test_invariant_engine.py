"""Batch-invariant mode of the GPU runner: its real kernels in the interpreter, under `LLM`, on a device that is not
there."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.kernels.triton.gpu_fakes import FakeLink
from tests.parity_tools import CASES, make_gguf
from tests.seeds import SEED
from tokenspeed.bench.verify.invariance import different, make_requests, run, run_after_hit, run_alone, run_mixed
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.contracts.step import Pooling
from tokenspeed.engine.llm import LLM
from tokenspeed.kernels.registry import Implementation, Registry, Situation
from tokenspeed.kernels.triton import attention_registration, dense, expert_registration, invariant_registration
from tokenspeed.ops.definitions import Operands
from tokenspeed.runner import build
from tokenspeed.runner.gpu.backend import GpuBackend
from tokenspeed.runner.gpu.executor import GpuExecutor
from tokenspeed.runner.gpu.invariant_jobs import scored
from tokenspeed.runner.gpu.link import TritonSteps
from tokenspeed.runner.logprobs import token_logprobs

SETTINGS: dict[str, Any] = {"max_model_len": 64, "kv_cache_memory_bytes": 4 << 20, "block_size": 8, "max_num_seqs": 16}
Open = Callable[..., LLM]


def register_here(registry: Registry) -> None:
    """The kernels of a GPU, on this device."""
    known = Registry()
    for room in (attention_registration, invariant_registration, dense, expert_registration):
        room.register(known)
    for made in (each for items in known._by_op.values() for each in items):
        registry.add(replace(made, takes=partial(_takes_here, made)))


def _takes_here(made: Implementation, operands: Operands, situation: Situation) -> bool:
    return made.takes(operands, replace(situation, device="cuda"))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = CASES["qwen3-tied"]
    case = replace(case, settings=case.settings | {"num_hidden_layers": 1})
    return make_gguf(case, "F32", tmp_path_factory.mktemp("tiny") / "model.gguf").path


@pytest.fixture
def open_gpu(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    def executor(backend: GpuBackend, arena: Any, max_num_seqs: int, max_len: int) -> GpuExecutor:
        kernels = TritonSteps(backend.num_heads, backend.model.dtype.itemsize, backend.batch_invariant)
        return GpuExecutor(backend, arena, kernels, FakeLink(), max_num_seqs=max_num_seqs, max_len=max_len)

    def opened(budget: int, quantization: str | None = None, mode: bool = True) -> LLM:
        def choose(model: Any, *rest: Any) -> GpuBackend:
            return GpuBackend(model, register=register_here, quantization=quantization, batch_invariant=mode)

        with monkeypatch.context() as patch:
            patch.setattr(build, "choose_backend", choose)
            patch.setattr(build, "gpu_executor", executor)
            return LLM(str(model_path), batch_invariant=mode, max_num_batched_tokens=budget, **SETTINGS)

    return opened


def check_every_way(open_gpu: Open, quantization: str | None, count: int, most: int, longest: int) -> None:
    rng = random.Random(SEED)
    whole, chunked = (open_gpu(budget, quantization) for budget in (70, 7))
    asked = make_requests(count, whole.core.vocab_size, longest, 2, rng)
    silent = [one.silent() for one in asked]
    expected = run_alone(whole, asked)
    assert all(len(answer.token_ids) == 2 and answer.logprobs for answer in expected)
    ways = {
        "chunks": different(expected, iter(enumerate(run_alone(chunked, asked)))),
        "mixed": different(expected, run_mixed(whole, asked, most, rng)),
        "silent": different(expected, iter(enumerate(run(whole, silent)))),
        "prefix": different(expected, run_after_hit(whole, asked)),
    }
    assert {name: way["different"] for name, way in ways.items()} == {name: [] for name in ways}


def test_bits_do_not_depend_on_what_else_runs(open_gpu: Open) -> None:
    check_every_way(open_gpu, None, count=2, most=3, longest=9)


def test_bits_of_what_is_pooled(open_gpu: Open) -> None:
    """By the kernels of a GPU, in its compute dtype."""
    llm, prompts = open_gpu(70), [[5, 9, 2, 7], [7, 1], [3], [8, 4, 4]]
    for pooling in (Pooling("embedding"), Pooling("score", token_ids=[4, 9])):
        alone = [llm._pool([prompt], pooling, False)[0].pooled for prompt in prompts]
        beside = [output.pooled for output in llm._pool(prompts, pooling, False)]
        for found, wanted in zip(beside, alone, strict=True):
            assert found is not None
            assert wanted is not None
            assert found.tobytes() == wanted.tobytes()
    (mean,), (last,) = (llm.embed([[3]], pooling=way, use_tqdm=False) for way in ("mean", "last"))
    assert mean.outputs.embedding == pytest.approx(last.outputs.embedding, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_more_requests(open_gpu: Open, quantization: str | None) -> None:
    check_every_way(open_gpu, quantization, count=5, most=12, longest=40)


def test_logits_processors_go_the_plain_way(open_gpu: Open) -> None:
    """Beside a row that the kernels draw."""
    llm, prompts = open_gpu(70), [[5, 9, 2], [7, 1]]

    def push(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(0, torch.tensor([11]), 99.0)

    plain = SamplingParams(temperature=0, max_tokens=2, logprobs=1, ignore_eos=True)
    pushed = msgspec.structs.replace(plain, logits_processors=[push])
    alone = llm.generate(prompt_token_ids=prompts, sampling_params=plain, use_tqdm=False)
    first, second = llm.generate(prompt_token_ids=prompts, sampling_params=[pushed, plain], use_tqdm=False)
    assert first.outputs[0].token_ids == [11, 11]
    assert first.outputs[0].logprobs is not None
    assert alone[0].outputs[0].logprobs is not None
    best, raw = alone[0].outputs[0].token_ids[0], alone[0].outputs[0].logprobs[0]
    assert first.outputs[0].logprobs[0][best].logprob == raw[best].logprob
    assert second.outputs[0].token_ids == alone[1].outputs[0].token_ids


def test_an_op_without_such_a_kernel_is_refused(open_gpu: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariant_registration, "register", lambda registry: None)
    with pytest.raises(UnsupportedError, match="rope has no implementation on cpu that gives a row the same bits"):
        open_gpu(16)
    open_gpu(16, mode=False)


def test_buckets_of_the_mode_take_one_kernel_each(open_gpu: Open) -> None:
    backend: Any = open_gpu(16).core.backend
    plans = [[step.implementation.name for step in backend.plan_for(tokens).steps] for tokens in (1, 64, 4096)]
    assert plans[0] == plans[1] == plans[2]
    assert {"invariant.attention", "invariant.qk_norm_rope_write", "invariant.norm_linear"} <= set(plans[0])
    usual: Any = open_gpu(16, mode=False).core.backend
    chosen = {step.implementation.name for tokens in (1, 4096) for step in usual.plan_for(tokens).steps}
    assert not any(name.startswith("invariant.") for name in chosen)


def test_log_probabilities_are_those_of_the_torch_path() -> None:
    generator = torch.Generator().manual_seed(SEED)
    logits = 3 * torch.randn(4, 321, generator=generator)
    tokens, tops = [3, 300, 17, 5], [0, 20, -1, 64]
    exact = token_logprobs(logits, torch.tensor(tokens), 64).to_structs([max(top, 0) for top in tops])
    for row, (found, wanted) in enumerate(zip(scored(logits, tokens, tops), exact, strict=True)):
        if tops[row] < 0:
            continue
        assert (found.token_id, found.rank, found.top_ids) == (wanted.token_id, wanted.rank, wanted.top_ids)
        assert found.logprob == pytest.approx(wanted.logprob, abs=1e-5)
        assert found.top_logprobs == pytest.approx(wanted.top_logprobs, abs=1e-5)
