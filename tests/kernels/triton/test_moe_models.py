"""Models with experts by the GPU's runner, kernels in the interpreter: log-probabilities as transformers computes them,
steps of one token and of several, and what the runner refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.triton.gpu_fakes import FakeLink
from tests.kernels.triton.test_invariant_engine import register_here
from tests.parity_tools import CASES, make_gguf, make_safetensors, oracle_logits, random_prompt, routing_margin
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.kernels.triton import attention_registration, expert_registration, experts, linear, packed_experts
from tokenspeed.kernels.triton.attention_tiles import DecodeTile
from tokenspeed.kernels.triton.expert_tiles import ProductTile
from tokenspeed.kernels.triton.tiles import GemvTile
from tokenspeed.quantization.fp8 import Fp8Weight
from tokenspeed.quantization.mxfp4_experts import Mxfp4Experts
from tokenspeed.runner import build
from tokenspeed.runner.gpu.backend import GpuBackend
from tokenspeed.runner.gpu.executor import GpuExecutor
from tokenspeed.runner.gpu.link import TritonSteps

BOUND, MARGIN = 2e-4, 1e-4
"""Of log-probabilities; by which choices of experts have to be clear."""
SLOW = [pytest.mark.slow]
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 4 << 20,
}
FAMILIES = {"qwen3_moe": 1, "mixtral": 1, "glm4_moe": 2, "glm4_moe-groups": 1, "gpt_oss": 2, "minimax_m2": 1}
"""And how many layers show all of a family."""


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that hold much of a tiny model: each program costs the interpreter some milliseconds."""
    monkeypatch.setattr(attention_registration, "decode_tile", lambda *shape: DecodeTile(2, 16, 1, 1, 1))
    for module, name in ((linear, "gemv_tile"), (experts, "gate_up_tile"), (experts, "down_tile")):
        monkeypatch.setattr(module, name, lambda *shape: GemvTile(64, 64, 1))
    monkeypatch.setattr(packed_experts, "choice_splits", lambda *shape: 1)
    for name in ("choice_tile", "packed_product_tile"):
        monkeypatch.setattr(packed_experts, name, lambda *shape: ProductTile(16, 128, 128, 4, 2, 0, True))


def open_here(monkeypatch: pytest.MonkeyPatch, path: Path, **how: Any) -> LLM:
    """how: of the backend."""

    def executor(backend: GpuBackend, arena: Any, max_num_seqs: int, max_len: int) -> GpuExecutor:
        kernels = TritonSteps(backend.num_heads, 4, backend.batch_invariant)
        return GpuExecutor(backend, arena, kernels, FakeLink(), max_num_seqs=max_num_seqs, max_len=max_len)

    with monkeypatch.context() as patch:
        patch.setattr(build, "choose_backend", lambda model, *rest: GpuBackend(model, register=register_here, **how))
        patch.setattr(build, "gpu_executor", executor)
        return LLM(str(path), batch_invariant=how.get("batch_invariant", False), **SETTINGS)


def made(name: str, folder: Path) -> Any:
    case = CASES[name]
    return make_safetensors(
        replace(case, settings=case.settings | {"num_hidden_layers": FAMILIES[name]}), "F32", folder
    )


def greedy(llm: LLM, prompts: list[list[int]]) -> list[Any]:
    """Of the first prompt a token more than of others: the last step has one row."""
    counts = [3, *([2] * (len(prompts) - 1))]
    params = [SamplingParams(temperature=0, max_tokens=count, logprobs=5, ignore_eos=True) for count in counts]
    return [each.outputs[0] for each in llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "qwen3_moe" else SLOW) for name in FAMILIES])
def test_families(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = made(name, tmp_path)
    llm = open_here(monkeypatch, tiny.path)
    assert llm.core.backend.fallback_ops == []
    prompts = [random_prompt(length, tiny.case.seed + length) for length in (7, 3)]
    for prompt, answer in zip(prompts, greedy(llm, prompts), strict=True):
        assert_as_the_oracle(tiny, prompt, answer)


def assert_as_the_oracle(tiny: Any, prompt: list[int], answer: Any) -> None:
    known = prompt + answer.token_ids[:-1]
    assert routing_margin(tiny.oracle, known) > MARGIN, "choose another seed"
    expected = oracle_logits(tiny.oracle, known)[len(prompt) - 1 :].log_softmax(-1)
    assert answer.logprobs is not None
    for row, entries in zip(expected, answer.logprobs, strict=True):
        best = row.topk(5)
        assert {token: entry.logprob for token, entry in entries.items()} == pytest.approx(
            dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)), abs=BOUND
        )
    assert answer.token_ids == torch.stack([row.argmax() for row in expected]).tolist()


@pytest.mark.slow
def test_batch_invariant_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = made("qwen3_moe", tmp_path)
    llm = open_here(monkeypatch, tiny.path, batch_invariant=True)
    prompts = [random_prompt(length, tiny.case.seed + length) for length in (3, 7, 4)]
    told = [(each.token_ids, each.logprobs) for each in greedy(llm, prompts)]
    alone = [(each.token_ids, each.logprobs) for prompt in prompts for each in greedy(llm, [prompt])]
    for (tokens, logprobs), (own_tokens, own_logprobs) in zip(told, alone, strict=True):
        assert tokens == own_tokens[: len(tokens)]
        assert logprobs == own_logprobs[: len(tokens)]


@pytest.mark.slow
def test_experts_in_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = made("qwen3_moe", tmp_path)
    llm = open_here(monkeypatch, tiny.path, quantization="fp8")
    backend: Any = llm.core.backend
    stored = {name: weight for name, weight in backend.weights.items() if "experts_" in name}
    assert stored
    assert all(isinstance(weight, Fp8Weight) for weight in stored.values())
    assert not isinstance(backend.weights["layers.0.router"], Fp8Weight)
    (answer,) = greedy(llm, [random_prompt(9, tiny.case.seed)])
    expected = oracle_logits(tiny.oracle, random_prompt(9, tiny.case.seed))[-1].log_softmax(-1)
    errors = [abs(entry.logprob - float(expected[token])) for token, entry in answer.logprobs[0].items()]
    assert max(errors) < 0.5


def test_too_many_experts_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_registration, "MOST_EXPERTS", 6)
    with pytest.raises(UnsupportedError, match="op experts has no implementation"):
        open_here(monkeypatch, made("qwen3_moe", tmp_path).path)


@pytest.mark.slow
def test_experts_that_a_file_holds_in_mxfp4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are multiplied as they are: log-probabilities of the values that the file means."""
    case = CASES["gpt_oss"]
    tiny = make_gguf(replace(case, settings=case.settings | {"num_hidden_layers": 2}), "MXFP4", tmp_path / "m.gguf")
    llm = open_here(monkeypatch, tiny.path)
    backend: Any = llm.core.backend
    held = {name: weight for name, weight in backend.weights.items() if isinstance(weight, Mxfp4Experts)}
    assert set(held) == {f"layers.{i}.experts_{name}" for i in range(2) for name in ("gate_up", "down")}
    assert backend.fallback_ops == []
    prompts = [random_prompt(length, tiny.case.seed + length) for length in (7, 3)]
    for prompt, answer in zip(prompts, greedy(llm, prompts), strict=True):
        assert_as_the_oracle(tiny, prompt, answer)
