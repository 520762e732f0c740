"""/openapi.json names the routes there are, their fields, statuses and keys, and the bounds that are checked."""

from __future__ import annotations

import copy
import secrets
from typing import Any

import jsonschema_rs
import msgspec
import pytest

from tests.server.conftest import Serve, Served
from tokenspeed import __version__
from tokenspeed.config.serving import Limits
from tokenspeed.server.access import Access
from tokenspeed.server.app import create_app
from tokenspeed.server.errors import HEADERS
from tokenspeed.server.keys import ApiKeys
from tokenspeed.server.openai.fields import CHAT_NEUTRAL, CHAT_WITHOUT_EFFECT, NEUTRAL, WITHOUT_EFFECT
from tokenspeed.server.openai.requests import (
    CHAT,
    COMPLETION,
    DETOKENIZE,
    EMBEDDING,
    RERANK,
    SCORE,
    TOKENIZE,
    Form,
)
from tokenspeed.server.openapi import openapi
from tokenspeed.server.operations import OPERATIONS
from tokenspeed.server.state import ServerState

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
TALK = [{"role": "user", "content": "hi"}]
PROMPTS: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": "hi"}, CHATS: {"messages": TALK}}
"""What each endpoint needs."""


def of(path: str, **limits: Any) -> dict[str, Any]:
    """Properties of a POST's body."""
    document = openapi(ServerState(limits=Limits(**limits)))
    content = document["paths"][path]["post"]["requestBody"]["content"]
    name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
    schema = document["components"]["schemas"][name]
    assert schema["additionalProperties"] is False
    return schema["properties"]


def references(part: Any) -> set[str]:
    if isinstance(part, dict):
        own = {part["$ref"]} if isinstance(part.get("$ref"), str) else set()
        return own.union(*map(references, part.values()))
    return set().union(*map(references, part)) if isinstance(part, list) else set()


def test_it_is_served_and_whole(served: Served) -> None:
    response = served.client.get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert document == msgspec.json.decode(msgspec.json.encode(openapi(served.state)))
    assert (document["openapi"], document["info"]["version"]) == ("3.2.0", __version__)
    for reference in references(document):
        found: Any = document
        for name in reference.removeprefix("#/").split("/"):
            found = found[name]
    used = {reference.rpartition("/")[2] for reference in references(document)}
    assert set(document["components"]["schemas"]) <= used
    names = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(set(names)) == len(names)


def test_every_route_is_in_it_and_no_other() -> None:
    # The framework's own document knows the routes of included routers too.
    routed = create_app(ServerState()).openapi()["paths"]
    routes = {(method, path) for path, methods in routed.items() for method in methods}
    documented = {(operation.method, operation.path) for operation in OPERATIONS}
    assert routes == documented | {("get", "/openapi.json")}
    assert len(documented) == len(OPERATIONS)
    paths = openapi(ServerState())["paths"]
    assert {(method, path) for path, methods in paths.items() for method in methods} == documented


def test_fields_are_those_that_are_decoded() -> None:
    forms: dict[str, Form[Any]] = {
        COMPLETIONS: COMPLETION,
        CHATS: CHAT,
        "/v1/embeddings": EMBEDDING,
        "/v1/score": SCORE,
        "/v1/rerank": RERANK,
        "/rerank": RERANK,
        "/tokenize": TOKENIZE,
        "/detokenize": DETOKENIZE,
    }
    for path, form in forms.items():
        properties = of(path)
        assert set(properties) == form.known | set(form.neutral)
        assert all(properties[name] == {"description": "accepted, without effect"} for name in form.without_effect)
        assert {name: tuple(properties[name]["enum"]) for name in form.neutral} == {
            name: (None, *values) for name, values in form.neutral.items()
        }
    assert (COMPLETION.without_effect, COMPLETION.neutral) == (WITHOUT_EFFECT, NEUTRAL)
    assert (CHAT.without_effect, CHAT.neutral) == (CHAT_WITHOUT_EFFECT, CHAT_NEUTRAL)


def items_of(part: Any) -> list[Any]:
    found = [part["items"]] if isinstance(part, dict) and "items" in part else []
    parts = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return found + [item for each in parts for item in items_of(each)]


def test_items_have_a_type() -> None:
    items = items_of(openapi(ServerState())["components"]["schemas"])
    assert len(items) > 20
    assert [item for item in items if not {"type", "$ref", "anyOf", "enum"} & set(item)] == []


