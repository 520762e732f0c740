"""The soak: what it asks for, how it judges, and a few seconds of it on a tiny model."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_llama
from tests.bench.stub_server import Stub, running
from tests.engine.async_tools import write_byte_tokenizer
from tests.seeds import SEED
from tokenspeed.bench import soak
from tokenspeed.bench.record import Record, read, surroundings
from tokenspeed.bench.running_server import free_port, our_command, serving
from tokenspeed.bench.soak import FLAGS, Plan
from tokenspeed.bench.soak_clients import Clients, Outcome
from tokenspeed.bench.soak_traffic import CHAT, COMPLETIONS, Ask, Traffic
from tokenspeed.bench.soak_verdict import Minute, change, growth, minutes_of, settled, trend, verdict
from tokenspeed.bench.soak_watch import Sample
from tokenspeed.bench.sse_client import Client, Endpoint
from tokenspeed.contracts.errors import ConfigError

KINDS = {
    "completion stream",
    "chat stream",
    "completion",
    "chat samples",
    "samples stream",
    "logprobs",
    "stop",
    "prefix",
    "long prompt",
    "leaves",
    "refused",
}


def minute(**changes: Any) -> Minute:
    fields: dict[str, Any] = {
        "server_mib": 100.0,
        "engine_mib": 500.0,
        "files": 20,
        "pages": 10,
        "ttft_p50": 10.0,
        "ttft_p99": 50.0,
        "itl_p50": 5.0,
        "itl_p99": 9.0,
        "labels": {"answered": 9, "429": 1},
        "tokens": 100,
        "unexpected": 0,
    }
    return Minute(**fields | changes)


def judged(minutes: list[Minute], unexpected: int = 0, left: dict[str, float] | None = None) -> dict[str, Record]:
    found = verdict(minutes, unexpected, {"pages_held": 0.0} if left is None else left, surroundings("make x"))
    return {record.id.removeprefix("server.soak."): record for record in found}


def missed(records: dict[str, Record]) -> set[str]:
    return {name for name, record in records.items() if record.met() is False}


def test_a_good_run() -> None:
    found = judged([minute() for _ in range(20)])
    assert missed(found) == set()
    assert set(found) == {
        "memory.server",
        "memory.engine",
        "trend.server",
        "trend.engine",
        "ttft.p99.change",
        "itl.p99.change",
        "unexpected",
        "left",
        "requests",
    }
    assert found["requests"].value == 200
    assert found["requests"].samples["ended.429"] == [1] * 20
    assert found["memory.engine"].samples["engine_mib"] == [500] * 20


@pytest.mark.parametrize(
    "changes, wrong",
    [
        (lambda at: {"server_mib": 100 + at}, {"memory.server", "trend.server"}),
        (lambda at: {"engine_mib": 500 + 10 * at}, {"memory.engine", "trend.engine"}),
        (lambda at: {"engine_mib": 300 if at < 4 else 500}, set()),
        (lambda at: {"server_mib": 104 if at == 19 else 100}, {"memory.server"}),
        (lambda at: {"server_mib": 90 if at == 4 else 90 + at / 2}, {"memory.server", "trend.server"}),
        (lambda at: {"ttft_p99": 50 + 5 * at}, {"ttft.p99.change"}),
        (lambda at: {"ttft_p99": 500 if at == 19 else 50}, set()),
        (lambda at: {"itl_p99": 9 if at < 14 else 30}, {"itl.p99.change"}),
        (lambda at: {"server_mib": 200 - at}, set()),
    ],
)
def test_what_is_missed(changes: Any, wrong: set[str]) -> None:
    assert missed(judged([minute(**changes(at)) for at in range(20)])) == wrong


def test_errors_and_leaks_are_missed() -> None:
    minutes = [minute() for _ in range(5)]
    assert missed(judged(minutes, unexpected=1)) == {"unexpected"}
    assert missed(judged(minutes, left={"pages_held": 0.0, "files": 2.0})) == {"left"}
    with pytest.raises(ConfigError, match="2 intervals"):
        judged(minutes[:2])


@pytest.mark.parametrize("count, index", [(20, 4), (17, 4), (16, 3), (5, 1), (3, 0), (1, 0)])
def test_where_memory_has_settled(count: int, index: int) -> None:
    assert settled(count) == index


def test_series() -> None:
    series = [50.0] * 4 + [100.0 + step for step in range(11)]
    assert growth([50.0] * 4 + [100.0] + [1.0] * 15 + [104.0]) == pytest.approx(4)
    assert trend([*series[:4], *[100.0] * 6, *series[4:]]) > 0
    assert trend([0.0] * 4 + [100.0 + step for step in range(16)]) == pytest.approx(15)
    assert trend([100.0]) == 0
    assert change([1.0, 2.0, 9.0, 9.0, 5.0, 3.0]) == pytest.approx(4 / 1.5)


def test_intervals() -> None:
    samples = [Sample(100.0 + at / 2, 10.0 + at, 20.0, 3 + at % 2, at, 0, 0) for at in range(9)]
    outcomes = [
        Outcome("a", "answered", 100.5, ttft=0.1, gaps=[0.01, 0.03], tokens=3),
        Outcome("a", "429", 100.6),
        Outcome("a", "answered", 102.5, ttft=0.2, gaps=[0.02], tokens=2, unexpected="a smell"),
        Outcome("a", "answered", 104.1, ttft=9.0, gaps=[9.0]),
    ]
    first, second = minutes_of(samples, outcomes, 100.0, 2.0)
    assert (first.server_mib, second.server_mib) == (11.5, 15.5)
    assert (first.files, first.pages, second.pages) == (4, 3, 7)
    assert (first.ttft_p50, second.ttft_p50) == pytest.approx((100, 200))
    assert first.itl_p50 == pytest.approx(20)
    assert (first.labels, first.tokens, second.unexpected) == ({"answered": 1, "429": 1}, 3, 1)
    assert minutes_of([], outcomes, 100.0, 2.0) == []


@pytest.mark.parametrize("seed", [SEED])
def test_traffic_is_mixed_and_keeps_within_the_model(seed: int) -> None:
    traffic, again = (Traffic("m", 256, 1.5, seed) for _ in range(2))
    asks = [traffic.next() for _ in range(2000)]
    assert asks == [again.next() for _ in range(2000)]
    kinds = Counter(ask.kind for ask in asks)
    assert set(kinds) == KINDS
    assert {ask.path for ask in asks} == {COMPLETIONS, CHAT}
    assert {ask.status for ask in asks if ask.kind == "refused"} == {400, 404}
    assert {ask.leave_after for ask in asks if ask.kind == "leaves"} == set(range(9))
    for ask in asks:
        if ask.kind in ("refused", "leaves"):
            continue
        body = json.loads(ask.body)
        text = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        assert len(text.split()) * 1.5 + body["max_tokens"] < 256
        assert (ask.stream, ask.choices) == (body.get("stream", False), body.get("n", 1))
        assert ask.most_tokens == ask.choices * body["max_tokens"]
    assert len(traffic.burst(7)) == 7


def outcome(url: str, ask: Ask) -> Outcome:
    """Of one request to a stub."""

    async def perform() -> Outcome:
        client = Client(Endpoint.parse(url))
        clients = Clients(client, Traffic("plain", 64, 1.0, 0), 0, 0, 1.0)
        try:
            await clients._perform(ask)
        finally:
            client.close()
        return clients.outcomes[0]

    return asyncio.run(perform())


@pytest.mark.parametrize(
    "model, changes, label, unexpected",
    [
        ("plain", {}, "answered", None),
        ("empty", {}, "answered", None),
        ("plain", {"most_tokens": 3}, "answered", "4 tokens, asked for 3"),
        ("no-usage", {}, "answered", "no usage in the stream"),
        ("error-event", {}, "answered", "the engine died"),
        ("cut", {}, "failed", "closed before the response ended"),
        ("http-500", {}, "500", "HTTP 500"),
        ("http-500", {"status": 500}, "500", None),
        ("hang", {"leave_after": 1}, "left", None),
        ("plain", {"leave_after": 0}, "left", None),
    ],
)
def test_how_requests_end(model: str, changes: dict[str, Any], label: str, unexpected: str | None) -> None:
    body = json.dumps({"model": model, "max_tokens": 4, "stream": True}).encode()
    with running(Stub(0.05, 0.001)) as url:
        found = outcome(url, replace(Ask("k", "/completions", body, stream=True, most_tokens=4), **changes))
    assert found.label == label
    if unexpected is None:
        assert found.unexpected is None
    else:
        assert unexpected in (found.unexpected or "")


def test_an_answer_that_changes_is_noticed() -> None:
    clients = Clients(Client(Endpoint.parse("http://x:1")), Traffic("m", 64, 1.0, 0), 0, 0, 1.0)
    ask = Traffic("m", 64, 1.0, 0).reference()

    def answer(*texts: str) -> dict[str, Any]:
        return {"choices": [{"text": text} for text in texts], "usage": {"completion_tokens": 5}}

    assert clients._check(ask, answer("a")) is None
    assert clients._check(ask, answer("a")) is None
    assert "before ['a']" in (clients._check(ask, answer("b")) or "")
    assert "2 choices" in (clients._check(ask, answer("a", "b")) or "")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model with a tokenizer of bytes."""
    monkeypatch.setattr(tiny_llama, "VOCAB", 300)
    tiny_llama.write_tiny(tmp_path, SEED, vocab_size=300, max_position_embeddings=512)
    return write_byte_tokenizer(tmp_path)


