"""docs/serving.md names every field and route that there is, and no other."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from tokenspeed.config.serving import Limits
from tokenspeed.config.settings import flag
from tokenspeed.server.app import create_app
from tokenspeed.server.openai.fields import CHAT_NEUTRAL, CHAT_WITHOUT_EFFECT, NEUTRAL, WITHOUT_EFFECT
from tokenspeed.server.openai.requests import ChatRequest, CompletionRequest
from tokenspeed.server.state import ServerState

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def named(row: str) -> tuple[set[str], set[str]]:
    """Fields of completions and of chats, in the row of the table that begins so."""
    (line,) = (line for line in TEXT.splitlines() if line.startswith(f"| {row}"))
    both, completions, chat = (set(re.findall(r"`(\w+)`", cell)) for cell in line.split("|")[2:5])
    return both | completions, both | chat


def test_fields() -> None:
    honoured = set(CompletionRequest.__struct_fields__), set(ChatRequest.__struct_fields__)
    assert named("honoured") == honoured
    assert named("accepted, without effect") == (set(WITHOUT_EFFECT), set(CHAT_WITHOUT_EFFECT))
    assert named("refused") == (set(NEUTRAL), set(CHAT_NEUTRAL))


def test_limits() -> None:
    text = TEXT.split("## Limits\n")[1].split("\n## ")[0]
    shown = set(re.findall(r"`(--[\w-]+)`", text))
    assert shown == {flag(setting.name) for setting in fields(Limits)} | {"--max-model-len"}


def test_routes() -> None:
    shown = set(re.findall(r"`(?:GET|POST) (/[\w/]+)`", TEXT))
    # The schema knows the routes of included routers too.
    assert shown == set(create_app(ServerState()).openapi()["paths"])
