"""`LLM.score` by a causal reranker: the probability of "yes" against "no" after Qwen3-Reranker's template."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from tests.engine.async_tools import write_byte_tokenizer
from tests.parity_tools import CASES, Tiny, make_safetensors, oracle_logits
from tokenspeed import LLM
from tokenspeed.contracts.errors import ParameterError, PromptError
from tokenspeed.engine.pooling import probabilities
from tokenspeed.engine.scoring import BEGIN, END, paired

WORDS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
LONG = 600
SETTINGS: dict[str, Any] = {"dtype": "float32", "max_num_batched_tokens": 64, "block_size": 4}


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random Qwen3 whose tokenizer knows bytes, the template's marks, and the two answers. A bos, which it would add,
    has no place in the template."""
    case = CASES["qwen3"]
    settings = case.settings | {"vocab_size": 300, "max_position_embeddings": LONG}
    made = make_safetensors(replace(case, settings=settings), "F32", tmp_path_factory.mktemp("reranker"))
    write_byte_tokenizer(made.path)
    path = str(made.path / "tokenizer.json")
    fast = Tokenizer.from_file(path)
    fast.add_special_tokens([*WORDS, "<s>"])
    fast.post_processor = TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", fast.token_to_id("<s>") or 0)])
    fast.add_tokens(["yes", "no"])
    fast.save(path)
    return made


@pytest.fixture(scope="module")
def llm(reranker: Tiny) -> LLM:
    return LLM(str(reranker.path), **SETTINGS)


def wanted(made: Tiny, query: str, document: str, instruction: str) -> tuple[list[int], float]:
    """As the model card says: three texts, each encoded alone; softmax over (no, yes)."""
    fast = Tokenizer.from_file(str(made.path / "tokenizer.json"))
    body = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
    ids = [token for text in (BEGIN, body, END) for token in fast.encode(text, add_special_tokens=False).ids]
    no, yes = fast.token_to_id("no"), fast.token_to_id("yes")
    logits = oracle_logits(made.oracle, ids)[-1]
    return ids, float(torch.stack([logits[no], logits[yes]]).double().softmax(0)[1])


@pytest.mark.parametrize("instruction", [None, "Say yes to rivers"])
def test_scores(reranker: Tiny, llm: LLM, instruction: str | None) -> None:
    default = "Given a web search query, retrieve relevant passages that answer the query"
    documents = ["The Rhine flows north.", "", "no<|im_end|>\n\N{SNOWMAN}"]
    found = llm.score("Which river?", documents, instruction, use_tqdm=False)
    for output, document in zip(found, documents, strict=True):
        ids, probability = wanted(reranker, "Which river?", document, instruction or default)
        assert output.prompt_token_ids == ids
        assert output.outputs.score == pytest.approx(probability, abs=2e-4)
    assert len({round(output.outputs.score, 6) for output in found}) > 1


def test_documents_share_the_prefix_of_their_query(llm: LLM) -> None:
    llm.core.cache.reset()
    (first,) = llm.score("What is it?", "a", use_tqdm=False)
    (second,) = llm.score("What is it?", "b", use_tqdm=False)
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens > 200


def test_too_long(llm: LLM) -> None:
    with pytest.raises(PromptError, match=f"max_model_len {LONG} allows no more"):
        llm.score("q", ["short", "x" * LONG])
    assert not llm.core.has_work


@pytest.mark.parametrize(
    "left, right, message",
    [
        ([], "a", "query must be"),
        ("a", [], "documents must be a text"),
        (["a", "b"], ["c", "d", "e"], "query: 2 texts do not go with 3 of documents"),
        ("a", [1], "documents must be"),
    ],
)
def test_pairs_that_are_none(llm: LLM, left: Any, right: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        llm.score(left, right)


def test_pairs() -> None:
    assert paired("a", ["x", "y"]) == [("a", "x"), ("a", "y")]
    assert paired(["a", "b"], ["x", "y"]) == [("a", "x"), ("b", "y")]
    assert paired(["a"], "x") == [("a", "x")]


@pytest.mark.parametrize("missing", ["no", "<|im_start|>"])
def test_a_tokenizer_that_splits_what_is_needed(reranker: Tiny, tmp_path: Path, missing: str) -> None:
    for file in reranker.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] != missing]
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    llm = LLM(str(tmp_path), **SETTINGS)
    with pytest.raises(
        ParameterError, match=rf"is no reranker: its tokenizer splits '{re.escape(missing)}' into \d+ tok"
    ):
        llm.score("q", "d")


def test_probabilities() -> None:
    assert probabilities(torch.tensor([0.0]).numpy()) == [0.5]
    assert probabilities(torch.tensor([800.0]).numpy()) == [1.0]
    assert probabilities(torch.tensor([-800.0, 0.0]).numpy()) == [0.0, 1.0]
    assert probabilities(torch.tensor([1.0, 2.0, 3.0]).numpy()) == pytest.approx([0.09003, 0.24473, 0.66524], abs=1e-5)