@pytest.mark.slow
def test_a_few_seconds(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing goes wrong and nothing is left; figures of a busy machine are not looked at."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = [*FLAGS, "--max-model-len", "256", "--dtype", "float32", "--kv-cache-memory-bytes", str(2**22)]
    port = free_port()
    with serving(our_command(port, tiny, *flags), port) as server:
        soaked = asyncio.run(soak.soak(server, Plan(seconds=4, interval=1.0, at_once=3, burst_s=1.0, seed=SEED)))
    assert soaked.unexpected == {}
    assert set(soaked.left.values()) == {0.0}, soaked.left
    assert set(soaked.left) == {"num_running", "num_waiting", "pages_held", "pages_cached", "files"}
    labels = Counter(outcome.label for outcome in soaked.outcomes)
    assert set(labels) <= {"answered", "left", "400", "404", "429"}
    assert labels["answered"] > 0
    assert {"burst", "reference"} <= {outcome.kind for outcome in soaked.outcomes}
    assert all(minute.server_mib > 10 and minute.engine_mib > 10 for minute in soaked.minutes)


@pytest.mark.parametrize("ratio, status", [(1.0, 0), (2.0, 1)])
def test_the_command_says_whether_it_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: float, status: int
) -> None:
    minutes = [minute(ttft_p99=50.0 * (ratio if at > 2 else 1)) for at in range(6)]
    monkeypatch.setattr(soak, "run", lambda model, plan, command: list(judged(minutes).values()))
    out = tmp_path / "soak.json"
    assert soak.main(["--minutes", "1", "--model", str(tmp_path), "--out", str(out)]) == status
    assert {record.id for record in read(out)} >= {"server.soak.left"}


def test_the_command_without_a_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> list[Record]:
        raise ConfigError("the server ended with status 1")

    monkeypatch.setattr(soak, "run", refuse)
    out = tmp_path / "soak.json"
    assert soak.main(["--model", str(tmp_path), "--out", str(out)]) == 2
    assert "ended with status 1" in capsys.readouterr().err
    assert not out.exists()
