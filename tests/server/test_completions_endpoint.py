"""/v1/completions over HTTP, with a fake engine that shouts its prompt back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from typing import Any

import pytest

from tests.server.conftest import Serve, Served
from tests.server.fake_engine import BEGIN, CACHED, EOS, FakeEngine
from tokenspeed.server.metrics import ServerMetrics
from tokenspeed.server.openai.responses import Timings


def post(served: Served, **fields: Any) -> Any:
    response = served.client.post("/v1/completions", json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def events(served: Served, **fields: Any) -> list[Any]:
    with served.client.stream("POST", "/v1/completions", json={"stream": True} | fields) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def test_the_whole_shape(served: Served) -> None:
    body = post(served, model="fake", prompt="abc")
    assert body.pop("id").startswith("cmpl-")
    assert abs(body.pop("created") - served.state.created) < 100
    assert set(body.pop("timings")) == set(Timings.__struct_fields__)
    assert body == {
        "object": "text_completion",
        "model": "fake",
        "choices": [{"index": 0, "text": "ABC", "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": CACHED},
        },
    }


def test_stream_and_whole_say_the_same(served: Served) -> None:
    whole = post(served, prompt="Grüße, 漢字", max_tokens=30, logprobs=1)
    parts = events(served, prompt="Grüße, 漢字", max_tokens=30, logprobs=1, stream_options={"include_usage": True})
    assert len({part["id"] for part in parts}) == 1
    *pieces, last = parts
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(part["usage"] is None for part in pieces)
    choices = [part["choices"][0] for part in pieces]
    (expected,) = whole["choices"]
    assert "".join(choice["text"] for choice in choices) == expected["text"]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert joined(choice["logprobs"][name] for choice in choices) == expected["logprobs"][name]


def test_a_stream_has_usage_only_when_asked(served: Served) -> None:
    for fields in ({}, {"stream_options": {"include_usage": False}}):
        assert not any("usage" in part for part in events(served, prompt="abc", **fields))


def test_every_prompt_shape(serve: Serve) -> None:
    served = serve()
    ids = [list(b"ab"), list(b"c")]
    for prompt, texts in [("ab", ["AB"]), (["ab", "c"], ["AB", "C"]), (ids[0], ["AB"]), (ids, ["AB", "C"])]:
        body = post(served, prompt=prompt)
        assert [choice["text"] for choice in body["choices"]] == texts
        assert body["usage"]["prompt_tokens"] == sum(map(len, texts))
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == CACHED * len(texts)


def test_several_prompts_with_several_samples(served: Served) -> None:
    expected = {0: "AB", 1: "ABAB", 2: "C", 3: "CC"}
    body = post(served, prompt=["ab", "c"], n=2)
    assert {choice["index"]: choice["text"] for choice in body["choices"]} == expected
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["completion_tokens"] == sum(map(len, expected.values())) + 4
    streamed = dict.fromkeys(expected, "")
    finished = []
    for part in events(served, prompt=["ab", "c"], n=2):
        for choice in part["choices"]:
            streamed[choice["index"]] += choice["text"]
            finished += [choice["index"]] if choice["finish_reason"] else []
    assert streamed == expected
    assert sorted(finished) == [0, 1, 2, 3]


def test_samples_are_in_order_whichever_came_first(serve: Serve) -> None:
    served = serve(FakeEngine(backwards=True))
    assert [choice["text"] for choice in post(served, prompt="ab", n=3)["choices"]] == ["AB", "ABAB", "ABABAB"]


def test_special_tokens_are_added_to_completions(served: Served) -> None:
    assert post(served, prompt="<a", return_token_ids=True)["choices"][0]["prompt_token_ids"] == [BEGIN, *b"<a"]


def test_stop_strings(served: Served) -> None:
    (choice,) = post(served, prompt="one two", stop=["WO", "xx"])["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ONE T", "stop", "WO")
    assert "".join(part["choices"][0]["text"] for part in events(served, prompt="one two", stop="WO")) == "ONE T"


def test_length(served: Served) -> None:
    (choice,) = post(served, prompt="x" * 30)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("X" * 16, "length")


def test_logprobs(served: Served) -> None:
    (choice,) = post(served, prompt="ab", logprobs=2, max_tokens=2)["choices"]
    assert choice["logprobs"] == {
        "tokens": ["A", "B"],
        "token_logprobs": [-65 / 512, -66 / 512],
        "top_logprobs": [{"A": -65 / 512, "B": -66 / 512}, {"B": -66 / 512, "C": -67 / 512}],
        "text_offset": [0, 1],
    }
    assert post(served, prompt="ab", logprobs=0, max_tokens=1)["choices"][0]["logprobs"]["top_logprobs"] == [
        {"A": -65 / 512}
    ]


@pytest.mark.parametrize("prompt", ["abcd", list(b"abcd")])
def test_echo(served: Served, prompt: Any) -> None:
    assert post(served, prompt=prompt, echo=True)["choices"][0]["text"] == "abcdABCD"
    texts = [part["choices"][0]["text"] for part in events(served, prompt=prompt, echo=True)]
    assert texts[0].startswith("abcd")
    assert "".join(texts) == "abcdABCD"


def test_echo_with_logprobs_scores_the_prompt(served: Served) -> None:
    body = post(served, prompt="abcd", echo=True, logprobs=1, max_tokens=0)
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abcd", "length")
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c", "d"],
        "token_logprobs": [None, -98 / 512, -99 / 512, -100 / 512],
        "top_logprobs": [None, {"b": -98 / 512}, {"c": -99 / 512}, {"d": -100 / 512}],
        "text_offset": [0, 1, 2, 3],
    }
    assert (body["usage"]["completion_tokens"], body["usage"]["total_tokens"]) == (0, 4)
    streamed = events(served, prompt="abcd", echo=True, logprobs=1, max_tokens=2, n=2)
    tokens: dict[int, list[str]] = {0: [], 1: []}
    for part in streamed:
        tokens[part["choices"][0]["index"]] += part["choices"][0]["logprobs"]["tokens"]
    assert tokens == {0: list("abcdAB"), 1: list("abcdAB")}


@pytest.mark.parametrize("prompt", ["a", "abc", ["abc", "de"], list(b"abc")])
@pytest.mark.parametrize("top, n", [(0, 1), (2, 2)])
def test_prompt_logprobs(served: Served, prompt: Any, top: int, n: int) -> None:
    choices = post(served, prompt=prompt, prompt_logprobs=top, n=n)["choices"]
    texts = [prompt] if isinstance(prompt, str) else prompt if isinstance(prompt[0], str) else ["abc"]
    assert len(choices) == n * len(texts)
    for choice in choices:
        text = texts[choice["index"] // n]
        assert choice["prompt_logprobs"] == [None] + [
            {
                str(ord(letter) + step): {
                    "logprob": -(ord(letter) + step) / 512,
                    "rank": step + 1,
                    "decoded_token": chr(ord(letter) + step),
                }
                for step in range(max(1, top))
            }
            for letter in text[1:]
        ]
        assert choice["logprobs"] is None
    assert "prompt_logprobs" not in post(served, prompt=prompt, logprobs=1, echo=True)["choices"][0]


@pytest.mark.parametrize("fields, complaint", [({"prompt_logprobs": 65}, "65"), ({"stream": True}, "stream")])
def test_prompt_logprobs_that_are_refused(served: Served, fields: dict[str, Any], complaint: str) -> None:
    response = served.client.post("/v1/completions", json={"prompt": "ab", "prompt_logprobs": 1} | fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], complaint in error["message"]) == ("prompt_logprobs", True)


def test_token_ids_are_returned_when_asked(served: Served) -> None:
    (choice,) = post(served, prompt="ab", return_token_ids=True)["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (list(b"ab"), [*b"AB", EOS])
    parts = [part["choices"][0] for part in events(served, prompt="ab", return_token_ids=True)]
    assert joined(part["token_ids"] for part in parts) == [*b"AB", EOS]
    assert [part.get("prompt_token_ids") for part in parts] == [list(b"ab")] + [None] * (len(parts) - 1)


def test_a_model_without_a_tokenizer(serve: Serve) -> None:
    served = serve(FakeEngine(tokenizer=None, answer=lambda request, index: [5, 6, 7]))
    body = post(served, prompt=[1, 2], max_tokens=3, return_token_ids=True, logprobs=1)
    assert (body["choices"][0]["text"], body["choices"][0]["token_ids"]) == ("", [5, 6, 7])
    assert body["usage"]["completion_tokens"] == 3
    last = events(served, prompt=[1, 2], max_tokens=3)[-1]["choices"][0]
    assert (last["text"], last["finish_reason"]) == ("", "length")
    for fields in ({"prompt": "text"}, {"prompt": [1], "echo": True}, {"prompt": [1], "stop": "x"}):
        response = served.client.post("/v1/completions", json=fields)
        assert response.status_code == 400
        assert "tokenizer" in response.json()["error"]["message"]


def test_what_the_engine_is_told(served: Served) -> None:
    post(served, prompt="ab", priority=-3, cache_salt="pepper", seed=11, user="me", temperature=0.5)
    (request,) = served.engine.requests
    assert (request.priority, request.cache_salt, request.seed) == (-3, "pepper", 11)
    assert request.params.temperature == 0.5


def test_metrics_count_samples_and_tokens(served: Served) -> None:
    post(served, prompt=["ab", "cde"], n=2)
    metrics: ServerMetrics = served.state.metrics
    assert (metrics.prompt_tokens, metrics.generation_tokens) == (5, 2 + 4 + 3 + 6 + 4)
    assert metrics.finished["stop"] == 4
    assert [h.count for h in (metrics.ttft, metrics.tpot, metrics.e2e)] == [4, 4, 4]
