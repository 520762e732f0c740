"""Each workload by its command, against a server that remembers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bench.stub_server import Remembering, Stalling, Stub, running
from tokenspeed.bench.record import read
from tokenspeed.cli.main import main

Bench = Callable[..., Any]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    """The report of a command that ends well."""

    def run(stub: Stub, *arguments: str) -> Any:
        with running(stub) as url:
            status = main(["bench", "serve", "--base-url", url, "--json", "-", "--output-len", "3", *arguments])
        captured = capsys.readouterr()
        assert (status, captured.err) == (0, "")
        return json.loads(captured.out)

    return run


@pytest.mark.parametrize("api", [("--api", "chat"), (), ("--token-ids",)])
def test_multi_turn(bench: Bench, api: tuple[str, ...], tmp_path: Path) -> None:
    stub, record = Remembering(), tmp_path / "figures.json"
    lengths = ("--input-len", "20", "--turn-len", "5:9", "--turns", "3", "--num-conversations", "4")
    found = bench(stub, "--workload", "multi-turn", "--concurrency", "2", *lengths, *api, "--record", str(record))
    assert (found["completed"], len(stub.bodies)) == (12, 13)
    assert [(part["name"], part["requests"]) for part in found["parts"]] == [("turn1", 4), ("turn2", 4), ("turn3", 4)]
    tokens = [part["input_tokens"] for part in found["parts"]]
    assert 20 <= tokens[0] < tokens[1] < tokens[2]
    assert found["load"] == "4 conversations, 2 at once"
    assert {"serve.bench.turn3.ttft.p50", "serve.bench.turn2.cached"} <= {each.id for each in read(record)}


def test_shared_prefix(bench: Bench) -> None:
    stub = Remembering()
    sizes = ("--groups", "3", "--group-size", "4", "--prefix-len", "50", "--suffix-len", "5")
    found = bench(stub, "--workload", "shared-prefix", "--concurrency", "1", *sizes)
    assert [(part["name"], part["requests"]) for part in found["parts"]] == [("first", 3), ("rest", 9)]
    assert found["parts"][1]["cached_share"] >= 50 / 55
    assert {len(body["prompt"]) for body in stub.bodies} == {55}
    assert found["load"] == "3 groups of 4, 1 at once"


def test_interference(bench: Bench) -> None:
    stub = Stalling(100, read_s=0.03, gap_s=0.002)
    where = ("--workload", "interference", "--concurrency", "2", "--rate", "50", "--settle", "0.1")
    found = bench(stub, *where, "--input-len", "4", "--inject-len", "100:110", "--num-requests", "3")
    assert found["parts"][-1]["name"] == "injected"
    assert found["parts"][-1]["requests"] == len(stub.readings) == 3
    assert found["ttft_ms"] is None
    assert found["arrivals"]["most_under_way"] <= 3


def test_bursts_with_a_bound(bench: Bench) -> None:
    stub = Remembering(first_s=0.02)
    where = ("--rate", "200", "--burstiness", "0.2", "--max-concurrency", "2", "--num-requests", "9")
    found = bench(stub, *where, "--input-len", "4")
    assert (found["completed"], found["arrivals"]["waited"] <= 9) == (9, True)
    assert stub.most_running <= 2
    assert found["load"] == "200 req/s, gamma with burstiness 0.2, at most 2 under way"


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_trace(bench: Bench, api: str, tmp_path: Path) -> None:
    path, stub = tmp_path / "trace.jsonl", Remembering()
    hashes = [[0, 1, number + 9] for number in range(5)]
    lines = [{"timestamp": 200 + 30 * n, "input_length": 41 + n, "hash_ids": ids} for n, ids in enumerate(hashes)]
    path.write_text("\n".join(map(json.dumps, lines)))
    where = ("--trace", str(path), "--block-size", "20", "--time-scale", "0.5", "--num-requests", "4")
    found = bench(stub, *where, "--api", api)
    assert (found["completed"], len(stub.bodies)) == (4, 5)
    assert "a trace of 4 requests, time scale 0.5, 70.6% of their input in blocks seen before" in found["load"]
    assert all(cached >= 40 for _, cached in list(stub.counted.values())[2:])
