"""LangChain's ChatOpenAI, in all its ways, against `tokenspeed serve` with the demo model."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

from tests.server.server_process import GUARD_S, ServerProcess
from tokenspeed.config.demo import DEMO_NAME

ASKED = "Name a color."
OTHER = [SystemMessage("Be brief."), HumanMessage("Hi"), AIMessage("Hello"), HumanMessage("Name a fruit.")]
PLAIN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Name a fruit."},
]
MAX_TOKENS = 12


def model(server: ServerProcess, **fields: Any) -> ChatOpenAI:
    known: dict[str, Any] = {"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0, "timeout": GUARD_S}
    known |= {"model": DEMO_NAME, "temperature": 0, "max_completion_tokens": MAX_TOKENS}
    return ChatOpenAI(**known | fields)


@pytest.fixture
def llm(demo_server: ServerProcess) -> ChatOpenAI:
    return model(demo_server)


@pytest.fixture
def said(demo_server: ServerProcess) -> dict[str, Any]:
    """What the server itself answers."""
    return demo_server.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": ASKED}], temperature=0, max_tokens=MAX_TOKENS
    ).json()


def content(said: dict[str, Any]) -> str:
    return said["choices"][0]["message"]["content"]


def usage(message: Any) -> tuple[int, int, int]:
    found = message.usage_metadata
    return found["input_tokens"], found["output_tokens"], found["total_tokens"]


def told(said: dict[str, Any]) -> tuple[int, int, int]:
    found = said["usage"]
    return found["prompt_tokens"], found["completion_tokens"], found["total_tokens"]


def test_invoke(llm: ChatOpenAI, said: dict[str, Any]) -> None:
    answer = llm.invoke(ASKED)
    assert answer.content == content(said)
    assert usage(answer) == told(said)
    assert answer.response_metadata["finish_reason"] == said["choices"][0]["finish_reason"]
    assert answer.response_metadata["model_name"] == DEMO_NAME


def test_a_conversation(llm: ChatOpenAI, demo_server: ServerProcess) -> None:
    fields = {"messages": PLAIN, "temperature": 0, "max_tokens": MAX_TOKENS}
    expected = demo_server.post("/v1/chat/completions", **fields).json()
    answer = llm.invoke(OTHER)
    assert (answer.content, usage(answer)) == (content(expected), told(expected))


@pytest.mark.parametrize("with_usage", [False, True])
def test_stream(demo_server: ServerProcess, said: dict[str, Any], with_usage: bool) -> None:
    llm = model(demo_server, stream_usage=with_usage)
    chunks = list(llm.stream(ASKED))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.content == content(said)
    assert len([chunk for chunk in chunks if chunk.content]) > 1
    assert whole.response_metadata["finish_reason"] == said["choices"][0]["finish_reason"]
    if with_usage:
        assert usage(whole) == told(said)
    else:
        assert whole.usage_metadata is None


def test_batch(llm: ChatOpenAI, said: dict[str, Any]) -> None:
    answers = llm.batch([ASKED, OTHER, ASKED])
    assert [answer.content for answer in answers] == [content(said), llm.invoke(OTHER).content, content(said)]


def test_asynchronous(llm: ChatOpenAI, said: dict[str, Any]) -> None:
    async def ask() -> tuple[Any, list[Any], list[Any]]:
        whole = await llm.ainvoke(ASKED)
        chunks = [chunk async for chunk in llm.astream(ASKED)]
        return whole, chunks, await llm.abatch([ASKED, ASKED])

    whole, chunks, batch = asyncio.run(ask())
    assert "".join(chunk.content for chunk in chunks) == whole.content == content(said)
    assert usage(whole) == told(said)
    assert [answer.content for answer in batch] == [content(said)] * 2


def test_stop(llm: ChatOpenAI, said: dict[str, Any]) -> None:
    text = content(said)
    stop = text[len(text) // 2]
    answer = llm.invoke(ASKED, stop=[stop])
    assert answer.content == text.split(stop)[0]
    assert answer.response_metadata["finish_reason"] == "stop"
    assert "".join(str(chunk.content) for chunk in llm.stream(ASKED, stop=[stop])) == text.split(stop)[0]


def test_logprobs(llm: ChatOpenAI) -> None:
    answer = llm.bind(logprobs=True, top_logprobs=2).invoke(ASKED)
    entries = answer.response_metadata["logprobs"]["content"]
    assert len(entries) == usage(answer)[1]
    assert "".join(entry["token"] for entry in entries).startswith(str(answer.content))
    for entry in entries:
        first, second = entry["top_logprobs"]
        assert (first["token"], first["logprob"]) == (entry["token"], entry["logprob"])
        assert second["logprob"] <= first["logprob"] <= 0


def test_sampling_with_a_seed(demo_server: ServerProcess) -> None:
    def texts(**fields: Any) -> list[str]:
        llm = model(demo_server, temperature=1.0, max_completion_tokens=24, **fields)
        return [str(llm.invoke(ASKED).content) for _ in range(2)]

    one, again = texts(seed=5)
    assert one == again
    assert len({one, *texts(seed=6), *texts(seed=7), *texts(seed=8)}) > 1
