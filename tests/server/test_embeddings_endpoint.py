"""/v1/embeddings: OpenAI's shapes, by its client and without it; what is refused."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import openai
import pytest

from tests.server.conftest import Serve, Served
from tests.server.fake_engine import HIDDEN_SIZE, MAX_MODEL_LEN, REFUSED, VOCAB_SIZE, FakeEngine

URL = "/v1/embeddings"


def raw(ids: list[int], mean: bool = False) -> list[float]:
    """As the fake engine makes it."""
    return [float(ids[-1 if mean else 0]), float(len(ids)), 1.0]


def unit(values: list[float]) -> list[float]:
    return (np.array(values) / np.linalg.norm(values)).tolist()


def vectors(served: Served, **body: Any) -> list[Any]:
    response = served.client.post(URL, json=body)
    assert response.status_code == 200, response.text
    found = response.json()
    assert (found["object"], found["model"]) == ("list", "fake")
    assert [each["index"] for each in found["data"]] == list(range(len(found["data"])))
    assert {each["object"] for each in found["data"]} == {"embedding"}
    assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] > 0
    return [each["embedding"] for each in found["data"]]


@pytest.mark.parametrize(
    "given, ids",
    [
        ("abc", [[97, 98, 99]]),
        (["abc", "d"], [[97, 98, 99], [100]]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [9]], [[5, 6], [9]]),
        ("x" * MAX_MODEL_LEN, [[120] * MAX_MODEL_LEN]),
    ],
)
def test_inputs(served: Served, given: Any, ids: list[list[int]]) -> None:
    assert vectors(served, input=given, normalize=False) == [raw(each) for each in ids]
    np.testing.assert_allclose(vectors(served, input=given), [unit(raw(each)) for each in ids], atol=1e-6)
    response = served.client.post(URL, json={"input": given})
    assert response.json()["usage"]["total_tokens"] == sum(map(len, ids))


def test_pooling_and_dimensions(served: Served) -> None:
    assert vectors(served, input=[4, 5], pooling="mean", normalize=False) == [raw([4, 5], mean=True)]
    assert vectors(served, input=[4, 5], dimensions=2, normalize=False) == [[4, 2]]
    np.testing.assert_allclose(vectors(served, input=[4, 3], dimensions=2), [unit([4, 2])], atol=1e-6)


def test_base64_is_of_the_same_numbers(served: Served) -> None:
    (text,) = vectors(served, input="abc", encoding_format="base64")
    (numbers,) = vectors(served, input="abc", encoding_format="float")
    assert np.frombuffer(base64.b64decode(text), "<f4").tolist() == numbers


@pytest.mark.parametrize("form", ["float", "base64", openai.omit])
def test_openais_client(served: Served, form: Any) -> None:
    """Left out, the client asks for base64 and decodes it."""
    found = served.openai.embeddings.create(model="fake", input=["abc", "d"], encoding_format=form, user="me")
    assert (found.object, found.usage.prompt_tokens) == ("list", 4)
    wanted = [unit(raw([97, 98, 99])), unit(raw([100]))]
    for item, vector in zip(found.data, wanted, strict=True):
        decoded = item.embedding
        if isinstance(decoded, str):  # as it was asked for outright
            assert form == "base64"
            decoded = np.frombuffer(base64.b64decode(decoded), "<f4").tolist()
        np.testing.assert_allclose(decoded, vector, atol=1e-6)


def test_it_is_counted(served: Served) -> None:
    vectors(served, input=["abc", "d"])
    text = served.client.get("/metrics").text
    assert 'tokenspeed:request_success_total{finished_reason="stop",model_name="fake"} 2.0' in text
    assert 'tokenspeed:prompt_tokens_total{model_name="fake"} 4.0' in text
    assert 'tokenspeed:generation_tokens_total{model_name="fake"} 0.0' in text


@pytest.mark.parametrize(
    "body, param, message",
    [
        ({}, "input", "input is missing"),
        ({"input": ""}, None, "input is empty"),
        ({"input": []}, None, "input must be a text, a list of token ids"),
        ({"input": ["a", 1]}, None, "input must be a text"),
        ({"input": [[]]}, None, "input is empty"),
        ({"input": [VOCAB_SIZE]}, None, "not in the vocabulary"),
        ({"input": "a" * (MAX_MODEL_LEN + 1)}, "input", f"{MAX_MODEL_LEN + 1} tokens, but this model takes"),
        ({"input": ["a"] * 1025}, "input", "1025 prompts of 1 samples, at most 1024"),
        ({"input": "a", "dimensions": 0}, None, "dimensions must be from 1 to 3"),
        ({"input": "a", "dimensions": HIDDEN_SIZE + 1}, None, "those of this model, got 4"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling", "pooling"),
        ({"input": "a", "temperature": 1}, "temperature", "unknown field: temperature"),
        ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "not supported"),
        ({"input": "a", "cache_salt": ""}, "cache_salt", "cache_salt must not be empty"),
    ],
)
def test_refusals(served: Served, body: dict[str, Any], param: str | None, message: str) -> None:
    response = served.client.post(URL, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert error["param"] == param
    assert served.engine.running == []


def test_other_statuses(served: Served) -> None:
    assert served.client.post(URL, json={"input": "a", "model": "other"}).status_code == 404
    assert served.client.post(URL, json={"input": [[1], [REFUSED, 1]]}).status_code == 503
    assert served.client.post(URL, content=b"a", headers={"content-type": "text/plain"}).status_code == 415


def test_a_client_that_leaves_aborts_it(serve: Serve) -> None:
    served = serve(FakeEngine(held_after=0))
    with pytest.raises(openai.APITimeoutError):
        served.openai.embeddings.create(model="fake", input=["abc", "d"], timeout=0.5)
    served.wait(lambda: len(served.engine.aborted) == 2)
    served.wait(lambda: served.state.admission.unanswered == 0)
