"""Events written past the coroutines are those that would have come through them."""

from __future__ import annotations

import asyncio
import random
import re
from typing import Any

import msgspec
import pytest

from tests.seeds import SEED
from tests.server.fake_engine import FakeEngine, byte_tokenizer
from tokenspeed.server.app import create_app
from tokenspeed.server.direct import WriteText
from tokenspeed.server.engine import Engine, Progress
from tokenspeed.server.state import ServerState

PROMPT = 'Grüße, 世界! and "quotes" \\ plain'
CHAT = {"messages": [{"role": "user", "content": PROMPT}]}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_VARIES = re.compile(rb'"(id|created)":("[^"]*"|\d+),|,?"timings":{[^}]*}')


async def response(path: str, fields: dict[str, Any], refuses: random.Random | None) -> tuple[bytes, int, bytes]:
    """The body that a request gets, how many of its pieces were written directly, and the metrics afterwards. refuses:
    says which direct writes do not succeed; None offers none."""
    state = ServerState()

    async def start(progress: Progress) -> Engine:
        return FakeEngine(tokenizer=byte_tokenizer(TEMPLATE))

    await state.load(start)
    body = msgspec.json.encode(fields | {"stream": True})
    sent: list[bytes] = []
    direct, never, turns = 0, asyncio.Event(), random.Random(SEED)

    def writer(before: bytes, after: bytes) -> WriteText:
        def write(text: str) -> bool:
            nonlocal direct
            if refuses is not None and refuses.random() < 0.3:
                return False
            direct += 1
            sent.append(before + msgspec.json.encode(text) + after)
            return True

        return write

    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await never.wait()
        asked = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        if turns.random() < 0.3:
            await asyncio.sleep(0)
        sent.append(message.get("body", b""))

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "http_version": "1.1",
        "scheme": "http",
        "client": ("127.0.0.1", 9),
        "server": ("127.0.0.1", 8),
        "asgi": {"version": "3.0"},
        "extensions": {} if refuses is None else {"tokenspeed.write": {"call": writer}},
    }
    await create_app(state)(scope, receive, send)
    return _VARIES.sub(b"", b"".join(sent)), direct, state.metrics.render()


def texts(body: bytes) -> str:
    """All text of the events."""
    found = ""
    for line in body.splitlines():
        if line.startswith(b"data: {"):
            for choice in msgspec.json.decode(line[6:]).get("choices", []):
                found += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
    return found


def tokens_counted(metrics: bytes) -> list[bytes]:
    return re.findall(rb"^tokenspeed:(?:generation|prompt)_tokens_total.*$", metrics, re.MULTILINE)


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize(("path", "fields"), [("/v1/completions", {"prompt": PROMPT}), ("/v1/chat/completions", CHAT)])
def test_the_same_bytes(path: str, fields: dict[str, Any], usage: bool) -> None:
    if usage:
        fields = fields | {"stream_options": {"include_usage": True}}
    fields = fields | {"max_tokens": 60}
    slow, none, slow_metrics = asyncio.run(response(path, fields, None))
    rng = random.Random(SEED)
    fast, some, fast_metrics = asyncio.run(response(path, fields, rng))
    assert (none, some > 0) == (0, True)
    assert texts(fast) == texts(slow)
    assert len(texts(slow)) > 20
    assert fast.splitlines()[-5:] == slow.splitlines()[-5:]
    assert tokens_counted(fast_metrics) == tokens_counted(slow_metrics) != []


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": PROMPT, "n": 2},
        {"prompt": [PROMPT, "b"]},
        {"prompt": PROMPT, "logprobs": 1},
        {"prompt": PROMPT, "return_token_ids": True},
        {"prompt": PROMPT, "max_tokens": 0, "echo": True},
        {"prompt": PROMPT, "stop": "never said"},
    ],
    ids=lambda fields: ",".join(name for name in fields if name != "prompt") or "prompts",
)
def test_what_is_more_than_text_goes_its_way(fields: dict[str, Any]) -> None:
    body, direct, _ = asyncio.run(response("/v1/completions", {"max_tokens": 30} | fields, random.Random(SEED)))
    assert direct == 0
    assert body.endswith(b"data: [DONE]\n\n")
