"""The serving overhead, measured over a few tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenspeed.bench import record, serving_overhead
from tokenspeed.bench.relay import relay_cpu_us
from tokenspeed.bench.serving_overhead import Shape, run_load, serving


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_overhead, "ONE", Shape(1, 1.0, 40))
    monkeypatch.setattr(serving_overhead, "ONE_SLOWLY", Shape(1, 2.0, 20))
    monkeypatch.setattr(serving_overhead, "MANY", Shape(5, 1.0, 40))
    monkeypatch.setattr(serving_overhead, "FIRST_TOKENS", 2)


def test_a_load_counts_every_token() -> None:
    with serving(1.0) as server:
        load = run_load(server, Shape(7, 1.0, 23))
    assert [stream.tokens for stream in load.streams] == [23] * 7
    assert all(stream.first > stream.sent for stream in load.streams)
    assert all(1 < stream.events <= 25 for stream in load.streams)
    assert load.cpu_s > 0
    assert set(load.figures) == {"cpu_us", "tokens_per_s", "itl_p99_ms", "events_per_token"}


def test_the_relay_takes_some_time() -> None:
    assert 0 < relay_cpu_us(0.5, 40) < 100_000


@pytest.mark.slow
def test_all_records_are_written(small: None, tmp_path: Path) -> None:
    out = tmp_path / "server.json"
    serving_overhead.main(["--runs", "1", "--out", str(out)])
    assert [entry.id for entry in record.read(out)] == [
        "server.cpu_per_token.c1.us",
        "server.cpu_per_token.c1_slow.us",
        "server.cpu_per_token.c256.us",
        "server.events_per_token.c256",
        "server.itl_p99.c256.ms",
        "server.tokens_per_s.c256",
        "server.ttft_overhead.ms",
    ]
    floors = {entry.id: entry.floor for entry in record.read(out) if entry.floor is not None}
    assert set(floors) == {"server.cpu_per_token.c1.us", "server.cpu_per_token.c1_slow.us"}
