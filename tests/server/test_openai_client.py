"""OpenAI's own client, in all its ways, against `tokenspeed serve` with the demo model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from tests.server.server_process import GUARD_S, ServerProcess
from tokenspeed.config.demo import DEMO_NAME

PROMPT = "The three primary colors are"
TALK = [{"role": "user", "content": "Name a color."}]
BOS = 2
ASKED: dict[str, dict[str, Any]] = {
    "completions": {"model": DEMO_NAME, "prompt": PROMPT, "max_tokens": 8, "temperature": 0},
    "chat": {"model": DEMO_NAME, "messages": TALK, "max_completion_tokens": 8, "temperature": 0},
}
STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


def settings(server: ServerProcess) -> dict[str, Any]:
    return {"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0, "timeout": GUARD_S}


@pytest.fixture
def client(demo_server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(**settings(demo_server)) as made:
        yield made


def create(client: Any, endpoint: str, **fields: Any) -> Any:
    """A call of either endpoint: of an async client, what is to be awaited."""
    resource = client.completions if endpoint == "completions" else client.chat.completions
    return resource.create(**ASKED[endpoint], **fields)


def text_of(choice: Any) -> str:
    """Of a completion, a chat, or an event of either."""
    if hasattr(choice, "text"):
        return choice.text
    return (choice.delta if hasattr(choice, "delta") else choice.message).content or ""


def joined(chunks: list[Any]) -> tuple[str, int]:
    """Text, and completion tokens, of a stream with usage."""
    *parts, last = chunks
    assert last.choices == []
    assert all(part.usage is None for part in parts)
    assert [bool(part.choices[0].finish_reason) for part in parts] == [False] * (len(parts) - 1) + [True]
    return "".join(text_of(part.choices[0]) for part in parts), last.usage.completion_tokens


@pytest.mark.parametrize("endpoint", ASKED)
def test_all_ways_say_the_same(demo_server: ServerProcess, client: openai.OpenAI, endpoint: str) -> None:
    whole = create(client, endpoint)
    told = text_of(whole.choices[0]), whole.usage.completion_tokens
    assert told[1] in range(1, 9)
    assert told[0].strip()
    assert endpoint == "chat" or "red" in told[0]
    assert whole._request_id
    with create(client, endpoint, **STREAM) as stream:
        assert joined(list(stream)) == told

    async def asynchronously() -> tuple[Any, list[Any]]:
        async with openai.AsyncOpenAI(**settings(demo_server)) as other:
            streamed = await create(other, endpoint, **STREAM)
            return await create(other, endpoint), [chunk async for chunk in streamed]

    answer, chunks = asyncio.run(asynchronously())
    assert (text_of(answer.choices[0]), answer.usage.completion_tokens) == told
    assert joined(chunks) == told


@pytest.mark.parametrize("endpoint", ASKED)
def test_stop(client: openai.OpenAI, endpoint: str) -> None:
    text = text_of(create(client, endpoint).choices[0])
    stop = text[len(text) // 2]
    (stopped,) = create(client, endpoint, stop=[stop]).choices
    assert (text_of(stopped), stopped.finish_reason) == (text.split(stop)[0], "stop")
    with create(client, endpoint, stop=stop, stream=True) as stream:
        assert "".join(text_of(chunk.choices[0]) for chunk in stream) == text.split(stop)[0]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [DEMO_NAME]


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    (choice,) = create(client, "completions", logprobs=2).choices
    assert "".join(choice.logprobs.tokens) == choice.text
    for token, logprob, top in zip(
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert max(top.values()) == top[token] == logprob


def test_logprobs_of_chats(client: openai.OpenAI) -> None:
    extra = {"return_token_ids": True}
    whole = create(client, "chat", logprobs=True, top_logprobs=3, extra_body=extra)
    prompt = whole.prompt_token_ids
    assert (prompt[0], prompt.count(BOS), len(prompt)) == (BOS, 1, whole.usage.prompt_tokens)
    entries = whole.choices[0].logprobs.content
    assert len(entries) == whole.usage.completion_tokens
    assert b"".join(bytes(entry.bytes) for entry in entries).decode().startswith(text_of(whole.choices[0]))
    for entry in entries:
        logprobs = [top.logprob for top in entry.top_logprobs]
        assert logprobs == sorted(logprobs, reverse=True)
        assert entry.token == entry.top_logprobs[0].token


@pytest.mark.parametrize("endpoint", ASKED)
def test_refusals_are_its_own_exceptions(client: openai.OpenAI, endpoint: str) -> None:
    with pytest.raises(openai.BadRequestError, match="n must be 1 at temperature 0") as caught:
        create(client, endpoint, n=2)
    assert caught.value.param == "n"
    assert caught.value.request_id
    with pytest.raises(openai.BadRequestError, match="unknown field: zeal"):
        create(client, endpoint, extra_body={"zeal": 1})


def test_embeddings(client: openai.OpenAI) -> None:
    texts = ["A cat sleeps.", "A cat is asleep.", "Revenue grew by 12 percent."]
    numbers = client.embeddings.create(model=DEMO_NAME, input=texts, encoding_format="float", dimensions=100)
    decoded = client.embeddings.create(model=DEMO_NAME, input=texts, dimensions=100)  # asks for base64
    vectors = np.array([item.embedding for item in numbers.data])
    assert vectors.shape == (3, 100)
    np.testing.assert_allclose(vectors, [item.embedding for item in decoded.data], atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.05
    assert numbers.usage.prompt_tokens == numbers.usage.total_tokens > 10
    with pytest.raises(openai.BadRequestError, match="dimensions must be from 1 to 640"):
        client.embeddings.create(model=DEMO_NAME, input="a", dimensions=641)
