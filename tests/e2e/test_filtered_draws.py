"""The demo model's tokens under top_k, top_p and min_p: those that the sampler draws from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.seeds import SEED
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.runner.cpu_backend import CpuBackend
from tokenspeed.runner.edits import SampledRow
from tokenspeed.runner.sampler import sample, sampler_inputs

FILTERS: list[dict[str, Any]] = [
    {"top_k": 40, "top_p": 0.95},
    {"top_k": 40},
    {"top_k": 3, "top_p": 0.7},
    {"top_k": 1000, "top_p": 0.99},
    {"top_p": 0.95},
    {"top_p": 0.3},
    {"top_p": 1 - 1e-9},
    {"min_p": 0.05},
    {"top_k": 200, "min_p": 0.001, "top_p": 0.9},
]
PROMPTS = ["The history of the lighthouse begins", "def main(args):\n", "1 2 3 4 5 6"]


class Compared:
    """A backend whose every pick is made under all filters too, each against the sampler."""

    def __init__(self, backend: CpuBackend) -> None:
        self.real, self.logits = backend.pick, backend.logits
        self.draws = self.calls = self.left = 0

    def pick(self, rows: Sequence[int], asks: Sequence[SampledRow]) -> list[int] | None:
        logits = self.logits(rows)
        for number, filters in enumerate(FILTERS):
            temperature = (0.5, 0.8, 1.0, 1.5)[(number + self.draws) % 4]
            fields = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": temperature, **filters}
            drawn = [
                SampledRow(msgspec.structs.replace(ask.sampling, **fields), ask.tokens, ask.num_prompt, ask.position)
                for ask in asks
            ]
            found = self.real(rows, drawn)
            self.draws, self.calls = self.draws + len(drawn), self.calls + 1
            if found is None:  # a row whose draw is too close to call leaves those beside it, too
                self.left += 1
                continue
            inputs = sampler_inputs(drawn, logits.shape[1], torch.device("cpu"))
            assert found == sample(logits, inputs).tokens.tolist(), fields
        return self.real(rows, asks)


@pytest.mark.slow
@pytest.mark.parametrize("lm_head", ["screened", "full"])
def test_thousands_of_draws(demo_path: Path, lm_head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBackend, "max_passes", 1)  # several in one step pick in C++, unseen here
    llm = LLM(str(demo_path), lm_head=lm_head, max_model_len=512)
    try:
        backend = llm.core.backend
        assert isinstance(backend, CpuBackend)
        compared = Compared(backend)
        monkeypatch.setattr(backend, "pick", compared.pick)
        params = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True, seed=SEED)
        llm.generate([*PROMPTS], params, use_tqdm=False)
        llm.generate(PROMPTS[0], params, use_tqdm=False)
    finally:
        llm.close()
    assert compared.draws == 4 * 40 * len(FILTERS)
    assert compared.left <= compared.calls // 100
