"""What a chat format is to the server: it writes prompts, and takes the ids that a model says apart. No HTTP here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass
class ToolCallPart:
    """What is new of a call. index: the call's place among those of its reply. name: with the first part alone."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass
class ReplyPart:
    """What is new of a reply: text for the user, text the model thinks aloud, and calls of tools, whose arguments are
    JSON text."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCallPart] = field(default_factory=list)

    def add_arguments(self, index: int, text: str) -> None:
        """Arguments of a call, as one part with those that came before."""
        if not self.tool_calls or self.tool_calls[-1].index != index:
            self.tool_calls.append(ToolCallPart(index))
        self.tool_calls[-1].arguments += text


class ReplyParser(Protocol):
    """Takes one reply apart, as it comes."""

    def push(self, ids: Sequence[int]) -> ReplyPart:
        """What the next ids bring. Parts, joined, do not depend on how the ids were cut into pushes."""
        ...

    def finish(self) -> ReplyPart:
        """What was held back, at the end."""
        ...


class ReplyFormat(Protocol):
    """A family's way to write conversations, with thoughts and calls of tools. A row of `formats.FORMATS`."""

    @property
    def name(self) -> str: ...

    @property
    def stop(self) -> Sequence[str]:
        """Texts that end a turn, where no token does."""
        ...

    @property
    def stop_ids(self) -> Sequence[int]:
        """Tokens that do."""
        ...

    def render(
        self,
        /,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt, as `tokenizer.chat.ChatTemplate.render`. messages: of OpenAI's roles, with `tool_calls`,
        `tool_call_id` and `reasoning_content`. Raises ParameterError naming what it cannot write."""
        ...

    def parser(self) -> ReplyParser:
        """A fresh one, for a reply to a rendered prompt."""
        ...
