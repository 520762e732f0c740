"""Replies taken apart: from what a sample gave to messages with thoughts and calls of tools, whole or as they come."""

from __future__ import annotations

import secrets
from dataclasses import replace

from tokenspeed.engine.output import CompletionOutput
from tokenspeed.parsing.reply import ReplyFormat, ReplyParser, ReplyPart
from tokenspeed.server.errors import ApiError
from tokenspeed.server.openai.prompts import UNSUPPORTED
from tokenspeed.server.openai.requests import ChatRequest
from tokenspeed.server.openai.responses import (
    ChatChunkChoice,
    ChatDelta,
    ChatMessage,
    FunctionCall,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)

CHOICES = ("auto", "none")
"""Of tools: what a model does by itself, or is told nothing of."""


def check_tools(request: ChatRequest, format: ReplyFormat | None) -> None:
    """Raise ApiError for what the model's chat format does not know, or nobody can promise."""
    asks = {
        "tools": bool(request.tools),
        "tool_choice": request.tool_choice not in (None, *CHOICES),
        "reasoning_effort": request.reasoning_effort is not None,
    }
    if format is None:
        name = next((name for name, asked in asks.items() if asked), None)
        if name is not None:
            raise ApiError(400, f"{name} is not supported", name, UNSUPPORTED)
        return
    if asks["tool_choice"]:
        message = f"tool_choice must be {' or '.join(CHOICES)}: a call cannot be forced"
        raise ApiError(400, message, "tool_choice", UNSUPPORTED)
    marks = {
        "stop": request.stop is not None,
        "skip_special_tokens": request.skip_special_tokens is False,
        "include_stop_str_in_output": bool(request.include_stop_str_in_output),
    }
    name = next((name for name, asked in marks.items() if asked), None)
    if name is not None:
        message = f"{name} is not supported where replies are taken apart (chat format {format.name})"
        raise ApiError(400, message, name, UNSUPPORTED)


class Replies:
    """Of one request: a parser for each sample."""

    def __init__(self, format: ReplyFormat, request: ChatRequest) -> None:
        self._format = format
        self._ends = set(format.stop_ids) - set(request.stop_token_ids or ())
        self._parsers: dict[int, ReplyParser] = {}
        self._called: set[int] = set()

    def whole(self, sample: CompletionOutput) -> tuple[ChatMessage, CompletionOutput]:
        """The message of a sample that has ended, and the sample with the reasons of its end as clients are told."""
        part = self._read(sample)
        message = ChatMessage(content=part.content or (None if part.tool_calls else ""))
        if part.reasoning:
            message.reasoning_content = part.reasoning
        if part.tool_calls:
            message.tool_calls = [
                ToolCall(id=_call_id(), function=FunctionCall(name=call.name or "", arguments=call.arguments))
                for call in part.tool_calls
            ]
        return message, self._told(sample)

    def delta(self, new: CompletionOutput) -> tuple[ChatDelta, CompletionOutput]:
        """The same of what is new of a sample."""
        part = self._read(new)
        calls = [
            ToolCallDelta(index=call.index, function=FunctionDelta(arguments=call.arguments))
            if call.name is None
            else ToolCallDelta(
                index=call.index,
                id=_call_id(),
                type="function",
                function=FunctionDelta(name=call.name, arguments=call.arguments),
            )
            for call in part.tool_calls
        ]
        shown = ChatDelta(
            content=part.content or None, reasoning_content=part.reasoning or None, tool_calls=calls or None
        )
        return shown, self._told(new)

    def _read(self, new: CompletionOutput) -> ReplyPart:
        parser = self._parsers.setdefault(new.index, self._format.parser())
        part = parser.push(new.token_ids)
        if new.finish_reason is not None:
            rest = parser.finish()
            part.content += rest.content
            part.reasoning += rest.reasoning
            for call in rest.tool_calls:
                part.add_arguments(call.index, call.arguments)
        if part.tool_calls:
            self._called.add(new.index)
        return part

    def _told(self, new: CompletionOutput) -> CompletionOutput:
        if new.finish_reason != "stop":
            return new
        reason = None if new.stop_reason in self._ends else new.stop_reason
        return replace(new, finish_reason="tool_calls" if new.index in self._called else "stop", stop_reason=reason)


def says_nothing(choice: ChatChunkChoice) -> bool:
    """Whether a client would learn nothing: a part of a header, or of a character."""
    delta = choice.delta
    shown = delta.content or delta.reasoning_content or delta.tool_calls
    return not (shown or choice.finish_reason or choice.logprobs or choice.token_ids)


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
