"""Embeddings and scores by the GPU runner on a device that is not there: the reference's, beside completions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.triton.gpu_fakes import SETTINGS, FakeLink, open_fake_gpu
from tests.runner.cuda_fake import FakeCard, FakeCuda
from tests.seeds import SEED
from tests.tiny_llama import VOCAB, edit_tensors, write_tiny
from tokenspeed.contracts.errors import ParameterError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.contracts.step import Pooling
from tokenspeed.engine.llm import LLM
from tokenspeed.runner import build, room
from tokenspeed.runner.gpu.executor import GpuExecutor
from tokenspeed.runner.gpu.largest_step import MEAN

LENGTHS = (1, 33, 3, 16, 50, 2)
ASKED = (Pooling("embedding"), Pooling("embedding", mean=True), Pooling("score", token_ids=[7, 90, 7]))
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    print(f"seed {SEED}")
    return write_tiny(tmp_path_factory.mktemp("tiny"), SEED)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(SEED)
    return [rng.integers(0, VOCAB, length).tolist() for length in LENGTHS]


def run(llm: LLM) -> tuple[list[Any], list[Any]]:
    """Completions and what is pooled, in the same steps."""
    texts = llm._submit(prompts()[:2], [GREEDY] * 2)
    pooled = [llm._submit([prompt], [ask])[0] for prompt in prompts() for ask in ASKED]
    llm._finish(texts + pooled, False)
    llm.core.cache.check_idle()
    return [each.output.outputs[0].token_ids for each in texts], [each.output.pooled for each in pooled]


def test_beside_completions_they_are_those_of_the_reference(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = open_fake_gpu(monkeypatch, tiny, FakeLink(), **SETTINGS)
    said, pooled = run(gpu)
    wanted_text, wanted = run(LLM(str(tiny), **SETTINGS))
    assert said == wanted_text
    for found, vector in zip(pooled, wanted, strict=True):
        np.testing.assert_allclose(found, vector, rtol=0, atol=5e-5)
    assert run(gpu)[0] == said  # the device's lengths are right for those who come into the slots


def test_a_prompt_may_fill_the_model(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = open_fake_gpu(monkeypatch, tiny, FakeLink(), max_model_len=40)
    prompt = [SEED % VOCAB] * 39 + [5]
    reference = LLM(str(tiny), **SETTINGS, max_model_len=40)
    for way in ("last", "mean"):
        (found,), (wanted,) = (llm.embed(prompt, pooling=way, use_tqdm=False) for llm in (gpu, reference))
        np.testing.assert_allclose(found.outputs.embedding, wanted.outputs.embedding, rtol=0, atol=5e-5)
    assert len(gpu.generate(prompt_token_ids=[[1, 2]], sampling_params=GREEDY)[0].outputs[0].token_ids) == 10


def test_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a card, whose largest step asks for no tokens."""
    write_tiny(tmp_path, SEED, architectures=["LlamaForSequenceClassification"], id2label={0: "a", 1: "b", 2: "c"})
    score = 0.3 * torch.randn(3, 32, generator=torch.Generator().manual_seed(SEED))
    edit_tensors(tmp_path, {"score.weight": score}, ("lm_head.weight",))
    reference = LLM(str(tmp_path), **SETTINGS).classify(prompts(), use_tqdm=False)
    card = FakeCard(FakeCuda(total=64 * 2**20))
    monkeypatch.setattr(build, "open_card", lambda device: card)
    monkeypatch.setattr(room, "MARGIN_BYTES", 2**20)
    launched: list[Any] = []
    launch = GpuExecutor.launch

    def noted(self: GpuExecutor, plan: Any) -> Any:
        launched.append(plan)
        return launch(self, plan)

    monkeypatch.setattr(GpuExecutor, "launch", noted)
    gpu = open_fake_gpu(monkeypatch, tmp_path, FakeLink(), max_num_batched_tokens=19)
    assert [(len(plan.rows), [new.pooling for new in plan.delta.new]) for plan in launched] == [(4, [MEAN] * 4)]
    for found, wanted in zip(gpu.classify(prompts(), use_tqdm=False), reference, strict=True):
        assert found.outputs.probs == pytest.approx(wanted.outputs.probs, abs=5e-5)
    with pytest.raises(ParameterError, match="completes nothing"):
        gpu.generate(prompt_token_ids=[[1]], sampling_params=GREEDY, use_tqdm=False)
