"""Every `curl` line of the docs, as it stands there but for the address, against `tokenspeed serve`."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from tests.docs_commands import shown
from tests.server.server_process import GUARD_S, ServerProcess
from tokenspeed.config.demo import DEMO_NAME

ADDRESS = "localhost:8000"


LINES = list(dict.fromkeys(each.text for each in shown() if each.text.startswith("curl ")))


def events(text: str) -> list[Any]:
    *parts, done = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert done == "[DONE]"
    return [json.loads(part) for part in parts]


def of_json(check: Callable[[Any], object]) -> Callable[[str], object]:
    return lambda text: check(json.loads(text))


def said(text: str) -> str:
    """By a chat, as events."""
    return "".join(choice["delta"].get("content") or "" for event in events(text) for choice in event["choices"])


CHECKS: dict[str, Callable[[str], object]] = {
    "/v1/completions": of_json(lambda body: body["choices"][0]["text"].strip()),
    "/v1/chat/completions": lambda text: said(text).strip() and events(text)[-1]["usage"]["completion_tokens"],
    "/v1/models": of_json(lambda body: body["data"][0]["id"] == DEMO_NAME),
    "/v1/embeddings": of_json(lambda body: [len(each["embedding"]) for each in body["data"]] == [128, 128]),
    "/tokenize": of_json(lambda body: body["count"] == len(body["tokens"]) == len(body["token_strs"]) > 0),
    "/detokenize": of_json(lambda body: body["prompt"]),
    "/tokenizer_info": of_json(lambda body: (body["bos_token"], body["eos_token"]) == ("<bos>", "<eos>")),
    "/health": of_json(lambda body: body["status"] == "ok"),
    "/metrics": lambda text: "tokenspeed:generation_tokens_total" in text,
    "/openapi.json": of_json(lambda body: "/v1/completions" in body["paths"]),
    "/admin/state": of_json(lambda body: body["models"] == [DEMO_NAME]),
    "/admin/reset_prefix_cache": of_json(lambda body: body["ok"]),
}
"""What must be true of the body that a route answers."""


def path_of(words: list[str]) -> str:
    (url,) = (word for word in words if word.startswith(ADDRESS))
    return url.removeprefix(ADDRESS)


def test_each_kind_of_route_has_a_line() -> None:
    assert {path_of(shlex.split(line)) for line in LINES} == set(CHECKS)


@pytest.mark.parametrize("line", LINES)
def test_line(demo_server: ServerProcess, line: str) -> None:
    program, *words = shlex.split(line)
    asked = [word.replace(ADDRESS, demo_server.url.removeprefix("http://"), 1) for word in words]
    flags = ["--silent", "--show-error", "--noproxy", "*", "--max-time", str(GUARD_S), "--write-out", "\n%{http_code}"]
    done = subprocess.run([program, *flags, *asked], capture_output=True, text=True, check=True)
    body, _, status = done.stdout.rpartition("\n")
    assert status == "200", done.stdout
    assert CHECKS[path_of(words)](body), body