SAMPLING = ("frequency_penalty", "min_p", "min_tokens", "presence_penalty", "prompt_logprobs", "repetition_penalty")
SHORT = ("n", "seed", "temperature", "top_k", "top_p")
NUMBERS = {
    COMPLETIONS: (*SAMPLING, *SHORT, "max_tokens", "logprobs"),
    CHATS: (*SAMPLING, *SHORT, "max_tokens", "max_completion_tokens", "top_logprobs"),
}
NEEDS: dict[str, dict[str, Any]] = {
    "max_tokens": {"echo": True},
    "min_tokens": {"max_tokens": 2**31 - 1},
    "top_logprobs": {"logprobs": True},
}
"""Without which the least or the most of a field would contradict another one."""
LIMITS = {"max_n": 3, "max_logprobs": 7, "max_stop": 2, "max_stop_len": 5}


def beyond(bounds: dict[str, Any]) -> list[Any]:
    """The nearest numbers that a schema does not allow."""
    step = 1 if "integer" in str(bounds) else 1e-6
    outside = [bounds["exclusiveMinimum"]] if "exclusiveMinimum" in bounds else [bounds["minimum"] - step]
    return outside + ([bounds["maximum"] + step] if "maximum" in bounds else [])


def within(bounds: dict[str, Any]) -> list[Any]:
    inside = [bounds["exclusiveMinimum"] + 1e-6] if "exclusiveMinimum" in bounds else [bounds["minimum"]]
    return inside + ([bounds["maximum"]] if "maximum" in bounds else [])


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
def test_bounds_of_numbers_are_those_that_are_checked(serve: Serve, path: str) -> None:
    served = serve(chat_template="plain", **LIMITS)
    properties = of(path, **LIMITS)
    bounded = {name for name, schema in properties.items() if {"minimum", "exclusiveMinimum"} & set(schema)}
    assert bounded == set(NUMBERS[path])
    for name in NUMBERS[path]:
        needs = NEEDS.get(name, {}) if path == COMPLETIONS or name != "max_tokens" else {}
        for value in within(properties[name]):
            response = served.client.post(path, json=PROMPTS[path] | needs | {name: value})
            assert response.status_code == 200, (name, value, response.text)
        for value in beyond(properties[name]):
            response = served.client.post(path, json=PROMPTS[path] | needs | {name: value})
            assert response.status_code == 400, (name, value)
            assert name.removeprefix("top_").removeprefix("max_completion_") in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "name, good, bad",
    [
        ("stop", ["abcde", ["a", "abcde"], []], ["", "abcdef", ["a", ""], ["a", "b", "c"]]),
        ("cache_salt", ["a"], [""]),
        ("stop_token_ids", [[], [0, 256]], [[-1]]),
        ("allowed_token_ids", [[0]], [[], [-1]]),
        ("bad_words", [["a"], []], [[""]]),
        ("logit_bias", [{"0": 1.5, "256": -1000}], [{"-1": 1}, {"x": 1}, {"01": 1}]),
        ("priority", [-(2**31), 2**31 - 1], [-(2**31) - 1, 2**31, 10**30]),
        ("best_of", [1, None], [True, 2, 0]),
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
def test_other_bounds(serve: Serve, path: str, name: str, good: list[Any], bad: list[Any]) -> None:
    served = serve(chat_template="plain", **LIMITS)
    schema = jsonschema_rs.validator_for(copy.deepcopy(of(path, **LIMITS)[name]))
    for value in good:
        assert schema.is_valid(value), value
        response = served.client.post(path, json=PROMPTS[path] | {name: value})
        assert response.status_code == 200, response.text
    for value in bad:
        assert not schema.is_valid(value), value
        response = served.client.post(path, json=PROMPTS[path] | {name: value})
        assert response.status_code == 400, value
        assert name in response.json()["error"]["message"]


def test_a_flag_can_only_narrow(serve: Serve) -> None:
    assert of(CHATS, max_logprobs=64)["top_logprobs"]["maximum"] == 20
    assert of(CHATS, max_logprobs=3)["top_logprobs"]["maximum"] == 3
    assert of(COMPLETIONS, max_logprobs=64)["logprobs"]["maximum"] == 64


def test_keys(serve: Serve) -> None:
    key = secrets.token_hex(8)
    open_server, guarded = serve(), serve(access=Access(ApiKeys.load([key], None)))
    guarded.state.admin_key = "k"
    assert "securitySchemes" not in open_server.client.get("/openapi.json").json()["components"]
    document = guarded.client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"].keys() == {"apiKey", "adminKey"}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            response = guarded.client.request(method, path)
            asked = [name for each in operation.get("security", ()) for name in each]
            assert asked == (["adminKey"] if path.startswith("/admin/") else ["apiKey"] if asked else []), path
            assert (response.status_code == 401) == bool(asked), path
            assert ("401" in operation["responses"]) == bool(asked), path


def test_statuses_name_their_headers() -> None:
    responses = openapi(ServerState())["components"]["responses"]
    for status, headers in HEADERS.items():
        assert set(responses[str(status)]["headers"]) == {"x-request-id", *headers} - {"Connection"}
