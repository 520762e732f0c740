"""Every family, every file format: logits of every position as transformers computes them from the same values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _pytest.mark.structures import ParameterSet

from tests.parity_cases import GGUF_CASES, MORE_FAMILY_CASES
from tests.parity_tools import (
    CASES,
    FAMILY_CASES,
    PROMPT_LENGTHS,
    VOCAB,
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


def assert_same_logits(checkpoint, lengths=PROMPT_LENGTHS, chunk=None, page_size=4, opened=None):
    model = load(checkpoint.path, length=opened)
    for length in lengths:
        prompt = random_prompt(length, checkpoint.case.seed + length)
        expected = oracle_logits(checkpoint.oracle, prompt)
        assert 0.3 < expected.std() < 5, "the tolerance is meant for logits of order 1"
        logits = Walker(model, page_size=page_size).logits(prompt, chunk)
        torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)


def kinds_of_matrices(path: Path) -> set[str]:
    tensors = open_gguf(path).tensors
    return {info.dtype for name, info in tensors.items() if len(info.shape) > 1 and not name.endswith(".bias")}


def of_cases(names: Iterable[str], formats: Iterable[str], fast: str) -> list[ParameterSet]:
    """Every case and format; of the later families all formats but one are slow."""
    early = {case.model_type for name, case in CASES.items() if name in FAMILY_CASES}
    marks = {name: [] if CASES[name].model_type in early else [pytest.mark.slow] for name in names}
    return [pytest.param(name, fmt, marks=[] if fmt == fast else marks[name]) for name in marks for fmt in formats]


@pytest.mark.parametrize("name, fmt", of_cases(CASES, SAFETENSORS, "F32"))
def test_safetensors(tiny, name, fmt):
    checkpoint = tiny(name, fmt)
    shards = len(list(checkpoint.path.glob("*.safetensors")))
    assert (shards > 1) == (fmt == "F32-sharded")
    assert_same_logits(checkpoint)


@pytest.mark.parametrize("name, fmt", of_cases(GGUF_CASES, GGUF, "gguf-F32"))
def test_gguf(tiny, name, fmt):
    checkpoint = tiny(name, fmt)
    assert kinds_of_matrices(checkpoint.path) == {fmt.removeprefix("gguf-")}
    assert_same_logits(checkpoint)


@pytest.mark.parametrize("name", ["gpt_oss", "llama"])
def test_gguf_of_mxfp4(tiny, name):
    checkpoint = tiny(name, "gguf-MXFP4")
    assert kinds_of_matrices(checkpoint.path) == {"MXFP4"}
    assert_same_logits(checkpoint)


@pytest.mark.parametrize("name", [*FAMILY_CASES, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE_FAMILY_CASES)])
def test_gguf_of_mixed_k_quants(tiny, name):
    checkpoint = tiny(name, "gguf-K")
    tensors = open_gguf(checkpoint.path).tensors
    assert kinds_of_matrices(checkpoint.path) == {"Q4_K", "Q6_K", "Q5_0"}
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
@pytest.mark.parametrize("name", [*FAMILY_CASES, *MORE_FAMILY_CASES, "phi3-long", "ministral"])
def test_chunks_and_pages(tiny, name, chunk, page_size):
    assert_same_logits(tiny(name, "F32"), (40,), chunk, page_size)


def test_attention_scale_apart_from_the_head_size(tmp_path):
    """gemma3's query_pre_attn_scalar, which only config.json states."""
    case = CASES["gemma3"]
    case = replace(case, settings=case.settings | {"query_pre_attn_scalar": 20})
    assert_same_logits(make_safetensors(case, "F32", tmp_path))


@pytest.mark.parametrize("fmt", ["F32", "gguf-F32"])
def test_longrope_of_an_engine_no_longer_than_the_original_context(tiny, fmt):
    """transformers chooses by the length of a sequence, the engine by the most that a sequence may have."""
    checkpoint = tiny("phi3-long", fmt)
    assert_same_logits(checkpoint, (3, 16), opened=16)
    for length, original in ((16, True), (17, False), (None, False)):
        assert load(checkpoint.path, length=length).definition.config.stretched != original
    with pytest.raises(AssertionError, match="not close"):
        assert_same_logits(checkpoint, (16,), opened=17)


@pytest.mark.parametrize("name", ["mistral", "phi3"])
def test_the_oracle_has_a_window_in_every_layer(tiny, name):
    """The first of 21 tokens is out of reach of the last, by two layers of 8."""
    oracle = tiny(name, "F32").oracle
    prompt = random_prompt(21, 7)
    moved = oracle_logits(oracle, [(prompt[0] + 1) % VOCAB, *prompt[1:]])
    assert torch.equal(oracle_logits(oracle, prompt)[-1], moved[-1])
