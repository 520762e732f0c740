"""The load generator's own error: against what a server says that it did, with clocks of the test."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenspeed.bench import client_error, guidellm
from tokenspeed.bench.client_error import Round, compared, main, peer_records, records
from tokenspeed.bench.guidellm import Said, read
from tokenspeed.bench.measured import Measured
from tokenspeed.bench.record import read as read_records
from tokenspeed.bench.record import surroundings
from tokenspeed.bench.timed_server import Did, TimedServer
from tokenspeed.contracts.errors import ConfigError

AROUND = surroundings("x")


@pytest.fixture
def url() -> Iterator[str]:
    with TimedServer(0.004, 0.001) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.url
        server.shutdown()


def measured(sent: float, first: float, gaps: list[float]) -> Measured:
    """As the client would have it."""
    request = Measured(sent=sent)
    for number in range(len(gaps) + 1):
        request.on_event(first + sum(gaps[:number]), b'{"choices":[{"text":"x"}]}')
    request.on_event(99.0, json.dumps({"usage": {"prompt_tokens": 3, "completion_tokens": len(gaps) + 1}}).encode())
    request.end()
    return request


def test_a_round_has_the_medians_of_both_sides() -> None:
    requests = [
        measured(1.0, 1.052, [0.01, 0.012]),
        measured(2.0, 2.053, [0.01, 0.01]),
        measured(3.0, 3.06, [0.03, 0.01]),
    ]
    did = [Did(1.001, [1.051, 1.061, 1.071]), Did(2.0, [2.052, 2.062, 2.074]), Did(3.0, [3.051, 3.061, 3.072])]
    found = compared(requests, did, 0.5)
    assert (found.ttft, found.did_ttft) == pytest.approx((53.0, 51.0))
    assert (found.tpot, found.did_tpot) == pytest.approx((11.0, 10.5))
    assert found.calibration_s == 0.5


def test_a_request_that_failed_or_is_unknown_to_the_server_is_no_result() -> None:
    good, bad = measured(1.0, 1.052, [0.01]), Measured(error="gone")
    did = Did(1.0, [1.05, 1.06])
    for requests, known in (([good, bad], [did, did]), ([good], [did, did])):
        with pytest.raises(ConfigError, match=rf"{len(requests)} requests were sent, 2 answered"):
            compared(requests, known, 0.5)


def test_limits_are_a_share_of_the_time_or_a_fifth_of_a_millisecond() -> None:
    rounds = [Round(50.0 + error, 5.0 - error, 50.0, 5.0, 0.1) for error in (0.1, 0.3, 2.0)]
    ttft, tpot = records(4, rounds, AROUND)
    assert (ttft.id, tpot.id) == ("client.c4.ttft.error", "client.c4.tpot.error")
    assert (ttft.value, tpot.value) == pytest.approx((0.3, 0.3))
    assert ttft.target is not None
    assert tpot.target is not None
    assert (ttft.target.at_most, tpot.target.at_most) == pytest.approx((1.0, 0.2))
    assert (ttft.met(), tpot.met()) == (True, False)
    assert ttft.samples["said"] == [50.1, 50.3, 52.0]


def test_the_other_generator_agrees_within_per_cents() -> None:
    rounds = [Round(each, 10.0, 50.0, 10.0, 0.1) for each in (51.0, 52.0, 50.0)]
    ttft, tpot = peer_records(2, rounds, [Said(50.0, 10.4, 9)] * 3, AROUND)
    assert (ttft.value, tpot.value) == pytest.approx((2.0, 100 * (1 - 10 / 10.4)))
    assert (ttft.met(), tpot.met()) == (True, False)
    assert ttft.peer == guidellm.NAME


@pytest.mark.parametrize("api", ["completions", "chat/completions"])
def test_the_server_notes_what_it_did(url: str, api: str) -> None:
    import urllib.request

    asked: dict[str, Any] = {"max_tokens": 3} | ({"prompt": [1, 2]} if api == "completions" else {})
    if api != "completions":
        asked["messages"] = [{"role": "user", "content": "two words"}]
    with urllib.request.urlopen(f"{url}/v1/{api}", data=json.dumps(asked).encode(), timeout=30) as response:
        lines = [line[6:] for line in response.read().decode().split("\n") if line]
    assert lines.pop() == "[DONE]"
    assert json.loads(lines.pop())["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert len(lines) == 3
    with urllib.request.urlopen(f"{url}/v1/did", timeout=30) as response:
        (did,) = json.load(response)
    # It may be late, never early.
    due = [did["read"] + 0.004 + number * 0.001 for number in range(3)]
    assert all(at >= when - 1e-6 for at, when in zip(did["events"], due, strict=True))
    with urllib.request.urlopen(f"{url}/v1/did", timeout=30) as response:
        assert json.load(response) == []


def test_a_time_is_never_shorter_than_the_server_s(url: str) -> None:
    """The client's clock runs from before the request was read to after the first token was handed over."""
    found, did = asyncio.run(client_error._drive(url, 3, 9))
    assert len(found) == len(did) == 9
    assert sorted(request.output_tokens for request in found) == [client_error.TOKENS] * 9
    for mine, its in zip(sorted(each.ttft for each in found), sorted(each.ttft for each in did), strict=True):
        assert mine >= its


def test_the_command_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client_error, "FIRST_MS", 3.0)
    monkeypatch.setattr(client_error, "GAP_MS", 0.5)
    monkeypatch.setattr(guidellm, "install", lambda: Path("guidellm"))
    asked = []

    def said(program: Path, url: str, streams: int, requests: int, tokens: int) -> Said:
        asked.append((str(program), streams, requests, tokens))
        return Said(3.0, 0.5, requests)

    monkeypatch.setattr(guidellm, "measure", said)
    out = tmp_path / "client.json"
    assert main(["--concurrency", "2", "--rounds", "2", "--requests", "3", "--out", str(out)]) == 0
    assert asked == [("guidellm", 2, 6, client_error.TOKENS)] * 2
    kinds = ["tpot.against_guidellm", "tpot.error", "ttft.against_guidellm", "ttft.error"]
    assert [record.id for record in read_records(out)] == [f"client.c2.{kind}" for kind in kinds]
    assert "client.c2.ttft.error" in capsys.readouterr().out
    assert main(["--rounds", "0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err


def test_what_guidellm_says() -> None:
    def metric(median: float, count: int) -> dict[str, Any]:
        return {"successful": {"median": median, "count": count}}

    metrics = {"time_to_first_token_ms": metric(51.0, 4), "inter_token_latency_ms": metric(10.1, 120)}
    report = {"benchmarks": [{"metrics": metrics}]}
    assert read(report, 4) == Said(51.0, 10.1, 4)
    with pytest.raises(ConfigError, match="4 of 5 requests were answered"):
        read(report, 5)


def test_a_guidellm_that_fails_is_named(tmp_path: Path) -> None:
    program = tmp_path / "guidellm"
    program.write_text("#!/bin/sh\necho no luck >&2\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(ConfigError, match=r"guidellm .* failed \(3\): no luck"):
        guidellm.measure(program, "http://x", 1, 1, 1)
