"""Hidden states after the final norm, as transformers' base models give them, through the whole engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.parity_tools import CASES, FAMILY_CASES, Tiny, random_prompt
from tests.seeds import SEED
from tokenspeed import LLM

ATOL = 2e-4
NATIVE = 3e-3
"""Of the C++ walk, whose activations keep 16 bits per block of 32; states are of order 1."""
SETTINGS: dict[str, Any] = {"max_num_batched_tokens": 16, "block_size": 4, "max_num_seqs": 3}
LENGTHS = (21, 1, 40, 2, 9)


def expected(made: Tiny, prompt: list[int]) -> npt.NDArray[np.float32]:
    """float32 [tokens, hidden size]."""
    with torch.inference_mode():
        states = made.oracle.base_model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0]
    return states.numpy()


def check(made: Tiny, llm: LLM, atol: float) -> None:
    least = 17 if made.case.name == "phi3-long" else 0  # transformers takes other rotations for shorter ones
    prompts = [random_prompt(least + length, SEED + length) for length in LENGTHS]
    states = [expected(made, prompt) for prompt in prompts]
    wanted = {"last": [each[-1] for each in states], "mean": [each.mean(0) for each in states]}
    for way, vectors in wanted.items():
        found = llm.embed(prompts, pooling=way, normalize=False, use_tqdm=False)
        assert 0.1 < np.std(vectors[0]) < 5, "the tolerance is meant for states of order 1"
        for output, vector in zip(found, vectors, strict=True):
            np.testing.assert_allclose(output.outputs.embedding, vector, rtol=0, atol=atol)
    llm.core.cache.check_idle()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAMILY_CASES else [pytest.mark.slow]) for name in CASES]
)
def test_float32(tiny, name: str) -> None:
    made = tiny(name, "F32")
    check(made, LLM(str(made.path), dtype="float32", **SETTINGS), ATOL)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "granite"])
def test_the_cpu_walk(tiny, name: str) -> None:
    made = tiny(name, "BF16")
    llm = LLM(str(made.path), dtype="bfloat16", kv_cache_dtype="float32", threads=2, **SETTINGS)
    assert llm.core.backend.name == "cpu"
    check(made, llm, NATIVE)
