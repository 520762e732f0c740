"""Conversations in harmony, gpt-oss's chat format (cookbook.openai.com/articles/openai-harmony)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import Any

from tokenspeed.contracts.errors import ParameterError
from tokenspeed.parsing.typescript import declare

START, END, MESSAGE, CHANNEL = "<|start|>", "<|end|>", "<|message|>", "<|channel|>"
CONSTRAIN, RETURN, CALL = "<|constrain|>", "<|return|>", "<|call|>"
IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
CUTOFF = "2024-06"
EFFORTS = ("low", "medium", "high")
VARIABLES = ("model_identity", "knowledge_cutoff", "current_date", "reasoning_effort")
"""What the first message says; the date is today's and the effort medium unless a request says otherwise."""
Message = Mapping[str, Any]


def render(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """As `reply.ReplyFormat.render`: the system message, instructions and tools, the conversation.

    Thoughts are left out of turns that have ended, as the model was trained. Raises ParameterError for an unknown
    variable, for an effort that is none of EFFORTS, and for a tool's result whose call is not there.
    """
    unknown = sorted(set(variables) - set(VARIABLES))
    if unknown:
        names = f"{', '.join(unknown)} (it has {', '.join(VARIABLES)})"
        raise ParameterError(f"chat_template_kwargs: harmony knows no {names}")
    text = _system(bool(tools), **{name: value for name, value in variables.items() if value is not None})
    instructed = False
    if tools and not any(message["role"] in ("system", "developer") for message in messages):
        text, instructed = text + _developer("", tools), True
    answered = max((i for i, each in enumerate(messages) if _is_answer(each)), default=-1)
    for number, message in enumerate(messages):
        if message["role"] in ("system", "developer"):
            text, instructed = text + _developer(_content(message), () if instructed else tools), True
        elif message["role"] == "assistant":
            text += "".join(_assistant(message, thinks=number > answered))
        elif message["role"] == "tool":
            text += _result(message, messages[:number])
        else:
            named = f":{message['name']}" if message.get("name") else ""
            text += _written(f"user{named}", _content(message))
    return text + f"{START}assistant" if add_generation_prompt else text


def _system(
    tools: bool,
    model_identity: str = IDENTITY,
    knowledge_cutoff: str = CUTOFF,
    current_date: str | None = None,
    reasoning_effort: str = "medium",
) -> str:
    if reasoning_effort not in EFFORTS:
        raise ParameterError(f"reasoning_effort must be one of {', '.join(EFFORTS)}, got {reasoning_effort!r}")
    lines = [
        model_identity,
        f"Knowledge cutoff: {knowledge_cutoff}",
        f"Current date: {current_date or date.today().isoformat()}",
        "",
        f"Reasoning: {reasoning_effort}",
        "",
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.",
    ]
    if tools:
        lines.append("Calls to these tools must go to the commentary channel: 'functions'.")
    return _written("system", "\n".join(lines))


def _developer(instructions: str, tools: Sequence[Mapping[str, Any]] | None) -> str:
    parts = [f"# Instructions\n\n{instructions}"] if instructions else []
    if tools:
        functions = "".join(declare(tool["function"]) for tool in tools)
        parts.append(f"# Tools\n\n## functions\n\nnamespace functions {{\n\n{functions}}} // namespace functions")
    return _written("developer", "\n\n".join(parts))


def _assistant(message: Message, thinks: bool) -> Iterator[str]:
    """Its thoughts, what it said, and its calls."""
    calls, content, thoughts = message.get("tool_calls") or (), _content(message), message.get("reasoning_content")
    if thoughts and thinks:
        yield _written(f"assistant{CHANNEL}analysis", thoughts)
    if content or not calls:
        yield _written(f"assistant{CHANNEL}{'commentary' if calls else 'final'}", content)
    for call in calls:
        function = call["function"]
        header = f"assistant{CHANNEL}commentary to=functions.{function['name']} {CONSTRAIN}json"
        yield _written(header, function["arguments"], CALL)


def _result(message: Message, before: Sequence[Message]) -> str:
    wanted = message.get("tool_call_id")
    calls = (call for each in reversed(before) for call in each.get("tool_calls") or ())
    name = next((call["function"]["name"] for call in calls if call["id"] == wanted), None)
    if name is None:
        raise ParameterError(f"messages: a tool's result is of call {wanted!r}, which no message before has made")
    return _written(f"functions.{name} to=assistant{CHANNEL}commentary", _content(message))


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant" and not message.get("tool_calls")


def _content(message: Message) -> str:
    return message.get("content") or ""


def _written(header: str, body: str, end: str = END) -> str:
    return f"{START}{header}{MESSAGE}{body}{end}"
