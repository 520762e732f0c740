"""Every family, every file format: logits of every position as transformers computes them from the same values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.parity_tools import (
    CASES,
    FAMILY_CASES,
    PROMPT_LENGTHS,
    Walker,
    load,
    make_safetensors,
    oracle_logits,
    random_prompt,
)
from tokenspeed.formats.gguf import open_gguf

ATOL = 1e-4
SAFETENSORS = ("F32", "BF16", "F16", "F32-sharded")
GGUF = ("gguf-F32", "gguf-F16", "gguf-BF16", "gguf-Q8_0", "gguf-Q4_0", "gguf-Q5_0")


def assert_same_logits(checkpoint, lengths=PROMPT_LENGTHS, chunk=None, page_size=4):
    model = load(checkpoint.path)
    for length in lengths:
        prompt = random_prompt(length, checkpoint.case.seed + length)
        expected = oracle_logits(checkpoint.oracle, prompt)
        assert 0.3 < expected.std() < 5, "the tolerance is meant for logits of order 1"
        logits = Walker(model, page_size=page_size).logits(prompt, chunk)
        torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("fmt", SAFETENSORS)
@pytest.mark.parametrize("name", CASES)
def test_safetensors(tiny, name, fmt):
    checkpoint = tiny(name, fmt)
    shards = len(list(checkpoint.path.glob("*.safetensors")))
    assert (shards > 1) == (fmt == "F32-sharded")
    assert_same_logits(checkpoint)


@pytest.mark.parametrize("fmt", GGUF)
@pytest.mark.parametrize("name", [name for name in CASES if name != "gemma3-implied"])
def test_gguf(tiny, name, fmt):
    checkpoint = tiny(name, fmt)
    kinds = {info.dtype for info in open_gguf(checkpoint.path).tensors.values() if len(info.shape) == 2}
    assert kinds == {fmt.removeprefix("gguf-")}
    assert_same_logits(checkpoint)


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_gguf_of_mixed_k_quants(tiny, name):
    checkpoint = tiny(name, "gguf-K")
    tensors = open_gguf(checkpoint.path).tensors
    assert {info.dtype for info in tensors.values() if len(info.shape) == 2} == {"Q4_K", "Q6_K", "Q5_0"}
    assert ("rope_freqs.weight" in tensors) == (name == "llama-llama3")
    assert_same_logits(checkpoint)


def test_gguf_without_the_keys_that_gemma3_implies(tiny):
    checkpoint = tiny("gemma3-implied", "gguf-F32")
    assert not {"gemma3.rope.freq_base_swa", "gemma3.attention.sliding_window_pattern"} & set(
        open_gguf(checkpoint.path).metadata
    )
    assert_same_logits(checkpoint)


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("name", FAMILY_CASES)
def test_chunks_and_pages(tiny, name, chunk, page_size):
    assert_same_logits(tiny(name, "F32"), (40,), chunk, page_size)


def test_attention_scale_apart_from_the_head_size(tmp_path):
    """gemma3's query_pre_attn_scalar, which only config.json states."""
    case = CASES["gemma3"]
    case = replace(case, settings=case.settings | {"query_pre_attn_scalar": 20})
    assert_same_logits(make_safetensors(case, "F32", tmp_path))
