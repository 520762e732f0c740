"""Conversations in harmony, letter by letter as the guide has them."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from tests.parsing.harmony_bytes import harmony_tokenizer
from tests.server.fake_engine import byte_tokenizer
from tokenspeed.contracts.errors import ParameterError
from tokenspeed.parsing.formats import reply_format
from tokenspeed.parsing.harmony_prompt import render

DAY = "2025-06-28"
SYSTEM = """\
<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: 2025-06-28

Reasoning: {effort}

# Valid channels: analysis, commentary, final. Channel must be included for every message.{tools}<|end|>"""
TOOLS_LINE = "\nCalls to these tools must go to the commentary channel: 'functions'."
FORMAT = {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"}
CITY = {"type": "string", "description": "The city and state, e.g. San Francisco, CA"}
CITIES = {
    "type": "array",
    "items": {"type": "string"},
    "description": 'List of city and state, e.g. ["San Francisco, CA", "New York, NY"]',
}


def function(name: str, description: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    function("get_location", "Gets the location of the user.", {}, []),
    function(
        "get_current_weather",
        "Gets the current weather in the provided location.",
        {"location": CITY, "format": FORMAT},
        ["location"],
    ),
    function(
        "get_multiple_weathers",
        "Gets the current weather in the provided list of locations.",
        {"locations": CITIES, "format": FORMAT},
        ["locations"],
    ),
]
DECLARED = """\
# Tools

## functions

namespace functions {

// Gets the location of the user.
type get_location = () => any;

// Gets the current weather in the provided location.
type get_current_weather = (_: {
// The city and state, e.g. San Francisco, CA
location: string,
format?: "celsius" | "fahrenheit", // default: celsius
}) => any;

// Gets the current weather in the provided list of locations.
type get_multiple_weathers = (_: {
// List of city and state, e.g. ["San Francisco, CA", "New York, NY"]
locations: string[],
format?: "celsius" | "fahrenheit", // default: celsius
}) => any;

} // namespace functions"""


def system(effort: str = "medium", tools: bool = False) -> str:
    return SYSTEM.format(effort=effort, tools=TOOLS_LINE if tools else "")


def say(role: str, content: str = "", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


def calls(*made: tuple[str, str, str]) -> list[dict[str, Any]]:
    return [{"id": key, "type": "function", "function": {"name": n, "arguments": a}} for key, n, a in made]


def test_a_question() -> None:
    found = render([say("user", "What is 2 + 2?")], current_date=DAY)
    assert found == system() + "<|start|>user<|message|>What is 2 + 2?<|end|><|start|>assistant"


def test_instructions_and_tools() -> None:
    messages = [say("developer", "Use a friendly tone."), say("user", "What is the weather like in SF?")]
    assert render(messages, TOOLS, current_date=DAY, reasoning_effort="high") == (
        system("high", tools=True)
        + f"<|start|>developer<|message|># Instructions\n\nUse a friendly tone.\n\n{DECLARED}<|end|>"
        + "<|start|>user<|message|>What is the weather like in SF?<|end|><|start|>assistant"
    )


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_alone_by_either_name(role: str) -> None:
    found = render([say(role, "Be brief."), say("user", "Hi", name="ann")], None, False, current_date=DAY)
    expected = "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|><|start|>user:ann<|message|>Hi<|end|>"
    assert found == system() + expected


def test_tools_without_instructions_and_later_instructions() -> None:
    found = render([say("user", "a")], TOOLS[:1], current_date=DAY)
    assert found == system(tools=True) + (
        "<|start|>developer<|message|># Tools\n\n## functions\n\nnamespace functions {\n\n"
        "// Gets the location of the user.\ntype get_location = () => any;\n\n} // namespace functions<|end|>"
        "<|start|>user<|message|>a<|end|><|start|>assistant"
    )
    found = render([say("user", "a"), say("system", "Now in French.")], TOOLS[:1], current_date=DAY)
    assert found.count("## functions") == 1
    assert found.index("# Tools") > found.index("Now in French.")


def test_a_call_its_result_and_what_was_thought() -> None:
    """Thoughts stay until the turn has its answer."""
    asked = calls(("call_1", "get_current_weather", '{"location":"San Francisco"}'))
    messages = [
        say("user", "What is the weather in SF?"),
        say("assistant", tool_calls=asked, reasoning_content="Need to use function get_current_weather."),
        say("tool", '{"sunny": true, "temperature": 20}', tool_call_id="call_1"),
    ]
    turn = (
        "<|start|>user<|message|>What is the weather in SF?<|end|>"
        "{thought}"
        "<|start|>assistant<|channel|>commentary to=functions.get_current_weather <|constrain|>json<|message|>"
        '{{"location":"San Francisco"}}<|call|>'
        "<|start|>functions.get_current_weather to=assistant<|channel|>commentary<|message|>"
        '{{"sunny": true, "temperature": 20}}<|end|>'
    )
    thought = "<|start|>assistant<|channel|>analysis<|message|>Need to use function get_current_weather.<|end|>"
    found = render(messages, current_date=DAY)
    assert found == system() + turn.format(thought=thought) + "<|start|>assistant"
    messages += [say("assistant", "Sunny.", reasoning_content="It is sunny."), say("user", "Thanks")]
    assert render(messages, current_date=DAY) == (
        system()
        + turn.format(thought="")
        + "<|start|>assistant<|channel|>final<|message|>Sunny.<|end|>"
        + "<|start|>user<|message|>Thanks<|end|><|start|>assistant"
    )


def test_what_is_said_beside_calls_is_commentary() -> None:
    asked = calls(("a", "f", "{}"), ("b", "g", "[]"))
    found = render([say("assistant", "One moment.", tool_calls=asked)], None, False, current_date=DAY)
    assert found == system() + (
        "<|start|>assistant<|channel|>commentary<|message|>One moment.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
        "<|start|>assistant<|channel|>commentary to=functions.g <|constrain|>json<|message|>[]<|call|>"
    )


def test_today_and_other_variables() -> None:
    before = date.today().isoformat()
    found = render([say("user", "x")])
    assert f"Current date: {before}\n" in found or f"Current date: {date.today().isoformat()}\n" in found
    found = render([say("user", "x")], model_identity="You are Bob.", knowledge_cutoff="2025-01")
    assert found.startswith("<|start|>system<|message|>You are Bob.\nKnowledge cutoff: 2025-01\n")


def test_refusals() -> None:
    with pytest.raises(ParameterError, match="reasoning_effort must be one of low, medium, high, got 'max'"):
        render([say("user", "x")], reasoning_effort="max")
    with pytest.raises(ParameterError, match="harmony knows no thinking"):
        render([say("user", "x")], thinking=True)
    with pytest.raises(ParameterError, match="of call 'b', which no message before has made"):
        render([say("assistant", tool_calls=calls(("a", "f", "{}"))), say("tool", "1", tool_call_id="b")])


def test_what_knows_the_marks_is_harmony() -> None:
    found = reply_format(harmony_tokenizer())
    assert found is not None
    assert found.name == "harmony"
    assert found.render([say("user", "x")], current_date=DAY) == render([say("user", "x")], current_date=DAY)
    assert [harmony_tokenizer().token_text(token) for token in found.stop_ids] == ["<|return|>", "<|call|>"]
    assert reply_format(byte_tokenizer()) is None
