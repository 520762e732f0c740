"""Sequence-classification heads: logits as transformers computes them, and what such a model refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification

from tests.engine.async_tools import write_byte_tokenizer
from tests.parity_tools import CASES, VOCAB, Tiny, make_safetensors, random_prompt
from tests.seeds import SEED
from tokenspeed import LLM, SamplingParams
from tokenspeed.contracts.errors import ParameterError, UnsupportedError
from tokenspeed.contracts.step import Pooling
from tokenspeed.models.registry import CLASSIFIERS, define_from_hf

ATOL = 2e-4
NATIVE = 5e-3
"""Of the C++ walk, as of logits of order 1."""
SETTINGS: dict[str, Any] = {"max_num_batched_tokens": 16, "block_size": 4, "max_num_seqs": 3}
NAMES = ("llama", "llama-llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
MORE = ("glm4", "olmo2", "phi3", "smollm3")
LENGTHS = (21, 1, 40, 5)
Maker = Callable[..., Tiny]


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """classifier(case name, labels, dtype)."""
    made: dict[tuple[str, int, str, int], Tiny] = {}

    def make(name: str, labels: int, dtype: str = "F32", vocab: int = VOCAB) -> Tiny:
        key = (name, labels, dtype, vocab)
        if key not in made:
            case = CASES[name]
            case = replace(case, settings=case.settings | {"num_labels": labels, "vocab_size": vocab})
            folder = tmp_path_factory.mktemp(f"{name}-{labels}")
            made[key] = make_safetensors(case, dtype, folder, auto=AutoModelForSequenceClassification)
        return made[key]

    return make


def expected(made: Tiny, prompt: list[int]) -> npt.NDArray[np.float32]:
    """float32 [labels]."""
    with torch.inference_mode():
        return made.oracle(torch.tensor([prompt]), use_cache=False).logits[0].numpy()


def check(made: Tiny, llm: LLM, labels: int, atol: float) -> None:
    prompts = [random_prompt(length, SEED + length) for length in LENGTHS]
    logits = np.array([expected(made, prompt) for prompt in prompts])
    assert logits.shape == (len(prompts), labels)
    assert 0.05 < logits.std() < 5, "the tolerance is meant for logits of order 1"
    found = llm._pool([{"prompt_token_ids": prompt} for prompt in prompts], Pooling("score"), False)
    for output, wanted in zip(found, logits, strict=True):
        assert output.pooled is not None
        np.testing.assert_allclose(output.pooled, wanted, rtol=0, atol=atol)
    wide = torch.from_numpy(logits).double()
    probabilities = wide.softmax(-1) if labels > 1 else wide.sigmoid()
    classes = llm.classify(prompts, use_tqdm=False)
    np.testing.assert_allclose([each.outputs.probs for each in classes], probabilities.numpy(), rtol=0, atol=atol)
    llm.core.cache.check_idle()


@pytest.mark.parametrize("labels", [1, 2, 5])
@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_float32(classifier: Maker, name: str, labels: int) -> None:
    made = classifier(name, labels)
    check(made, LLM(str(made.path), dtype="float32", **SETTINGS), labels, ATOL)


@pytest.mark.parametrize("labels", [1, 19])
@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_the_cpu_walk(classifier: Maker, name: str, labels: int) -> None:
    made = classifier(name, labels, "BF16")
    llm = LLM(str(made.path), dtype="bfloat16", kv_cache_dtype="float32", threads=2, **SETTINGS)
    assert llm.core.backend.name == "cpu"
    check(made, llm, labels, NATIVE)


def test_quantised_at_load(classifier: Maker) -> None:
    made = classifier("llama", 3, "BF16")
    llm = LLM(str(made.path), quantization="int8", threads=2, **SETTINGS)
    assert llm.core.model.formats["score"] == ("Q8_0",)
    (found,) = llm.classify([[1, 2, 3]], use_tqdm=False)
    assert sum(found.outputs.probs) == pytest.approx(1)


def test_every_family_of_the_table_is_tested() -> None:
    families = {define_from_hf(_settings(name)).family.name for name in (*NAMES, *MORE)}
    assert families == set(CLASSIFIERS)


def _settings(name: str) -> dict[str, Any]:
    case = CASES[name]
    shown = {key: value for key, value in case.settings.items() if value is not None}
    return shown | {"model_type": case.model_type}


def test_it_has_no_language_head(classifier: Maker) -> None:
    made = classifier("qwen3", 2)
    llm = LLM(str(made.path), dtype="float32", **SETTINGS)
    with pytest.raises(ParameterError, match="completes nothing: it has a classification head of 2 labels"):
        llm.generate([1, 2, 3], SamplingParams(max_tokens=1), use_tqdm=False)
    with pytest.raises(ParameterError, match="in place of a language head: it scores all its labels"):
        llm._pool([[1, 2]], Pooling("score", token_ids=[1, 2]), False)
    (vector,) = llm.embed([[1, 2, 3]], normalize=False, use_tqdm=False)
    with torch.inference_mode():
        states = made.oracle.base_model(torch.tensor([[1, 2, 3]]), use_cache=False).last_hidden_state[0]
    np.testing.assert_allclose(vector.outputs.embedding, states[-1].numpy(), rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    "instruction, labels, message", [("x", 1, "instruction: .* no template"), (None, 3, "3 labels")]
)
def test_what_it_cannot_score(classifier: Maker, instruction: str | None, labels: int, message: str) -> None:
    made = classifier("llama", labels, "F32", 300)
    write_byte_tokenizer(made.path)
    with pytest.raises(ParameterError, match=message):
        LLM(str(made.path), dtype="float32", **SETTINGS).score("q", ["d"], instruction)


def test_scores_of_pairs(classifier: Maker) -> None:
    """A pair is the two texts as the tokenizer joins them, with a bos before each."""
    made = classifier("llama", 1, "F32", 300)
    write_byte_tokenizer(made.path)
    fast = Tokenizer.from_file(str(made.path / "tokenizer.json"))
    fast.add_special_tokens(["<s>"])
    bos = fast.token_to_id("<s>")
    assert bos is not None
    fast.post_processor = TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", bos)])
    fast.save(str(made.path / "tokenizer.json"))
    llm = LLM(str(made.path), dtype="float32", **SETTINGS)
    documents = ["It is.", "", "Why, of course?"]
    found = llm.score("Is it?", documents, use_tqdm=False)
    for output, document in zip(found, documents, strict=True):
        ids = fast.encode("Is it?", document).ids
        assert output.prompt_token_ids == ids
        assert ids.count(bos) == 2
        wanted = 1 / (1 + np.exp(-expected(made, ids)[0]))
        assert output.outputs.score == pytest.approx(wanted, abs=ATOL)
    (first,) = llm.score(["Is it?"], documents[0], use_tqdm=False)
    assert first.outputs.score == pytest.approx(found[0].outputs.score, abs=2e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["GraniteForSequenceClassification"], "model_type": "granite"}, "heads of: gemma2, gemma3"),
        ({"problem_type": "multi_label_classification"}, "multi_label_classification"),
    ],
)
def test_heads_that_are_refused(changes: dict[str, Any], message: str) -> None:
    config = _settings("llama") | {"architectures": ["LlamaForSequenceClassification"]}
    with pytest.raises(UnsupportedError, match=message):
        define_from_hf(config | changes)


def test_labels_of_a_config(classifier: Maker) -> None:
    """transformers writes their names, and nothing where there are two."""
    for labels in (1, 2, 5):
        config = json.loads((classifier("llama", labels).path / "config.json").read_text())
        assert "num_labels" not in config
        assert ("id2label" in config) == (labels != 2)
        assert define_from_hf(config).config.num_labels == labels
    assert define_from_hf(_settings("llama")).config.num_labels == 0
