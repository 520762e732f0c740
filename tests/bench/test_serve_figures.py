"""From measured requests to figures, records and the command's output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bench.stub_server import Stub, running
from tokenspeed.bench.record import read, surroundings
from tokenspeed.bench.serve import Measured, Run
from tokenspeed.bench.serve_report import Limits, records, report, text
from tokenspeed.bench.workload import Lengths, Workload, read_dataset
from tokenspeed.cli.main import main
from tokenspeed.contracts.errors import ConfigError


def measured(ttft: float, gap: float, tokens: int, error: str | None = None) -> Measured:
    first = 10.0 + ttft
    return Measured(
        sent=10.0,
        first=first,
        last=first + gap * (tokens - 1),
        gaps=[gap] * (tokens - 1),
        prompt_tokens=7,
        cached_tokens=2,
        output_tokens=tokens,
        error=error,
    )


REQUESTS = [measured(0.1 * number, 0.01 * number, 5) for number in range(1, 6)]


def test_figures() -> None:
    found = report(Run("2 at once", [*REQUESTS, measured(9, 9, 9, "it broke")], 4.0, 1.0))
    assert (found.requests, found.completed, found.errors) == (6, 5, {"it broke": 1})
    assert (found.input_tokens, found.cached_tokens, found.output_tokens) == (35, 10, 25)
    assert (found.requests_per_s, found.output_tok_s, found.total_tok_s) == (1.25, 6.25, 15.0)
    assert found.ttft_ms is not None
    assert found.tpot_ms is not None
    assert found.itl_ms is not None
    assert found.e2e_ms is not None
    assert found.ttft_ms.mean == pytest.approx(300)
    assert found.ttft_ms.p50 == pytest.approx(300)
    assert found.ttft_ms.p90 == pytest.approx(460)
    assert found.ttft_ms.p99 == pytest.approx(496)
    assert found.ttft_ms.max == pytest.approx(500)
    assert found.tpot_ms.p50 == pytest.approx(30)
    gaps = np.repeat([10, 20, 30, 40, 50], 4)
    assert found.itl_ms.p90 == pytest.approx(np.percentile(gaps, 90))
    assert found.e2e_ms.p50 == pytest.approx(300 + 4 * 30)
    assert found.generator.cpu_share == 0.25


@pytest.mark.parametrize(
    "limits, good", [("ttft:250", 2), ("ttft:250,tpot:15", 1), ("e2e:10000", 5), ("tpot:50.1", 5), ("ttft:1", 0)]
)
def test_goodput(limits: str, good: int) -> None:
    found = report(Run("1 req/s", [*REQUESTS, measured(0.01, 0.001, 5, "late")], 2.0, 0.1), Limits.parse(limits))
    assert found.goodput is not None
    assert (found.goodput.requests_per_s, found.goodput.share) == (good / 2.0, good / 6)


@pytest.mark.parametrize("limits", ["", "ttft", "ttft:x", "itl:5", "ttft:5,ttft:6", "ttft:-5"])
def test_limits_that_are_none(limits: str) -> None:
    with pytest.raises(ConfigError, match="--goodput"):
        Limits.parse(limits)


def test_text_hides_nothing() -> None:
    shown = text(report(Run("2 at once", [*REQUESTS, measured(9, 9, 9, "it broke")], 4.0, 3.9)))
    assert "5 of 6 requests completed" in shown
    assert "failed 1 times: it broke" in shown
    assert "warning: the generator was busy" in shown
    for name in ("TTFT", "TPOT", "ITL", "E2E", "2 at once"):
        assert name in shown


def test_records() -> None:
    run = Run("2 at once", REQUESTS, 4.0, 1.0)
    found = report(run, Limits.parse("ttft:250"))
    made = {record.id: record for record in records(found, run, "serve.tiny.c2", surroundings("make x"))}
    assert (made["serve.tiny.c2.output.tok_s"].value, made["serve.tiny.c2.output.tok_s"].unit) == (6.25, "tok/s")
    assert made["serve.tiny.c2.ttft.p50"].value == pytest.approx(300)
    assert made["serve.tiny.c2.ttft.p50"].samples["ttft_ms"] == pytest.approx([100, 200, 300, 400, 500])
    gaps = made["serve.tiny.c2.itl.p50"].samples["itl_ms"]
    assert found.itl_ms is not None
    assert (len(gaps), gaps[50], gaps[99], gaps[100]) == pytest.approx(
        (101, found.itl_ms.p50, found.itl_ms.p99, found.itl_ms.max)
    )
    assert made["serve.tiny.c2.goodput.per_s"].value == 0.5
    failed = Run("2 at once", [*REQUESTS, measured(9, 9, 9, "it broke")], 4.0, 1.0)
    with pytest.raises(ConfigError, match="1 of 6 requests failed: nothing is recorded"):
        records(report(failed), failed, "serve.tiny", surroundings("make x"))


def test_the_same_seed_makes_the_same_work() -> None:
    def bodies(seed: int, **changes: Any) -> list[Any]:
        work = Workload("completions", "m", Lengths(3, 9), Lengths(2, 40), seed, vocab_size=500, **changes)
        return [json.loads(body) for body in work.bodies(50)]

    first, other = bodies(1), bodies(2)
    assert first == bodies(1)
    assert first != other
    assert {len(body["prompt"]) for body in first} == set(range(3, 10))
    assert all(100 <= token < 500 for body in first for token in body["prompt"])
    assert len({body["max_tokens"] for body in first}) > 20
    assert bodies(1, extra={"top_k": 3, "stream": False})[0]["top_k"] == 3


def test_tiny_vocabularies_and_chats() -> None:
    work = Workload("completions", "m", Lengths(50, 50), Lengths(1, 1), vocab_size=97)
    assert all(48 <= token < 97 for body in work.bodies(5) for token in json.loads(body)["prompt"])
    chat = json.loads(next(Workload("chat", "m", Lengths(6, 6), Lengths(1, 1)).bodies(1)))
    assert len(chat["messages"][0]["content"].split()) == 6


def test_datasets(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    path.write_text('{"prompt": "a", "max_tokens": 3}\n\n{"prompt": [1, 2]}\n')
    lines = read_dataset(str(path), "completions")
    made = [json.loads(body) for body in Workload("completions", "m", Lengths(1, 1), Lengths(9, 9)).bodies(3, lines)]
    assert [(body["prompt"], body["max_tokens"]) for body in made] == [("a", 3), ([1, 2], 9), ("a", 3)]


@pytest.mark.parametrize(
    "line, api, complaint",
    [
        ("{", "chat", "line 1"),
        ("{}", "chat", "either prompt or messages"),
        ('{"prompt": "a", "messages": []}', "chat", "either prompt or messages"),
        ('{"messages": []}', "completions", "--api chat"),
        ('{"prompt": [1]}', "chat", "--api completions"),
        ('{"promt": "a"}', "chat", "promt"),
        ("", "chat", "no lines"),
    ],
)
def test_datasets_that_cannot_be_used(tmp_path: Path, line: str, api: Any, complaint: str) -> None:
    path = tmp_path / "work.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=complaint):
        read_dataset(str(path), api)


Ran = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Ran:
    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["bench", "serve", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_the_command(bench: Ran, tmp_path: Path) -> None:
    stub = Stub(0.001, 0.001)
    common = ["--num-requests", "7", "--input-len", "4:6", "--output-len", "3", "--concurrency", "2"]
    record = tmp_path / "figures.json"
    with running(stub) as url:
        status, out, err = bench("--base-url", url, *common, "--warmup", "2", "--ignore-eos", "--record", str(record))
        assert (status, err) == (0, "")
        assert "7 of 7 requests completed" in out
        assert len(stub.bodies) == 9
        assert all(body["model"] == "plain" and body["ignore_eos"] for body in stub.bodies)
        assert len({tuple(body["prompt"]) for body in stub.bodies}) == 9
        status, out, err = bench("--base-url", url, *common, "--json", "-", "--goodput", "ttft:60000", "--api", "chat")
        assert status == 0
        assert json.loads(out)["goodput"]["share"] == 1.0
    assert {r.id for r in read(record)} >= {"serve.bench.ttft.p50", "serve.bench.itl.p99", "serve.bench.output.tok_s"}


@pytest.mark.parametrize("given", [["--api-key", "sk-secret"], ["--api-key=sk-secret"]])
def test_a_record_does_not_hold_the_key(
    bench: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    record = tmp_path / "figures.json"
    with running(Stub(0.001, 0.001)) as url:
        asked = ["--base-url", url, *given, "--concurrency", "1", "--num-requests", "3", "--record", str(record)]
        monkeypatch.setattr(sys, "argv", ["tokenspeed", "bench", "serve", *asked])
        assert bench(*asked)[0] == 0
    assert "secret" not in record.read_text()
    (command,) = {made.command for made in read(record)}
    assert command.startswith(f"tokenspeed bench serve --base-url {url} --concurrency 1 --num-requests 3 --record ")


def test_the_command_fails_when_requests_do(bench: Ran, tmp_path: Path) -> None:
    record = tmp_path / "figures.json"
    with running(Stub(0.001, 0.001)) as url:
        target = ["--base-url", url, "--model", "no-usage", "--concurrency", "1", "--num-requests", "2"]
        status, out, err = bench(*target, "--warmup", "0", "--record", str(record))
        assert status == 1
        assert "failed 2 times: no usage" in out
        assert "nothing is recorded" in err
        assert not record.exists()
        status, out, err = bench(*target, "--warmup", "0")
        assert (status, "2 of 2 requests failed" in err) == (1, True)
        status, out, err = bench(*target)
        assert (status, out) == (1, "")
        assert "the warm-up failed: no usage" in err


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ((), "give one of --concurrency and --rate"),
        (("--rate", "1", "--input-len", "5:2"), "--input-len must be a length"),
        (("--rate", "1", "--extra-body", "[]"), "--extra-body must be a JSON object"),
        (("--rate", "1", "--num-requests", "0"), "--num-requests must be at least 1"),
        (("--rate", "1", "--base-url", "x"), "--base-url must look like"),
        (("--rate", "1", "--dataset", "/no/such"), "--dataset /no/such: No such file"),
    ],
)
def test_usage(bench: Ran, arguments: tuple[str, ...], complaint: str) -> None:
    status, out, err = bench("--model", "m", *arguments)
    assert (status, out) == (1, "")
    assert complaint in err
