"""Plain text that goes past the reader of a stream."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.engine.async_tools import run
from tests.seeds import SEED
from tests.server.fake_engine import byte_tokenizer
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.sampling import RequestOutputKind, SamplingParams
from tokenspeed.contracts.step import TokenLogprobs
from tokenspeed.engine.stream import Outbox, RequestStream

TEXT = "Grüße, 世界! 🦜 plain text, then more of it. "


def outbox(**fields: object) -> Outbox:
    params = SamplingParams.from_dict({"output_kind": RequestOutputKind.DELTA, "max_tokens": 1000, **fields})
    return Outbox(Request(request_id="a", prompt_token_ids=[1], params=params, seed=0), "a", None, byte_tokenizer())


def token(*ids: int, **fields: object) -> SequenceUpdate:
    return SequenceUpdate(request_id="a", new_token_ids=list(ids), **fields)  # type: ignore[arg-type]


async def read_everything(box: Outbox, updates: list[SequenceUpdate], accepts: random.Random | None) -> list[str]:
    """What the reader and the sink got, in order, the sink's with a mark; the sink refuses now and then."""
    stream, got = RequestStream(box, lambda: None), list[str]()

    def sink(text: str, count: int) -> bool:
        assert count > 0
        if accepts is not None and accepts.random() < 0.3:
            return False
        got.append(f"sink:{text}")
        return True

    async def read() -> None:
        async for output in stream:
            await asyncio.sleep(0)
            got.append("reader:" + "".join(completion.text for completion in output.outputs))

    stream.push_to(sink)
    reader = asyncio.ensure_future(read())
    for update in updates:
        for _ in range(0 if accepts is None else accepts.randrange(4)):
            await asyncio.sleep(0)
        box.take(update)
        if accepts is None:
            for _ in range(4):
                await asyncio.sleep(0)
    await reader
    return got


def joined(parts: list[str]) -> str:
    return "".join(part.partition(":")[2] for part in parts)


@pytest.mark.parametrize("seed", [SEED, SEED + 1, SEED + 2])
def test_order_and_text_are_kept_whoever_takes_them(seed: int) -> None:
    rng = random.Random(seed)
    data = TEXT.encode() * 20
    updates = []
    while data:
        count = rng.choice((1, 1, 1, 2, 5))
        updates.append(token(*data[:count], finish_reason="length" if len(data) <= count else None))
        data = data[count:]
    box = outbox()
    got = run(read_everything(box, updates, rng))
    assert joined(got) == TEXT * 20
    assert {part.partition(":")[0] for part in got} == {"sink", "reader"}
    (sample,) = box.output.outputs
    assert sample.text == TEXT * 20
    assert bytes(sample.token_ids) == (TEXT * 20).encode()


def test_the_first_and_the_last_of_a_sample_are_the_readers() -> None:
    got = run(read_everything(outbox(), [token(97), token(98), token(99), token(100, finish_reason="length")], None))
    assert got == ["reader:a", "sink:b", "sink:c", "reader:d"]


LOGPROBS = [TokenLogprobs(98, -0.5, 1, [], [])]


@pytest.mark.parametrize(
    ("fields", "second"),
    [
        ({"stop": ["never said"]}, token(98)),
        ({"logprobs": 0}, token(98, logprobs=LOGPROBS)),
        ({"prompt_logprobs": 0}, token(98, prompt_logprobs=LOGPROBS)),
        ({"detokenize": False}, token(98)),
    ],
    ids=["stop", "logprobs", "prompt_logprobs", "detokenize"],
)
def test_what_is_not_plain_is_the_readers(fields: dict[str, object], second: SequenceUpdate) -> None:
    first = token(97, logprobs=second.logprobs)
    last = token(99, finish_reason="length", logprobs=second.logprobs)
    got = run(read_everything(outbox(**fields), [first, second, last], None))
    assert all(part.startswith("reader:") for part in got)
