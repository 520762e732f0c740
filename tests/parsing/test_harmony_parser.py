"""Replies in harmony, written by hand as the guide has them, cut everywhere."""

from __future__ import annotations

import random

import pytest

from tests.parsing.harmony_bytes import harmony_tokenizer, ids_of
from tests.seeds import SEED
from tokenspeed.parsing.formats import reply_format
from tokenspeed.parsing.harmony import target_of
from tokenspeed.parsing.reply import ReplyParser, ReplyPart, ToolCallPart

TOKENIZER = harmony_tokenizer()
CALLED = '{"location":"Zürich – 東京"}'
PLAIN = (
    "<|channel|>analysis<|message|>Just say 2 + 2 = 4 ✓.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>4 😀<|return|>"
)
CALL = (
    "<|channel|>analysis<|message|>Need the weather.<|end|>"
    f"<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{CALLED}<|call|>"
)
IN_THE_ROLE = f" to=functions.get_weather<|channel|>commentary json<|message|>{CALLED}<|call|>"
PREAMBLE = (
    "<|channel|>commentary<|message|>I look it up.<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.a <|constrain|>json<|message|>{}<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.b.c <|constrain|>json<|message|>[1]<|call|>"
)
REPLIES: dict[str, tuple[str, ReplyPart]] = {
    "answer": (PLAIN, ReplyPart("4 😀", "Just say 2 + 2 = 4 ✓.")),
    "call": (CALL, ReplyPart("", "Need the weather.", [ToolCallPart(0, "get_weather", CALLED)])),
    "recipient in the role": (IN_THE_ROLE, ReplyPart("", "", [ToolCallPart(0, "get_weather", CALLED)])),
    "preamble and two calls": (
        PREAMBLE,
        ReplyPart("I look it up.", "", [ToolCallPart(0, "a", "{}"), ToolCallPart(1, "b.c", "[1]")]),
    ),
    "a tool of nobody": (
        "<|channel|>analysis to=python code<|message|>print(1)<|call|>",
        ReplyPart("", "print(1)"),
    ),
    "no end and no start": (
        "<|channel|>analysis<|message|>Hm<|channel|>final<|message|>So<|return|>",
        ReplyPart("So", "Hm"),
    ),
    "cut in a body": ("<|channel|>final<|message|>Unfinished", ReplyPart("Unfinished")),
    "cut in a header": ("<|channel|>final<|message|>All<|end|><|start|>assistant<|channel|>fin", ReplyPart("All")),
    "cut in the first header": ("<|channel|>analy", ReplyPart()),
    "no format at all": ("Hello, wörld", ReplyPart("Hello, wörld")),
    "no format, ended": ("Hello<|return|>", ReplyPart("Hello")),
    "an empty answer": ("<|channel|>final<|message|><|return|>", ReplyPart()),
}


def parser() -> ReplyParser:
    found = reply_format(TOKENIZER)
    assert found is not None
    return found.parser()


def joined(parts: list[ReplyPart]) -> ReplyPart:
    """A call's name comes with its first part, and its parts in order."""
    whole = ReplyPart()
    for part in parts:
        whole.content += part.content
        whole.reasoning += part.reasoning
        for call in part.tool_calls:
            assert (call.name is not None) == (call.index == len(whole.tool_calls))
            if call.name is not None:
                whole.tool_calls.append(ToolCallPart(call.index, call.name))
            assert call.index == len(whole.tool_calls) - 1
            whole.tool_calls[-1].arguments += call.arguments
    return whole


@pytest.mark.parametrize("name", REPLIES)
def test_cut_at_every_token(name: str) -> None:
    text, expected = REPLIES[name]
    ids = ids_of(text)
    for cut in range(len(ids) + 1):
        reader = parser()
        assert joined([reader.push(ids[:cut]), reader.push(ids[cut:]), reader.finish()]) == expected
    reader = parser()
    assert joined([*(reader.push([token]) for token in ids), reader.finish()]) == expected


@pytest.mark.parametrize("name", REPLIES)
def test_cut_anywhere(name: str) -> None:
    rng = random.Random(SEED)
    text, expected = REPLIES[name]
    ids = ids_of(text)
    for _ in range(20):
        cuts = sorted(rng.choices(range(len(ids) + 1), k=rng.randint(0, 6)))
        reader, parts = parser(), []
        for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
            parts.append(reader.push(ids[start:end]))
        assert joined([*parts, reader.finish()]) == expected


def test_text_comes_as_soon_as_its_characters_are_whole() -> None:
    reader = parser()
    reader.push(ids_of("<|channel|>final<|message|>"))
    smile = ids_of("😀")
    assert [reader.push([token]).content for token in smile] == ["", "", "", "😀"]
    assert reader.push(ids_of("a")).content == "a"


def test_a_character_cut_by_the_end_of_its_body_is_replaced() -> None:
    reader = parser()
    assert reader.push([*ids_of("<|channel|>final<|message|>a"), 0xE2, 0x9C, *ids_of("<|return|>")]).content == "a�"


@pytest.mark.parametrize(
    "header, target",
    [
        ("assistant<|channel|>final", ("content", "")),
        ("<|channel|> analysis", ("reasoning", "")),
        ("<|channel|>commentary", ("content", "")),
        ("<|channel|>commentary to=functions.f json", ("call", "f")),
        ("<|channel|>analysis to=functions.f code", ("call", "f")),
        ("assistant to=browser.search<|channel|>commentary json", ("reasoning", "")),
        ("assistant", ("content", "")),
    ],
)
def test_where_bodies_go(header: str, target: tuple[str, str]) -> None:
    assert target_of(header) == target
