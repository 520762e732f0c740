"""/v1/score, /v1/rerank and /rerank: vLLM's, Jina's and Cohere's shapes, on both kinds of model that score."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.server.conftest import Serve, Served
from tests.server.fake_engine import MAX_MODEL_LEN, FakeEngine, byte_tokenizer
from tokenspeed.engine.scoring import BEGIN, END

RANKS = ["/v1/rerank", "/rerank"]
YES, NO = "\x04", "\x05"
"""Characters whose ids the fake's tokenizer gives to the answers."""


@pytest.fixture
def classifier(serve: Serve) -> Served:
    return serve(FakeEngine(num_labels=1))


@pytest.fixture
def reranker(serve: Serve) -> Served:
    """Its logits are how often a prompt has the ids of "yes" and "no"."""
    return serve(FakeEngine(tokenizer=byte_tokenizer(ranks=True), max_model_len=1000))


def post(served: Served, path: str, **body: Any) -> dict[str, Any]:
    response = served.client.post(path, json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    assert found["model"] == "fake"
    assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"]
    return found


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def of_texts(*texts: str) -> float:
    """The classifier's."""
    return sigmoid(sum(sum(text.encode()) for text in texts) / 1000)


def test_scores_of_a_classifier(classifier: Served) -> None:
    found = post(classifier, "/v1/score", text_1="a", text_2=["b", "\x01"])
    assert found["object"] == "list"
    assert found["id"].startswith("score-")
    assert [(each["index"], each["object"]) for each in found["data"]] == [(0, "score"), (1, "score")]
    scores = [each["score"] for each in found["data"]]
    assert scores == pytest.approx([of_texts("a", "b"), of_texts("a", "\x01")])
    assert found["usage"]["total_tokens"] == 4
    pairs = post(classifier, "/v1/score", text_1=["a", "bc"], text_2=["x", "y"])
    assert [each["score"] for each in pairs["data"]] == pytest.approx([of_texts("a", "x"), of_texts("bc", "y")])


def test_scores_of_a_reranker(reranker: Served) -> None:
    found = post(reranker, "/v1/score", text_1="q", text_2=["d", YES + YES, NO], instruction="judge")
    assert [each["score"] for each in found["data"]] == pytest.approx([0.5, sigmoid(2), sigmoid(-1)])
    (first, *_) = reranker.engine.requests
    assert bytes(first.prompt_token_ids).decode() == f"{BEGIN}<Instruct>: judge\n<Query>: q\n<Document>: d{END}"
    assert first.pooling is not None
    assert first.pooling.token_ids == [4, 5]


@pytest.mark.parametrize("path", RANKS)
def test_ranking(reranker: Served, path: str) -> None:
    documents = ["d", {"text": YES}, NO, YES * 3]
    found = post(reranker, path, query="q", documents=documents)
    assert [each["index"] for each in found["results"]] == [3, 1, 0, 2]
    assert [each["document"]["text"] for each in found["results"]] == [YES * 3, YES, "d", NO]
    scores = [each["relevance_score"] for each in found["results"]]
    assert scores == pytest.approx([sigmoid(3), sigmoid(1), 0.5, sigmoid(-1)])
    assert found["id"].startswith("rerank-")
    two = post(reranker, path, query="q", documents=documents, top_n=2, return_documents=False)
    assert [(each["index"], set(each)) for each in two["results"]] == [
        (i, {"index", "relevance_score"}) for i in (3, 1)
    ]
    assert len(post(reranker, path, query="q", documents=documents, top_n=9)["results"]) == 4


def test_equals_keep_their_order(reranker: Served) -> None:
    found = post(reranker, "/rerank", query="q", documents=["c", "b", "a"])
    assert [each["index"] for each in found["results"]] == [0, 1, 2]


@pytest.mark.parametrize(
    "path, body, message",
    [
        ("/v1/score", {"text_1": "a"}, "text_2 is missing"),
        ("/v1/score", {"text_1": [], "text_2": "a"}, "text_1 must be a text, or a list of texts"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": "c"}, "text_1: 2 texts do not go with 1 of text_2"),
        ("/v1/score", {"text_1": "", "text_2": ""}, "text_2: both texts of a pair are empty"),
        ("/v1/score", {"text_1": "a", "text_2": "b" * MAX_MODEL_LEN}, f"text_2: {MAX_MODEL_LEN + 1} tokens, but"),
        ("/v1/score", {"text_1": "a", "text_2": ["b"] * 1025}, "text_2: 1025 prompts"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "instruction": "c"}, "instruction: fake has a classification"),
        ("/rerank", {"query": "a", "documents": []}, "documents is empty"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n must be 1 at least, got 0"),
        ("/rerank", {"query": "a", "documents": [{"text": "b", "title": "c"}]}, "title"),
        ("/rerank", {"query": "a", "documents": ["b"], "max_chunks_per_doc": 2}, "max_chunks_per_doc is not supp"),
        ("/rerank", {"query": "a", "documents": ["b"], "truncation": True}, "truncation is not supported"),
        ("/v1/completions", {"prompt": "a"}, "model: fake completes nothing: it has a classification head of 1 lab"),
    ],
)
def test_refusals(classifier: Served, path: str, body: dict[str, Any], message: str) -> None:
    response = classifier.client.post(path, json=body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert classifier.engine.running == []


@pytest.mark.parametrize("path", ["/v1/score", *RANKS])
def test_models_that_do_not_score(serve: Serve, path: str) -> None:
    body = {"text_1": "a", "text_2": "b"} if path == "/v1/score" else {"query": "a", "documents": ["b"]}
    for engine, message in (
        (FakeEngine(), "model: fake is no reranker: its tokenizer splits 'yes' into 3 tokens"),
        (FakeEngine(num_labels=3), "model: fake has 3 labels; a score is made of one"),
        (FakeEngine(tokenizer=None, num_labels=1), "no tokenizer"),
    ):
        response = serve(engine).client.post(path, json=body)
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]
