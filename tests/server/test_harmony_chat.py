"""/v1/chat/completions of a model that speaks harmony: OpenAI's own client against a fake engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.parsing.harmony_bytes import IDS, harmony_tokenizer, ids_of
from tests.parsing.test_harmony_parser import CALL, CALLED, PLAIN, PREAMBLE
from tests.server.conftest import Serve, Served
from tests.server.fake_engine import FakeEngine

TALK: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]


def answering(serve: Serve, text: str, **settings: Any) -> Served:
    engine = FakeEngine(
        tokenizer=harmony_tokenizer(), answer=lambda request, index: ids_of(text), max_model_len=4000, **settings
    )
    return serve(engine)


def prompt_of(served: Served) -> str:
    return harmony_tokenizer().decode(served.engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


def test_an_answer_with_its_thoughts(serve: Serve) -> None:
    served = answering(serve, PLAIN)
    choice = served.openai.chat.completions.create(model="fake", messages=TALK).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("4 😀", "stop")
    assert choice.message.model_extra is not None
    assert choice.message.model_extra["reasoning_content"] == "Just say 2 + 2 = 4 ✓."
    assert choice.message.tool_calls is None
    assert "Reasoning: medium" in prompt_of(served)
    assert prompt_of(served).endswith("<|start|>user<|message|>hi<|end|><|start|>assistant")
    assert served.engine.requests[0].params.stop_token_ids == [IDS["<|return|>"], IDS["<|call|>"]]


def test_a_stream_of_an_answer(serve: Serve) -> None:
    served = answering(serve, PLAIN)
    with served.openai.chat.completions.create(model="fake", messages=TALK, stream=True) as stream:
        chunks = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "4 😀"
    thoughts = [(delta.model_extra or {}).get("reasoning_content") or "" for delta in deltas]
    assert "".join(thoughts) == "Just say 2 + 2 = 4 ✓."
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len(chunks) < len(ids_of(PLAIN)), "headers are no events"


def test_a_call(serve: Serve) -> None:
    served = answering(serve, CALL)
    asked = served.openai.chat.completions.create(
        model="fake", messages=TALK, tools=TOOLS, reasoning_effort="low", tool_choice="auto"
    )
    choice = asked.choices[0]
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    assert choice.model_extra is not None
    assert choice.model_extra["stop_reason"] is None
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.id.startswith("call_")
    assert (call.function.name, call.function.arguments) == ("get_weather", CALLED)
    prompt = prompt_of(served)
    assert "Reasoning: low" in prompt
    assert "type get_weather = () => any;" in prompt
    # What we say can be sent back.
    answer = {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    talk: Any = [*TALK, choice.message.to_dict(), answer]
    served.openai.chat.completions.create(model="fake", messages=talk, tools=TOOLS, tool_choice="none")
    prompt = prompt_of(served)
    assert "type get_weather" not in prompt
    assert prompt.endswith(
        "<|start|>assistant<|channel|>analysis<|message|>Need the weather.<|end|>"
        f"<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{CALLED}<|call|>"
        "<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>sunny<|end|><|start|>assistant"
    )


def test_a_stream_of_calls(serve: Serve) -> None:
    served = answering(serve, PREAMBLE)
    with served.openai.chat.completions.create(model="fake", messages=TALK, tools=TOOLS, stream=True) as stream:
        chunks = list(stream)
    calls: dict[int, dict[str, str]] = {}
    for chunk in chunks:
        for part in chunk.choices[0].delta.tool_calls or ():
            assert part.function is not None
            if part.index not in calls:
                assert (part.type, part.id is not None, part.function.name is not None) == ("function", True, True)
                calls[part.index] = {"id": str(part.id), "name": str(part.function.name), "arguments": ""}
            else:
                assert (part.id, part.function.name) == (None, None)
            calls[part.index]["arguments"] += part.function.arguments or ""
    assert [(call["name"], call["arguments"]) for call in calls.values()] == [("a", "{}"), ("b.c", "[1]")]
    assert len({call["id"] for call in calls.values()}) == 2
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "I look it up."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_samples_are_taken_apart_each_for_itself(serve: Serve) -> None:
    served = answering(serve, CALL, backwards=True)
    reply = served.openai.chat.completions.create(model="fake", messages=TALK, n=2)
    assert [choice.index for choice in reply.choices] == [0, 1]
    for choice in reply.choices:
        assert choice.message.tool_calls is not None
        assert [call.to_dict()["function"] for call in choice.message.tool_calls] == [
            {"name": "get_weather", "arguments": CALLED}
        ]


def test_a_reply_that_is_cut_says_so(serve: Serve) -> None:
    served = answering(serve, CALL)
    length = len(ids_of(CALL)) - 3
    choice = served.openai.chat.completions.create(model="fake", messages=TALK, max_tokens=length).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].to_dict()["function"] == {"name": "get_weather", "arguments": CALLED[:-2]}


def test_ids_and_logprobs_come_with_every_token(serve: Serve) -> None:
    served = answering(serve, PLAIN)
    body = {"messages": TALK, "stream": True, "return_token_ids": True, "logprobs": True}
    lines = served.client.post("/v1/chat/completions", json=body).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events if event["choices"]]
    assert [token for choice in choices for token in choice["token_ids"]] == ids_of(PLAIN)
    assert sum(len(choice["logprobs"]["content"]) for choice in choices) == len(ids_of(PLAIN))


def test_another_template_is_a_template(serve: Serve) -> None:
    """Then nothing is taken apart."""
    engine = FakeEngine(tokenizer=harmony_tokenizer(), answer=lambda request, index: ids_of("<|channel|>final"))
    served = serve(engine, chat_template="plain")
    reply = served.openai.chat.completions.create(model="fake", messages=TALK)
    assert reply.choices[0].message.content == "final"
    response = served.client.post("/v1/chat/completions", json={"messages": TALK, "tools": TOOLS})
    assert response.json()["error"]["message"] == "tools is not supported"


def test_tokenize_writes_the_same_prompt(serve: Serve) -> None:
    served = answering(serve, PLAIN)
    served.openai.chat.completions.create(model="fake", messages=TALK)
    tokens = served.client.post("/tokenize", json={"messages": TALK}).json()["tokens"]
    assert tokens == served.engine.requests[0].prompt_token_ids


@pytest.mark.parametrize(
    "fields, complaint, param",
    [
        ({"tool_choice": "required"}, "tool_choice must be auto or none: a call cannot be forced", "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice must be auto or none", "tool_choice"),
        ({"reasoning_effort": "max"}, "reasoning_effort must be one of low, medium, high", None),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}},
            "contradicts",
            "reasoning_effort",
        ),
        ({"chat_template_kwargs": {"thinking": True}}, "harmony knows no thinking", None),
        ({"stop": "x"}, "stop is not supported where replies are taken apart (chat format harmony)", "stop"),
        ({"skip_special_tokens": False}, "skip_special_tokens is not supported", "skip_special_tokens"),
        ({"messages": [{"role": "tool", "content": "1", "tool_call_id": "a"}]}, "of call 'a'", None),
    ],
)
def test_refusals(serve: Serve, fields: dict[str, Any], complaint: str, param: str | None) -> None:
    served = answering(serve, PLAIN)
    response = served.client.post("/v1/chat/completions", json={"messages": TALK} | fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert complaint in error["message"]
    assert param is None or error["param"] == param
    assert served.engine.requests == []


def test_ends_may_be_ignored(serve: Serve) -> None:
    served = answering(serve, PLAIN)
    served.client.post("/v1/chat/completions", json={"messages": TALK, "ignore_eos": True})
    assert served.engine.requests[0].params.stop_token_ids == []
