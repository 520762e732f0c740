"""docs/serving.md names every field and route that there is, and no other."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tokenspeed.config.serving import Limits
from tokenspeed.config.settings import flag
from tokenspeed.server.app import create_app
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
from tokenspeed.server.state import ServerState

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


BOTH = "`/v1/completions` and `/v1/chat/completions` alike"


POOLING = "`/v1/embeddings`, `/v1/score`, `/v1/rerank` and `/rerank` alike"


def rows(heading: str) -> dict[str, str]:
    """The table whose second column is headed so: its cells by the first one."""
    lines = TEXT.split(f"| | {heading} |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    return {name.strip(): cell for _, name, cell, _ in (line.split("|") for line in lines)}


def named(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", cell))


def unsupported(cell: str) -> dict[str, tuple[Any, ...]]:
    """Names, with the values in the brackets behind them."""
    found = re.findall(r"`(\w+)`(?: \(([^)]*)\))?", cell)
    return {name: tuple(json.loads(value) for value in re.findall(r"`(.*?)`", values)) for name, values in found}


@pytest.mark.parametrize(
    "headings, form",
    [
        ((BOTH, "`/v1/completions`"), COMPLETION),
        ((BOTH, "`/v1/chat/completions`"), CHAT),
        ((POOLING, "`/v1/embeddings`"), EMBEDDING),
        ((POOLING, "`/v1/score`"), SCORE),
        ((POOLING, "`/v1/rerank` `/rerank`"), RERANK),
        (("`/tokenize`",), TOKENIZE),
        (("`/detokenize`",), DETOKENIZE),
    ],
)
def test_fields(headings: tuple[str, ...], form: Form[Any]) -> None:
    tables = [rows(heading) for heading in headings]
    assert {name for table in tables for name in table} <= {"honoured", "without effect", "not supported"}
    honoured = [named(table["honoured"]) for table in tables]
    assert set().union(*honoured) == set(form.honoured.__struct_fields__)
    assert not set(honoured[0]) & set().union(*honoured[1:])
    assert {name for table in tables for name in named(table.get("without effect", ""))} == form.without_effect
    neutral = [unsupported(table.get("not supported", "")) for table in tables]
    assert {name: values for table in neutral for name, values in table.items()} == form.neutral


def test_fields_alike_have_the_same_type() -> None:
    types = [{each.name: each.type for each in msgspec.structs.fields(form.honoured)} for form in (COMPLETION, CHAT)]
    alike = set(named(rows(BOTH)["honoured"]))
    assert {name for name in types[0].keys() & types[1].keys() if types[0][name] != types[1][name]} == {"logprobs"}
    assert types[0].keys() & types[1].keys() - alike == {"logprobs", "max_tokens", "prompt_logprobs"}


def test_limits() -> None:
    text = TEXT.split("## Limits\n")[1].split("\n## ")[0]
    shown = set(re.findall(r"`(--[\w-]+)`", text))
    assert shown == {flag(setting.name) for setting in fields(Limits)} | {"--max-model-len"}


def test_routes() -> None:
    shown = set(re.findall(r"`(?:GET|POST) (/[\w/.]+)`", TEXT))
    # The schema knows the routes of included routers too.
    assert shown == set(create_app(ServerState()).openapi()["paths"])
