"""From the prompts and messages of a request to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tokenspeed.contracts.errors import ParameterError, PromptError
from tokenspeed.server.engine import Engine
from tokenspeed.server.errors import ApiError
from tokenspeed.server.limits import check_choices
from tokenspeed.server.openai.requests import ChatRequest, Message
from tokenspeed.server.state import ServerState
from tokenspeed.tokenizer.base import Tokenizer

SHORT_TEXT = 16384
"""Characters that are encoded at once, in a few ms; longer texts go to a thread and hold up no other stream."""
UNSUPPORTED = "unsupported_parameter"
RESERVED_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt"})


async def plain_prompts(
    given: str | list[str | int | list[int]], n: int, state: ServerState, name: str = "prompt"
) -> list[list[int]]:
    """Ids of each prompt of the field `name`. Raises PromptError for no prompt, an empty one, or a list of mixed kinds;
    ApiError for more of them, with `n` samples each, than a request may have; ParameterError for text where the model
    has no tokenizer."""
    listed, prompts = _listed(given, name), []
    check_choices(len(listed), n, state.limits, name)
    for each in listed:
        if not each:
            raise PromptError(f"{name} is empty")
        prompts.append(each if isinstance(each, list) else await encode_text(each, state.tokenizer, True))
        await asyncio.sleep(0)  # many short texts would hold up the streams as one long text does
    return prompts


async def chat_prompt(request: ChatRequest, state: ServerState) -> list[int]:
    """Ids of a conversation under the model's template. Raises ParameterError where there is no template, or it refuses
    the messages."""
    variables, effort = dict(request.chat_template_kwargs or {}), request.reasoning_effort
    if effort is not None and variables.setdefault("reasoning_effort", effort) != effort:
        raise ApiError(400, "reasoning_effort contradicts chat_template_kwargs", "reasoning_effort")
    text = render(request.messages, variables, state, tools=offered_tools(request))
    if not text:
        raise PromptError("prompt is empty")
    return await encode_text(text, state.tokenizer, add_special_tokens=False)


def render(
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    state: ServerState,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The text of a conversation. Raises as `chat_prompt` does."""
    template = state.chat_template
    taken = sorted(RESERVED_VARIABLES & set(variables))
    if taken:
        raise ParameterError(f"chat_template_kwargs must not hold {', '.join(taken)}")
    if not messages:
        raise ApiError(400, "messages is empty", "messages")
    if state.reply_format is not None:
        given = [_whole(message) for message in messages]
    else:
        given = [_plain(message, number) for number, message in enumerate(messages)]
    return template.render(given, tools, add_generation_prompt, **variables)


def offered_tools(request: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that a reply may call, as JSON values."""
    return msgspec.to_builtins(request.tools) if request.tools and request.tool_choice != "none" else None


def check_length(prompts: Sequence[Sequence[int]], engine: Engine, param: str, output: bool = True) -> None:
    """Raise ApiError, with OpenAI's code, for a prompt that is too long, or leaves no room for output where there is
    some."""
    limit = engine.info.max_model_len
    for prompt in prompts:
        if len(prompt) + output > limit:
            message = f"{param}: {len(prompt)} tokens, but this model takes {limit} at most"
            message += ", prompt and output" if output else ""
            raise ApiError(400, message, param, "context_length_exceeded")


def _listed(given: str | list[str | int | list[int]], name: str) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    kinds = {type(each) for each in given}
    if kinds == {int}:
        return [[each for each in given if isinstance(each, int)]]
    if kinds in ({str}, {list}):
        return [each for each in given if not isinstance(each, int)]
    raise PromptError(f"{name} must be a text, a list of token ids, or a list of either that is not empty")


async def encode_text(text: str, tokenizer: Tokenizer, add_special_tokens: bool) -> list[int]:
    """Ids of a text. Raises PromptError where it is not valid Unicode."""
    if len(text) <= SHORT_TEXT:
        return tokenizer.encode(text, add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)


def _plain(message: Message, number: int) -> dict[str, Any]:
    """As templates expect it: text in one piece, and no role that only newer APIs know. Raises ApiError for calls of
    tools."""
    for name in ("tool_calls", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            where = f"messages[{number}].{name}"
            raise ApiError(400, f"{where} is not supported by this model's chat format", where, UNSUPPORTED)
    role = "system" if message.role == "developer" else message.role
    named = {"name": message.name} if message.name is not None else {}
    return {"role": role, "content": _text(message)} | named


def _whole(message: Message) -> dict[str, Any]:
    """For formats that know calls of tools: what the message has."""
    given: dict[str, Any] = msgspec.to_builtins(message)
    return {name: value for name, value in given.items() if value is not None} | {"content": _text(message)}


def _text(message: Message) -> str:
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content)
    return message.content or ""
