"""Replaying traces: equal ids are equal blocks, and requests are due when the file says."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.bench.stub_server import Stub, done, running
from tests.seeds import SEED
from tokenspeed.bench.trace import Trace, TraceLine, read_trace
from tokenspeed.bench.workload import ApiName, Lengths, Workload
from tokenspeed.contracts.errors import ConfigError


def written(folder: Path, *lines: Any) -> str:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def mooncake(timestamp: float, length: int, *hash_ids: int | str, output: int = 2) -> dict[str, Any]:
    return {"timestamp": timestamp, "input_length": length, "output_length": output, "hash_ids": list(hash_ids)}


def workload(api: ApiName, seed: int = SEED) -> Workload:
    return Workload(api, "plain", Lengths(1, 1), Lengths(7, 7), seed)


def prompts(folder: Path, api: ApiName, lines: list[Any], block_size: int = 512, seed: int = SEED) -> list[list[str]]:
    read = read_trace(written(folder, *lines), api, block_size)
    bodies = [json.loads(body) for body in Trace(workload(api, seed), read, block_size).bodies()]
    if api == "completions":
        return [[str(token) for token in body["prompt"]] for body in bodies]
    return [body["messages"][0]["content"].split() for body in bodies]


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("api, block_size", [("completions", 512), ("completions", 33), ("chat", 16)])
def test_equal_ids_are_equal_blocks(tmp_path: Path, api: ApiName, block_size: int, seed: int) -> None:
    generator = random.Random(seed)
    lines = []
    for time in range(30):
        ids: list[int | str] = generator.choices(["a", 1, 2, 3, 4, 10_000], k=generator.randint(1, 4))
        lines.append(mooncake(time, len(ids) * block_size - generator.randrange(block_size), *ids))
    made = prompts(tmp_path, api, lines, block_size, seed)
    assert [len(prompt) for prompt in made] == [line["input_length"] for line in lines]
    blocks: dict[int | str, list[str]] = {}
    for prompt, line in zip(made, lines, strict=True):
        for place, key in enumerate(line["hash_ids"]):
            found = prompt[place * block_size : (place + 1) * block_size]
            known = blocks.setdefault(key, found)
            shorter = min(len(known), len(found))
            assert known[:shorter] == found[:shorter]
            if len(found) > len(known):
                blocks[key] = found
    whole = [tuple(block) for block in blocks.values() if len(block) == block_size]
    assert len(set(whole)) == len(whole), "other ids, other blocks"


def test_a_seed_is_a_trace_of_its_own(tmp_path: Path) -> None:
    lines = [mooncake(0, 600, 1, 2), {"timestamp": 1, "input_length": 50}]
    first, again = prompts(tmp_path, "completions", lines, seed=1), prompts(tmp_path, "completions", lines, seed=1)
    other = prompts(tmp_path, "completions", lines, seed=2)
    assert first == again
    assert [len(prompt) for prompt in other] == [600, 50]
    assert all(one != two for one, two in zip(first, other, strict=True))


def test_lines_with_prompts_of_their_own(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hm"}]
    path = written(
        tmp_path,
        {"timestamp": 30.5, "prompt": "later", "max_tokens": 4},
        {"timestamp": 2, "messages": messages, "output_length": 3},
        {"timestamp": 3, "prompt": "then"},
    )
    lines = read_trace(path, "chat", 512)
    bodies = [json.loads(body) for body in Trace(workload("chat"), lines).bodies()]
    assert [body["messages"][0]["content"] for body in bodies] == ["hm", "then", "later"]
    assert [body["max_tokens"] for body in bodies] == [3, 7, 4]


@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0])
def test_times_are_replayed(scale: float) -> None:
    times = [1000.0, 1004.5, 1004.5, 1030.0, 1061.0]
    lines = [TraceLine(timestamp=time, input_length=3 + number) for number, time in enumerate(times)]
    trace, stub = Trace(workload("completions"), lines, time_scale=scale), Stub(0.001, 0.0)
    assert trace.times() == pytest.approx([scale * late for late in (0, 0.0045, 0.0045, 0.03, 0.061)])
    with running(stub) as url:
        run = done(trace, url)
    assert [request.error for request in run.requests] == [None] * 5
    due = [request.due or 0.0 for request in run.requests]
    assert [at - due[0] for at in due] == pytest.approx(trace.times())
    assert all(request.late >= 0 for request in run.requests)
    assert sorted(len(body["prompt"]) for body in stub.bodies) == [3, 4, 5, 6, 7]
    assert run.load == f"a trace of 5 requests, time scale {scale:g}, at given times"


def test_what_a_cache_could_hold(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        mooncake(0, 25, 1, 2, 3),
        mooncake(1, 28, 1, 2, 4),  # 20 tokens known
        mooncake(2, 19, 5, 2),  # 2 is known, what lies before it is not
        mooncake(3, 15, 1, 2),  # all 15
        {"timestamp": 4, "input_length": 1000},
    )
    trace = Trace(workload("completions"), read_trace(path, "completions", 10), 10)
    assert trace.seen_share() == pytest.approx(35 / 87)
    assert "40.2% of their input in blocks seen before" in str(trace)
    assert Trace(workload("completions"), trace.lines[-1:], 10).seen_share() is None


def test_a_bound_and_the_description(tmp_path: Path) -> None:
    lines = read_trace(written(tmp_path, *(mooncake(0, 5, 1) for _ in range(6))), "completions", 512)
    stub = Stub(0.01, 0.0)
    with running(stub) as url:
        run = done(Trace(workload("completions"), lines, max_concurrency=2), url)
    assert stub.most_running <= 2
    assert run.load.endswith("at given times, at most 2 under way")


@pytest.mark.parametrize(
    "line, api, complaint",
    [
        ("{", "chat", "line 2"),
        ({"timestamp": 0}, "chat", "needs either prompt or messages"),
        ({"prompt": "a"}, "chat", "timestamp"),
        ({"timestamp": 0, "prompt": "a", "input_length": 3}, "chat", "one of prompt, messages and input_length"),
        ({"timestamp": 0, "hash_ids": [1], "prompt": "a"}, "chat", "hash_ids need input_length"),
        ({"timestamp": 0, "messages": []}, "completions", "--api chat"),
        ({"timestamp": 0, "prompt": "a", "max_tokens": 1, "output_length": 1}, "chat", "both max_tokens and output_"),
        (mooncake(0, 512, 1, 2), "chat", "input_length 512 is not that of 2 hash_ids of 512 tokens (see --block-size)"),
        (mooncake(0, 1025, 1, 2), "chat", "--block-size"),
        (mooncake(0, 0), "chat", "input_length must be at least 1, got 0"),
        (mooncake(0, 5, 1, output=0), "chat", "output_length must be at least 1, got 0"),
        ({"timestamp": 0, "prompt": "a", "session": 1}, "chat", "session"),
    ],
)
def test_lines_that_cannot_be_replayed(tmp_path: Path, line: Any, api: ApiName, complaint: str) -> None:
    path = written(tmp_path, mooncake(0, 5, 1), line)
    with pytest.raises(ConfigError) as raised:
        read_trace(path, api, 512)
    assert complaint in str(raised.value)
    assert f"--trace {path}, line 2" in str(raised.value)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_scales_that_are_none(scale: float) -> None:
    with pytest.raises(ConfigError, match="--time-scale must be above 0"):
        Trace(workload("chat"), [], time_scale=scale)
