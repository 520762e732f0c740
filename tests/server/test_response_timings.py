"""`timings`: what of a request's metrics is shown, and where."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest

from tests.seeds import SEED
from tests.server.conftest import Served
from tests.server.fake_engine import CACHED, EOS
from tokenspeed.engine.messages import EngineInfo
from tokenspeed.engine.output import RequestMetrics
from tokenspeed.server.openai.timings import floor_ms, response_timings

FLOOR = [(1, 2.0), (2, 3.0), (10, 7.0)]
INFO = EngineInfo(model="m", max_model_len=10, vocab_size=5, fallback_ops=["moe"], decode_floor=FLOOR)
TALK = [{"role": "user", "content": "hi"}]


def metrics(arrival: float, queue: float, prefill: float, decode: float, tokens: int) -> RequestMetrics:
    first = arrival + queue + prefill
    return RequestMetrics(arrival, first, first + decode, queue, tokens)


@pytest.mark.parametrize("context, floor", [(0, 2), (1, 2), (2, 3), (4, 4), (9, 6.5), (10, 7), (5000, 7)])
def test_the_floor_lies_on_lines(context: int, floor: float) -> None:
    assert floor_ms(FLOOR, context) == pytest.approx(floor)


@pytest.mark.parametrize("seed", range(SEED, SEED + 5))
def test_one_prompt(seed: int) -> None:
    draw = random.Random(seed)
    queue, prefill, decode, tokens = draw.random(), draw.random(), draw.random(), draw.randint(2, 7)
    timings = response_timings([(2, 1, metrics(draw.random(), queue, prefill, decode, tokens))], INFO)
    tpot = 1e3 * decode / (tokens - 1)
    shown = timings.queue_ms, timings.prefill_ms, timings.ttft_ms, timings.tpot_ms, timings.share_of_floor
    floor = floor_ms(FLOOR, 2 + tokens // 2)
    assert shown == pytest.approx((1e3 * queue, 1e3 * prefill, 1e3 * (queue + prefill), tpot, floor / tpot))
    assert (timings.cached_tokens, timings.fallback_ops) == (1, ["moe"])


def test_several_prompts_count_by_the_slowest() -> None:
    timings = response_timings([(2, 1, metrics(5, 3, 1, 8, 5)), (4, 2, metrics(5, 1, 5, 6, 3))], INFO)
    assert (timings.queue_ms, timings.prefill_ms, timings.ttft_ms) == pytest.approx((3000, 5000, 6000))
    assert timings.tpot_ms == pytest.approx(3000)
    assert timings.cached_tokens == 3
    assert timings.share_of_floor == pytest.approx(min(4.0 / 2000, 4.5 / 3000))


def test_what_is_not_known_is_null() -> None:
    one_token = response_timings([(2, 0, metrics(5, 3, 1, 0, 1))], INFO)
    assert (one_token.tpot_ms, one_token.share_of_floor) == (None, None)
    unmeasured = msgspec.structs.replace(INFO, decode_floor=[])
    untold = RequestMetrics(5.0, 6.0, 7.0, None, 3)
    timings = response_timings([(2, 0, untold)], unmeasured)
    assert (timings.queue_ms, timings.prefill_ms, timings.share_of_floor) == (None, None, None)
    assert (timings.ttft_ms, timings.tpot_ms) == (1000, 500)


def events(served: Served, path: str, fields: dict[str, Any]) -> list[Any]:
    response = served.client.post(path, json=fields | {"stream": True})
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "path, fields, num_prompts",
    [
        ("/v1/completions", {"prompt": "abc"}, 1),
        ("/v1/completions", {"prompt": ["abc", "de"]}, 2),
        ("/v1/chat/completions", {"messages": TALK}, 1),
    ],
)
def test_every_answer_has_them(served: Served, path: str, fields: dict[str, Any], num_prompts: int, n: int) -> None:
    served.engine.info = msgspec.structs.replace(
        served.engine.info, fallback_ops=["moe", "rope"], decode_floor=[(1, 0.5), (9, 0.75)]
    )
    fields = fields | {"n": n}
    if n > 1:  # all samples end in one output
        served.engine.answer = lambda request, index: [*b"ab", EOS]
    whole = served.client.post(path, json=fields).json()["timings"]
    bare = events(served, path, fields)
    counted = events(served, path, fields | {"stream_options": {"include_usage": True}})
    for stream in (bare, counted):
        assert ["timings" in event for event in stream] == [False] * (len(stream) - 1) + [True]
    assert counted[-1]["usage"] is not None
    assert bare[-1]["choices"][0]["finish_reason"] == "stop"
    for found in (whole, bare[-1]["timings"], counted[-1]["timings"]):
        assert found["queue_ms"] >= 0
        assert found["prefill_ms"] >= 0
        assert found["ttft_ms"] <= found["queue_ms"] + found["prefill_ms"] + 1e-6
        assert 0.5 / found["tpot_ms"] <= found["share_of_floor"]
        assert (found["cached_tokens"], found["fallback_ops"]) == (CACHED * num_prompts, ["moe", "rope"])
