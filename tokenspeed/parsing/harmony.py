"""Harmony, gpt-oss's chat format: what it is to the server, and the parser of replies.

A reply is a row of messages <|start|>HEADER<|message|>BODY, each with an end of its own; the first header's role is the
prompt's last word. A header names the channel (analysis, commentary, final), in front of it or behind it a recipient
(to=functions.NAME), and at its end the kind of its body (<|constrain|>json). Source: OpenAI's guide to the format
(cookbook.openai.com/articles/openai-harmony).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenspeed.parsing.harmony_prompt import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START, render
from tokenspeed.parsing.reply import ReplyParser, ReplyPart, ToolCallPart
from tokenspeed.tokenizer.base import Tokenizer

FUNCTIONS = "functions."
MARKS = (START, END, MESSAGE, CHANNEL, CONSTRAIN, RETURN, CALL)
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
Target = Literal["content", "reasoning", "call"]


def harmony_of(tokenizer: Tokenizer) -> Harmony | None:
    """The format, where each of its marks is a token."""
    ids = {}
    for mark in MARKS:
        found = tokenizer.encode(mark, add_special_tokens=False)
        if len(found) != 1 or tokenizer.token_text(found[0]) != mark:
            return None
        ids[mark] = found[0]
    return Harmony(tokenizer, ids)


@dataclass(frozen=True)
class Harmony:
    """Implements `reply.ReplyFormat`. ids: of the marks."""

    tokenizer: Tokenizer
    ids: Mapping[str, int]
    name: str = "harmony"
    stop: Sequence[str] = ()

    @property
    def stop_ids(self) -> Sequence[int]:
        return [self.ids[RETURN], self.ids[CALL]]

    def render(
        self,
        /,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        return render(messages, tools, add_generation_prompt, **variables)

    def parser(self) -> ReplyParser:
        return HarmonyParser(self.tokenizer, self.ids)


def target_of(header: str) -> tuple[Target, str]:
    """Where the body of a message goes, and for a call the function's name. What is written to nobody's tool is the
    model's own business, as is its analysis; a commentary without a recipient is for the user."""
    recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
    if recipient is not None and recipient[1].startswith(FUNCTIONS):
        return "call", recipient[1].removeprefix(FUNCTIONS)
    if recipient is not None or (channel is not None and channel[1] == "analysis"):
        return "reasoning", ""
    return "content", ""


class HarmonyParser:
    """Implements `reply.ReplyParser`. A model that leaves out <|end|> or <|start|> is understood; text that never got
    a header is content."""

    def __init__(self, tokenizer: Tokenizer, ids: Mapping[str, int]) -> None:
        self._tokenizer = tokenizer
        self._marks = {token: mark for mark, token in ids.items()}
        self._header: str | None = ""
        self._text = tokenizer.detokenizer()
        self._target: Target = "content"
        self._calls = 0
        self._begun = False

    def push(self, ids: Sequence[int]) -> ReplyPart:
        part = ReplyPart()
        for token in ids:
            mark = self._marks.get(token)
            if mark is not None:
                self._take_mark(mark, part)
            elif self._header is None:
                self._show(self._text.push((token,)), part)
            else:
                self._header += self._text.push((token,))
        return part

    def finish(self) -> ReplyPart:
        part = ReplyPart()
        self._close(part)
        return part

    def _take_mark(self, mark: str, part: ReplyPart) -> None:
        if self._header is None and mark in (MESSAGE, CONSTRAIN):
            return  # within a body they say nothing
        if self._header is not None and mark in (MESSAGE, CONSTRAIN, CHANNEL):
            self._header += self._text.finish()
            if mark == MESSAGE:
                self._open(self._header, part)
            else:
                self._header += mark
        else:
            self._close(part)
            self._header = CHANNEL if mark == CHANNEL else ""
        self._text = self._tokenizer.detokenizer()

    def _open(self, header: str, part: ReplyPart) -> None:
        self._target, name = target_of(header)
        self._header, self._begun = None, True
        if self._target == "call":
            part.tool_calls.append(ToolCallPart(self._calls, name))
            self._calls += 1

    def _close(self, part: ReplyPart) -> None:
        """The end of a body: what is left of its last character; or of a reply that has no header."""
        rest = self._text.finish()
        if self._header is None:
            self._show(rest, part)
        elif not self._begun and CHANNEL not in self._header:
            part.content += self._header + rest

    def _show(self, text: str, part: ReplyPart) -> None:
        if not text:
            return
        if self._target == "call":
            part.add_arguments(self._calls - 1, text)
        elif self._target == "reasoning":
            part.reasoning += text
        else:
            part.content += text
