"""The GGUF files of these tests mean what others take them for: transformers' own reader gets the oracle's values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tests.parity_cases import CASES, GGUF_CASES
from tests.parity_tools import interleave_heads, oracle_logits, random_prompt
from tokenspeed.weights.packed import unpermute_rope

READ = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text")
"""Families whose GGUF files transformers reads."""


@pytest.mark.parametrize("fmt", ["gguf-F32", "gguf-Q8_0", "gguf-Q5_0"])
@pytest.mark.parametrize("name", [name for name in GGUF_CASES if CASES[name].model_type in READ])
def test_transformers_reads_the_same_values(tiny, name, fmt):
    checkpoint = tiny(name, fmt)
    read = load_gguf_checkpoint(str(checkpoint.path), return_tensors=True, model_to_load=checkpoint.oracle)["tensors"]
    wanted = dict(checkpoint.oracle.named_parameters())
    assert set(read) - {"rope_freqs.weight"} == set(wanted)
    for key, values in wanted.items():
        torch.testing.assert_close(read[key], values.detach(), atol=1e-6, rtol=0, msg=lambda m, key=key: f"{key}: {m}")


def test_transformers_runs_our_llama_file(tiny):
    """End to end: config and row order, both read by transformers alone."""
    checkpoint = tiny("llama", "gguf-F32")
    folder, file = str(checkpoint.path.parent), checkpoint.path.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    prompt = random_prompt(21, 3)
    torch.testing.assert_close(
        oracle_logits(model.eval(), prompt), oracle_logits(checkpoint.oracle, prompt), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("heads, head_dim", [(1, 2), (3, 10), (5, 16)])
def test_interleaving_moves_rows_and_our_loader_moves_them_back(heads, head_dim):
    rows = np.arange(heads * head_dim * 3, dtype=np.float32).reshape(-1, 3)
    stored = interleave_heads(rows, heads)
    assert (head_dim == 2) == bool((stored == rows).all())
    assert torch.equal(unpermute_rope(torch.from_numpy(stored), heads), torch.from_numpy(rows))


@pytest.mark.parametrize("heads, head_dim, turned", [(2, 6, 4), (3, 10, 2), (1, 16, 16)])
def test_the_part_of_a_head_that_turns_is_moved_back_alone(heads, head_dim, turned):
    rows = np.arange(heads * head_dim * 3, dtype=np.float32).reshape(heads, head_dim, 3)
    stored = rows.copy()
    stored[:, :turned] = interleave_heads(rows[:, :turned].reshape(-1, 3), heads).reshape(heads, turned, 3)
    back = unpermute_rope(torch.from_numpy(stored).reshape(-1, 3), heads, turned)
    assert torch.equal(back, torch.from_numpy(rows).reshape(-1, 3))
    with pytest.raises(ValueError, match="even size"):
        unpermute_rope(back, heads, turned - 1)
