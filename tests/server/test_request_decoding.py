"""Bodies of requests: what is honoured, passed over, and refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tokenspeed.contracts.errors import ParameterError
from tokenspeed.contracts.sampling import RequestOutputKind
from tokenspeed.server.errors import ApiError
from tokenspeed.server.openai.fields import CHAT_NEUTRAL, CHAT_WITHOUT_EFFECT, NEUTRAL, WITHOUT_EFFECT
from tokenspeed.server.openai.requests import ChatRequest, CompletionRequest, decode_chat, decode_completion
from tokenspeed.server.openai.sampling import SAME_NAME, chat_params, completion_params

TALK = [{"role": "user", "content": "hi"}]


def completion(**fields: Any) -> CompletionRequest:
    return decode_completion(json.dumps({"prompt": "hi"} | fields).encode())


def chat(**fields: Any) -> ChatRequest:
    return decode_chat(json.dumps({"messages": TALK} | fields).encode())


SAMPLING: dict[str, Any] = {
    "allowed_token_ids": [1, 2],
    "bad_words": ["no"],
    "frequency_penalty": 0.5,
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "logit_bias": {"5": -3},
    "min_p": 0.1,
    "min_tokens": 2,
    "n": 3,
    "presence_penalty": -0.5,
    "prompt_logprobs": 2,
    "repetition_penalty": 1.5,
    "seed": 7,
    "skip_special_tokens": False,
    "stop": ["a", "b"],
    "stop_token_ids": [9],
    "temperature": 0.7,
    "top_k": 4,
    "top_p": 0.9,
}


def test_every_sampling_field_arrives() -> None:
    assert set(SAMPLING) == set(SAME_NAME)
    for params in (completion_params(completion(**SAMPLING), {}), chat_params(chat(**SAMPLING), {})):
        for name, value in SAMPLING.items():
            assert getattr(params, name) == ({5: -3.0} if name == "logit_bias" else value), name
        assert params.output_kind is RequestOutputKind.DELTA


def test_defaults_of_the_checkpoint_give_way_to_the_request() -> None:
    defaults = {"temperature": 0.3, "top_k": 40}
    params = chat_params(chat(temperature=0.9, top_k=None), defaults)
    assert (params.temperature, params.top_k, params.max_tokens) == (0.9, 40, None)
    assert completion_params(completion(), defaults).max_tokens == 16
    assert completion_params(completion(), {"max_tokens": 50}).max_tokens == 50


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 7, "max_completion_tokens": 7}, 7),
        ({}, None),
    ],
)
def test_names_of_the_length_limit(fields: dict[str, int], expected: int | None) -> None:
    assert chat_params(chat(**fields), {}).max_tokens == expected


@pytest.mark.parametrize(
    "params, complaint",
    [
        (lambda: chat_params(chat(max_tokens=5, max_completion_tokens=6), {}), "max_tokens 5 contradicts"),
        (lambda: chat_params(chat(top_logprobs=2), {}), "top_logprobs needs logprobs"),
        (lambda: chat_params(chat(logprobs=True, top_logprobs=21), {}), "top_logprobs must be from 0 to 20, got 21"),
        (lambda: chat_params(chat(n=0), {}), "n must be an integer from 1"),
        (lambda: completion_params(completion(max_tokens=0), {}), "max_tokens 0 needs echo"),
        (lambda: completion_params(completion(temperature=-1), {}), "temperature must be"),
        (lambda: completion_params(completion(logprobs=65), {}), "logprobs must be"),
        (lambda: completion_params(completion(min_tokens=20), {}), "min_tokens is 20, above max_tokens 16"),
        (lambda: completion_params(completion(cache_salt=""), {}), "cache_salt must not be empty"),
    ],
)
def test_out_of_range_and_contradictory(params: Any, complaint: str) -> None:
    with pytest.raises(ParameterError, match=complaint):
        params()


def test_logprobs_of_both_kinds() -> None:
    assert chat_params(chat(), {}).logprobs is None
    assert chat_params(chat(logprobs=False), {}).logprobs is None
    assert chat_params(chat(logprobs=True), {}).logprobs == 0
    assert chat_params(chat(logprobs=True, top_logprobs=3), {}).logprobs == 3
    echoed = completion_params(completion(logprobs=2, echo=True), {})
    assert (echoed.logprobs, echoed.prompt_logprobs) == (2, 2)
    assert completion_params(completion(logprobs=2), {}).prompt_logprobs is None


@pytest.mark.parametrize("decode", [completion, chat])
def test_code_does_not_come_over_http(decode: Any) -> None:
    with pytest.raises(ApiError, match="unknown field: logits_processors") as caught:
        decode(logits_processors=["lambda output, logits: logits"])
    assert (caught.value.status, caught.value.param) == (400, "logits_processors")


def test_all_unknown_fields_are_named() -> None:
    with pytest.raises(ApiError, match="unknown field: temprature, zeal") as caught:
        completion(zeal=1, temprature=0.5, top_p=0.5)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "temprature", "unknown_parameter")
    with pytest.raises(ApiError, match="unknown field: echo"):
        chat(echo=True)


@pytest.mark.parametrize("decode", [completion, chat])
def test_fields_without_effect(decode: Any) -> None:
    names = WITHOUT_EFFECT if decode is completion else CHAT_WITHOUT_EFFECT
    assert {"user", "store", "metadata"} <= names
    assert decode(**{name: {"any": ["thing"]} for name in names}) == decode()


@pytest.mark.parametrize("decode, table", [(completion, NEUTRAL), (chat, CHAT_NEUTRAL)])
def test_unsupported_fields_may_ask_for_nothing(decode: Any, table: dict[str, Any]) -> None:
    for name, neutral in table.items():
        for value in (None, *neutral):
            assert decode(**{name: value}) == decode()
        with pytest.raises(ApiError, match=f"^{name} is not supported") as caught:
            decode(**{name: [{"some": "thing"}]})
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 1.5}, "n"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stop": [1]}, "stop[0]"),
        ({"stream_options": {"include_usage": True, "more": 1}, "stream": True}, "stream_options"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "pirate", "content": "arr"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "x", "audio": {}}]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].content"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools[0].function.strict"),
    ],
)
def test_wrong_types_are_placed(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.message.startswith(f"{param}")


@pytest.mark.parametrize(
    "body, complaint",
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"prompt": "\xff"}', "not JSON"),
        (b'{"prompt": "a", "max_tokens": NaN}', "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"{}", "prompt is missing"),
        (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "a", "user": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"prompt": "a", "stream_options": {}}', "stream_options needs stream"),
    ],
)
def test_broken_bodies(body: bytes, complaint: str) -> None:
    with pytest.raises(ApiError, match=complaint) as caught:
        decode_completion(body)
    assert caught.value.status == 400


def test_null_is_as_good_as_absent() -> None:
    names = set(ChatRequest.__struct_fields__) - {"messages"}
    assert chat(**dict.fromkeys(names)) == chat()
