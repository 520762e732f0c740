"""Checkpoints of models that were saved without a head, as embedding models are: names without "model."."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tests.parity_tools import CASES, Tiny, make_safetensors, random_prompt
from tests.seeds import SEED
from tokenspeed import LLM, SamplingParams
from tokenspeed.contracts.errors import ParameterError, WeightError
from tokenspeed.contracts.step import Pooling
from tokenspeed.sol.floor import stored_bytes
from tokenspeed.sol.report import find_definition

SETTINGS: dict[str, Any] = {"dtype": "float32", "max_num_batched_tokens": 16, "block_size": 4}
GREEDY = SamplingParams(temperature=0, max_tokens=1)


def made(folder: Path, name: str, tied: bool) -> Tiny:
    case = CASES[name]
    case = replace(case, settings=case.settings | {"tie_word_embeddings": tied})
    tiny = make_safetensors(case, "F32", folder, auto=AutoModel)
    names = load_file(folder / "model.safetensors").keys()
    assert "embed_tokens.weight" in names
    assert not any(each.startswith(("model.", "lm_head")) for each in names)
    return tiny


def check(tiny: Tiny, llm: LLM) -> None:
    prompt = random_prompt(23, SEED)
    with torch.inference_mode():
        states = tiny.oracle(torch.tensor([prompt]), use_cache=False).last_hidden_state[0].numpy()
    for way, wanted in (("last", states[-1]), ("mean", states.mean(0))):
        (found,) = llm.embed(prompt, pooling=way, normalize=False, use_tqdm=False)
        np.testing.assert_allclose(found.outputs.embedding, wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3"])
def test_embeddings_alone(tmp_path: Path, name: str) -> None:
    tiny = made(tmp_path, name, tied=False)
    llm = LLM(str(tmp_path), **SETTINGS)
    check(tiny, llm)
    _, definition, checkpoint = find_definition(str(tmp_path))
    assert stored_bytes(definition.weights, checkpoint, "none").keys() == llm.core.model.packed.keys()
    with pytest.raises(ParameterError, match="completes nothing: it has no head, and gives embeddings alone"):
        llm.generate([1, 2], GREEDY, use_tqdm=False)
    for asked in (Pooling("score"), Pooling("score", token_ids=[1])):
        with pytest.raises(ParameterError, match="scores nothing: it has no head"):
            llm._pool([[1, 2]], asked, False)


def test_a_tied_head_is_there(tmp_path: Path) -> None:
    tiny = made(tmp_path, "qwen3", tied=True)
    llm = LLM(str(tmp_path), **SETTINGS)
    check(tiny, llm)
    prompt = random_prompt(9, SEED)
    with torch.inference_mode():
        state = tiny.oracle(torch.tensor([prompt]), use_cache=False).last_hidden_state[0, -1]
    table = tiny.oracle.get_parameter("embed_tokens.weight").detach()
    ids = list(range(0, len(table), 7))
    (output,) = llm._pool([prompt], Pooling("score", token_ids=ids), False)
    assert output.pooled is not None
    np.testing.assert_allclose(output.pooled, (table @ state)[ids].numpy(), rtol=0, atol=2e-4)
    assert len(llm.generate(prompt_token_ids=[prompt], sampling_params=GREEDY)[0].outputs[0].token_ids) == 1


def test_a_language_model_that_lacks_its_head_is_broken(tmp_path: Path) -> None:
    tiny = make_safetensors(CASES["qwen3"], "F32", tmp_path)
    tensors = load_file(tiny.path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tiny.path / "model.safetensors")
    with pytest.raises(WeightError, match=r"lacks 1 tensor: 'lm_head\.weight'"):
        LLM(str(tmp_path), **SETTINGS)
