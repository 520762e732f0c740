"""/v1/chat/completions: OpenAI's own client against a fake engine."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.server.conftest import Serve, Served
from tests.server.fake_engine import FakeEngine, byte_tokenizer
from tokenspeed.contracts.errors import ConfigError

TALK: Any = [{"role": "user", "content": "hi"}]
RENDERED = "User: hi\nAssistant:"


def test_the_whole_shape(served: Served) -> None:
    reply = served.openai.chat.completions.create(model="fake", messages=TALK)
    assert reply.id.startswith("chatcmpl-")
    assert (reply.object, reply.model) == ("chat.completion", "fake")
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", RENDERED.upper())
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    usage = reply.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(RENDERED), len(RENDERED) + 1)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 3


def test_stream(served: Served) -> None:
    with served.openai.chat.completions.create(
        model="fake", messages=TALK, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *chunks, last = list(stream)
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == RENDERED.upper()
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(RENDERED) + 1


def test_samples_of_a_stream_each_name_their_role(served: Served) -> None:
    with served.openai.chat.completions.create(model="fake", messages=TALK, stream=True, n=2) as stream:
        chunks = list(stream)
    texts, roles = {0: "", 1: ""}, {0: 0, 1: 0}
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role is not None
    assert texts == {0: RENDERED.upper(), 1: RENDERED.upper() * 2}
    assert roles == {0: 1, 1: 1}


def test_logprobs(serve: Serve) -> None:
    served = serve(FakeEngine(answer=lambda request, index: list("é!".encode())), chat_template="plain")
    reply = served.openai.chat.completions.create(
        model="fake", messages=TALK, logprobs=True, top_logprobs=2, max_tokens=3
    )
    found = reply.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert [entry.bytes for entry in found.content] == [[0xC3], [0xA9], [ord("!")]]
    bang = found.content[2]
    assert (bang.token, bang.logprob) == ("!", -33 / 512)
    assert [(top.token, top.logprob) for top in bang.top_logprobs] == [("!", -33 / 512), ('"', -34 / 512)]
    bare = served.openai.chat.completions.create(model="fake", messages=TALK, logprobs=True, max_tokens=1)
    assert bare.choices[0].logprobs is not None
    assert bare.choices[0].logprobs.content is not None
    assert bare.choices[0].logprobs.content[0].top_logprobs == []


def test_prompt_logprobs(served: Served) -> None:
    fields: Any = {"model": "fake", "messages": TALK, "extra_body": {"prompt_logprobs": 1}}
    found = served.openai.chat.completions.create(**fields).model_dump()["prompt_logprobs"]
    assert found[0] is None
    assert [list(entries) for entries in found[1:]] == [[str(ord(letter))] for letter in RENDERED[1:]]
    assert found[1][str(ord("s"))] == {"logprob": -ord("s") / 512, "rank": 1, "decoded_token": "s"}


def test_messages_reach_the_template_as_it_expects_them(serve: Serve) -> None:
    template = "{% for m in messages %}[{{ m.role }} {{ m.name or '-' }} {{ m.content }}]{% endfor %}{{ mood }}"
    served = serve(FakeEngine(byte_tokenizer(template)))
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: Any = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts, "name": "Eve"}]
    reply = served.openai.chat.completions.create(
        model="fake", messages=messages, extra_body={"chat_template_kwargs": {"mood": "glad"}}
    )
    assert reply.choices[0].message.content == "[SYSTEM - X][USER EVE AB]GLAD"


def test_templates_write_special_tokens_themselves(serve: Serve) -> None:
    served = serve(FakeEngine(byte_tokenizer("<{{ messages[0].content }}")))
    served.openai.chat.completions.create(model="fake", messages=TALK)
    assert served.engine.requests[0].prompt_token_ids == list(b"<hi")


def test_texts_of_the_template_end_a_turn_too(served: Served) -> None:
    served.engine.answer = lambda request, index: list(b"Well.\nUser: and?")
    reply = served.openai.chat.completions.create(model="fake", messages=TALK, stop="xx")
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("Well.", "stop")
    assert served.engine.requests[0].params.stop == ["xx", "\nUser:"]
    served.openai.chat.completions.create(model="fake", messages=TALK)
    assert served.engine.requests[1].params.stop == ["\nUser:"]


def test_an_answer_may_fill_the_model_but_not_overflow_it(served: Served) -> None:
    served.engine.answer = lambda request, index: [65] * 1000
    reply = served.openai.chat.completions.create(model="fake", messages=TALK)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.total_tokens == served.engine.info.max_model_len


@pytest.mark.parametrize(
    "fields, complaint, param",
    [
        ({"messages": []}, "messages is empty", "messages"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "317 tokens, but this model takes 200", "messages"),
        ({"chat_template_kwargs": {"messages": []}}, "must not hold messages", "chat_template_kwargs"),
        ({"top_logprobs": 1}, "top_logprobs needs logprobs", "top_logprobs"),
        ({"temperature": 3.5, "top_p": 0}, "top_p must be", "top_p"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported", "tools"),
        ({"tool_choice": "required"}, "tool_choice is not supported", "tool_choice"),
        ({"reasoning_effort": "low"}, "reasoning_effort is not supported", "reasoning_effort"),
        (
            {"messages": [{"role": "tool", "content": "1", "tool_call_id": "a"}]},
            "messages[0].tool_call_id is not supported by this model's chat format",
            "messages[0].tool_call_id",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported", "response_format"),
    ],
)
def test_refusals(served: Served, fields: dict[str, Any], complaint: str, param: str) -> None:
    response = served.client.post("/v1/chat/completions", json={"messages": TALK} | fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert complaint in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert served.engine.requests == []


def test_a_base_model_says_what_helps(serve: Serve) -> None:
    served = serve()
    with pytest.raises(openai.BadRequestError, match="--chat-template plain"):
        served.openai.chat.completions.create(model="fake", messages=TALK)
    assert served.openai.completions.create(model="fake", prompt="ab").choices[0].text == "AB"


def test_a_template_given_by_flag_must_work(serve: Serve) -> None:
    engine = FakeEngine()
    with pytest.raises(ConfigError, match="line 1"):
        _load(engine, "{% for %}")
    assert engine.closed


def _load(engine: FakeEngine, template: str) -> None:
    from tokenspeed.server.state import ServerState

    async def start(progress: Any) -> FakeEngine:
        return engine

    asyncio.run(ServerState((), template).load(start))


def test_many_streams_at_once_keep_apart(served: Served) -> None:
    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        messages: Any = [{"role": "user", "content": f"number {number}"}]
        text = ""
        async with await client.chat.completions.create(model="fake", messages=messages, stream=True) as stream:
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
        return text

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, number) for number in range(40)))

    assert asyncio.run(all_of_them()) == [f"USER: NUMBER {number}\nASSISTANT:" for number in range(40)]
