"""Gemma 2 by the GPU's runner, its kernels in the interpreter: log-probabilities as transformers computes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.triton.gpu_fakes import FakeLink
from tests.kernels.triton.test_invariant_engine import register_here
from tests.parity_tools import CASES, make_safetensors, oracle_logits, random_prompt
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.runner import build
from tokenspeed.runner.gpu.backend import GpuBackend
from tokenspeed.runner.gpu.executor import GpuExecutor
from tokenspeed.runner.gpu.link import TritonSteps

BOUND = 2e-4


def open_here(monkeypatch: pytest.MonkeyPatch, path: Path) -> LLM:
    def executor(backend: GpuBackend, arena: Any, max_num_seqs: int, max_len: int) -> GpuExecutor:
        return GpuExecutor(
            backend, arena, TritonSteps(backend.num_heads, 4), FakeLink(), max_num_seqs=max_num_seqs, max_len=max_len
        )

    with monkeypatch.context() as patch:
        patch.setattr(build, "choose_backend", lambda model, *rest: GpuBackend(model, register=register_here))
        patch.setattr(build, "gpu_executor", executor)
        return LLM(str(path), dtype="float32", max_model_len=64, max_num_seqs=2, kv_cache_memory_bytes=4 << 20)


@pytest.mark.slow
def test_soft_caps_of_scores_and_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["gemma2"]
    made = make_safetensors(replace(case, settings=case.settings | {"num_hidden_layers": 2}), "F32", tmp_path)
    llm = open_here(monkeypatch, made.path)
    prompt = random_prompt(11, case.seed)
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=5, ignore_eos=True)
    (output,) = llm.generate(prompt_token_ids=prompt, sampling_params=params, use_tqdm=False)
    assert llm.core.backend.fallback_ops == []
    answer = output.outputs[0]
    expected = oracle_logits(made.oracle, prompt + answer.token_ids[:-1])[len(prompt) - 1 :].log_softmax(-1)
    assert answer.logprobs is not None
    for row, entries in zip(expected, answer.logprobs, strict=True):
        best = row.topk(5)
        assert {token: entry.logprob for token, entry in entries.items()} == pytest.approx(
            dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)), abs=BOUND
        )
    assert answer.token_ids == torch.stack([row.argmax() for row in expected]).tolist()
