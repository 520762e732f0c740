"""Engines against each other: the same work by turns, what is refused, and what is recorded and shown of it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.bench.stub_server import Remembering, Stub, running
from tokenspeed.bench.compare import clocks as clock_module
from tokenspeed.bench.compare import rounds
from tokenspeed.bench.compare.engines import Engine
from tokenspeed.bench.compare.rounds import Comparison, Engines, Plan, compare, records
from tokenspeed.bench.compare.workloads import SHAPES, Shape, Step
from tokenspeed.bench.measured import Answer, _Choice
from tokenspeed.bench.record import read, surroundings
from tokenspeed.bench.workload import Lengths, Workload
from tokenspeed.cli.main import main, parser
from tokenspeed.contracts.errors import ConfigError

PLAN = Plan(rounds=3, warmup=1, timeout=30.0)
STEP = Step("1k1k", Shape(5, 3, (2,)), 2)


class Quick(Remembering):
    """Counts prompts as they are, and tells its version."""

    def __init__(self, first_s: float = 0.002, gap_s: float = 0.001) -> None:
        super().__init__(first_s, gap_s)

    async def _answer(self, writer: Any, body: Any) -> None:
        if body is None and self.paths[-1] == "/version":
            writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n{"version":"7.1"}')
            return
        await super()._answer(writer, body)


class Short(Quick):
    """Ends each answer a token early."""

    async def _events(self, send: Any, writer: Any, body: Any, mode: str) -> None:
        await super()._events(send, writer, body | {"max_tokens": body["max_tokens"] - 1}, mode)

    def _choice(self, body: Any) -> dict[str, Any]:
        return {"text": "x"}

    def _usage(self, body: Any) -> dict[str, Any]:
        return {"prompt_tokens": len(body["prompt"])}


class Merging(Quick):
    """Counts one token less in every prompt."""

    def _usage(self, body: Any) -> dict[str, Any]:
        return super()._usage(body) | {"prompt_tokens": len(body["prompt"]) - 1}


@pytest.fixture
def stubs() -> list[Quick]:
    return [Quick(), Quick(0.004, 0.002)]


@pytest.fixture
def engines(stubs: list[Quick]) -> Iterator[list[Engine]]:
    with running(stubs[0]) as one, running(stubs[1]) as other:
        yield [Engine.parse(f"ours={one}", {}), Engine.parse(f"theirs={other}", {})]


def compared(engines: list[Engine], step: Step, plan: Plan = PLAN) -> Comparison:
    with ExitStack() as stack:
        return compare(Engines(engines, plan, stack), step)


def prompts(stub: Stub) -> list[str]:
    return sorted(str(body.get("prompt") or body["messages"]) for body in stub.bodies)


def test_all_do_the_same_work_by_turns(
    engines: list[Engine], stubs: list[Quick], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []
    plain = rounds._measured

    def noted(engines: Engines, engine: Engine, *rest: Any, **named: Any) -> Any:
        turns.append(engine.name)
        return plain(engines, engine, *rest, **named)

    monkeypatch.setattr(rounds, "_measured", noted)
    found = compared(engines, STEP)
    assert turns[2:] == ["ours", "theirs", "theirs", "ours", "ours", "theirs"], "after a warm-up of each"
    assert prompts(stubs[0]) == prompts(stubs[1])
    assert len(set(prompts(stubs[0]))) == 1 + PLAN.rounds * 4, "a prompt came twice"
    assert all(body["ignore_eos"] and body["temperature"] == 0 for stub in stubs for body in stub.bodies)
    assert stubs[0].most_running == stubs[1].most_running == 2
    made = {record.id: record for record in records(found, engines, surroundings("x"))}
    mine, its = made["compare.1k1k.c2.ours.ttft.p50"], made["compare.1k1k.c2.theirs.ttft.p50"]
    assert mine.peer == "theirs (7.1)"
    assert mine.samples["b"] == its.samples["a"]
    assert mine.ratio is not None
    pairs = zip(mine.samples["a"], mine.samples["b"], strict=True)
    assert mine.ratio.median == pytest.approx(median(a / b for a, b in pairs))
    assert (mine.ratio.count, its.ratio, its.peer) == (3, None, None)
    assert mine.value == pytest.approx(median(mine.samples["a"]))
    assert len(mine.samples["ttft_ms"]) == PLAN.rounds * 4
    assert len(mine.samples["calibration_a"]) == len(mine.samples["calibration_b"]) == PLAN.rounds
    assert mine.settings["engine_version"] == "7.1"
    assert (mine.settings["input_len"], mine.settings["per_stream"], mine.settings["concurrency"]) == (5, 2, 2)
    tokens = made["compare.1k1k.c2.ours.total.tok_s"].value / made["compare.1k1k.c2.ours.output.tok_s"].value
    assert tokens == pytest.approx(8 / 3, rel=0.3)


@pytest.mark.parametrize(
    "other, complaint",
    [
        (Short, "answers of 3 tokens were asked for, and 2 came"),
        (Merging, "4 requests of 20 prompt and 12 output .*16 prompt"),
    ],
)
def test_other_work_has_no_ratio(other: type[Quick], complaint: str) -> None:
    with running(Quick()) as one, running(other()) as two:
        engines = [Engine.parse(f"a={one}", {}), Engine.parse(f"b={two}", {})]
        found = compared(engines, STEP, Plan(rounds=1, warmup=0))
    with pytest.raises(ConfigError, match=f"not the same work, so no ratio: .*{complaint}"):
        records(found, engines, surroundings("x"))


def test_requests_that_fail_have_no_ratio(engines: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload("completions", "http-500", Lengths(3, 3), Lengths(3, 3))
    monkeypatch.setattr(Step, "work", lambda *_: work)
    found = compared(engines, STEP, Plan(rounds=1, warmup=0))
    assert found.differences == [f"{name}: 4 requests failed: HTTP 500: no luck" for name in ("ours", "theirs")]


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_agents_read_the_same_whatever_was_answered(engines: list[Engine], stubs: list[Quick], api: Any) -> None:
    step = Step("agentic", Shape(40, 4, (2,), per_stream=1, turns=(2, 4), turn_len=6), 2, api)
    found = compared(engines, step, Plan(rounds=2, warmup=0))
    assert found.differences == []
    assert prompts(stubs[0]) == prompts(stubs[1])
    made = {record.id.split(".ours.")[-1]: record for record in records(found, engines, surroundings("x"))}
    assert {"first_turn.ttft.p50", "later_turns.ttft.p50", "later_turns.ttft.p99"} <= set(made)
    # Each turn sends the one before with 4 written and 6 new tokens, of which the stub knows all but those ten.
    assert made["first_turn.cached"].value < 3, "the head of a message at most"
    assert made["later_turns.cached"].value > 50
    longest = max((body for body in stubs[0].bodies), key=lambda body: len(str(body)))
    if api == "completions":
        assert {len(body["prompt"]) for body in stubs[0].bodies} <= {40, 50, 60, 70}
        assert len(longest["prompt"]) >= 50
    else:
        assert [each["role"] for each in longest["messages"]][:3] == ["user", "assistant", "user"]


def test_interference_compares_long_prompts_alone(engines: list[Engine]) -> None:
    step = Step("interference", Shape(4, 8, (2,), inject_len=50, injections=2, rate=50.0, settle_s=0.05), 2)
    found = compared(engines, step, Plan(rounds=1, warmup=0))
    assert found.differences == []
    assert {outcome.work.total() for runs in found.outcomes.values() for outcome in runs} == {2}
    made = {record.id.split(".c2.")[-1] for record in records(found, engines, surroundings("x"))}
    assert {"ours.before.itl.p50", "ours.injected.ttft.p99", "theirs.injected.ttft.p50"} <= made
    assert "ours.ttft.p50" not in made


def test_an_overload_is_twice_what_the_better_one_completes(engines: list[Engine], stubs: list[Quick]) -> None:
    found = compared(engines, Step("overload", Shape(5, 3, (2,), per_stream=3), 2), Plan(rounds=1, warmup=0))
    rate = found.step.settings()["requests_per_s"]
    # No request takes less than the better stub's own times, and two are under way.
    assert 0 < float(rate) < 1.1 * 2 * 2 / (0.002 + 2 * 0.001)
    assert prompts(stubs[0]) == prompts(stubs[1])
    assert len(stubs[0].bodies) == 12, "six for the capacity and six at the rate"
    assert "compare.overload.c2.ours.requests.per_s" in {
        record.id for record in records(found, engines, surroundings("x"))
    }


def test_translations_have_first_and_last_words(engines: list[Engine], stubs: list[Quick]) -> None:
    found = compared(engines, Step("translation", Shape(9, 3, (1,), per_stream=3), 1), Plan(rounds=2, warmup=0))
    figures = found.outcomes["ours"][0].figures
    # A stub's words begin with a blank: the first is whole when the second comes, which may be in the same read.
    assert figures["ttft.p50"][0] <= figures["first_word.p50"][0] <= figures["last_word.p50"][0]
    assert figures["last_word.p99"] == figures["e2e.p99"]
    asked = [body["prompt"] for body in stubs[0].bodies]
    assert len(set(asked)) == 6
    assert all("Translate into French: " in text for text in asked)


def test_a_cold_start_counts_from_the_process(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(
        "import asyncio, sys\nfrom tests.bench.test_compare import Quick\n"
        "async def main():\n"
        "    server = await asyncio.start_server(Quick().connected, '127.0.0.1', int(sys.argv[1]))\n"
        "    await server.serve_forever()\n"
        "asyncio.run(main())\n"
    )
    command = f"{sys.executable} {script} {{port}}"
    engines = [Engine.parse(f"{name}={command}", {}) for name in "ab"]
    found = compared(engines, Step("cold-start", Shape(4, 2, (1,), per_stream=1), 1), Plan(rounds=1, restart=True))
    for (run,) in found.outcomes.values():
        ready, first = run.figures["ready.s"][0], run.figures["first_token.s"][0]
        assert 0 < ready < first
    assert engines[0].shown == f"python3 {script.name} PORT"
    assert engines[1].version == "7.1"
    with pytest.raises(ConfigError, match="cold-start has to start engine url, which is a URL"):
        compared([Engine.parse("url=http://127.0.0.1:1", {})], Step("cold-start", SHAPES["cold-start"], 1))


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("tokenspeed m.gguf --threads 2", "-m tokenspeed.cli.main serve m.gguf --port 81 --threads 2"),
        ("vllm org/m", "vllm serve org/m --port 81"),
        ("sglang org/m --tp 2", "python3 -m sglang.launch_server --model-path org/m --port 81 --tp 2"),
        ("trtllm org/m", "trtllm-serve org/m --port 81"),
        ("x --listen 0:{port}", "x --listen 0:81"),
    ],
)
def test_command_lines(spec: str, expected: str) -> None:
    command = Engine.parse(f"name={spec}", {}).command(81)
    assert shlex.join(command[1:] if command[0] == sys.executable else command) == expected


@pytest.mark.parametrize("text", ["x", "x=", "X=http://a", "x='", "x=vllm", "x=nobody m", "x=http://a:b"])
def test_engines_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--engine|--base-url"):
        Engine.parse(text, {})


def test_the_command_records_and_writes_a_page(
    engines: list[Engine],
    stubs: list[Quick],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, page = tmp_path / "compare.json", tmp_path / "page.md"
    given = [
        "bench",
        "compare",
        "--workload",
        "1k1k",
        "--concurrency",
        "1",
        "2",
        "--input-len",
        "6",
        "--output-len",
        "3",
    ]
    given += [word for engine in engines for word in ("--engine", f"{engine.name}={engine.url}")]
    given += ["--rounds", "2", "--extra", 'theirs={"top_k": 1}', "--out", str(out), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", ["tokenspeed", *given, "--api-key", "secret"])
    assert main([*given, "--api-key", "secret"]) == 0
    made = read(out)
    assert [{body.get("top_k") for body in stub.bodies} for stub in stubs] == [{None}, {1}]
    assert {record.id.split(".")[2] for record in made} == {"c1", "c2"}
    assert made[0].command.startswith("tokenspeed bench compare --workload 1k1k --concurrency 1 2 --input-len 6")
    assert f"ours={engines[0].url}" in made[0].command
    assert "secret" not in out.read_text() + page.read_text()
    assert str(tmp_path) not in out.read_text() + page.read_text()
    text = page.read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "### theirs: version 7.1" in text
    assert "`version.version` 7.1" in text
    assert text.count("| ttft.p50 |") == 2
    assert "Each engine answered 4 requests a round, by its own count of 24 prompt and 12 output tokens" in text


def test_the_command_fails_where_the_work_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "compare.json"
    with running(Quick()) as one, running(Merging()) as two:
        given = ["--engine", f"a={one}", "--engine", f"b={two}", "--input-len", "5", "--output-len", "2"]
        given += ["--concurrency", "1", "--rounds", "1", "--warmup", "0", "--out", str(out)]
        assert main(["bench", "compare", "--workload", "8k1k", *given]) == 1
    shown = capsys.readouterr()
    assert "**Not the same work, so no ratio:**" in shown.out
    assert "not the same work in compare.8k1k.c1" in shown.err
    assert not out.exists()


@pytest.mark.parametrize(
    "given, complaint",
    [
        (["--engine", "a=http://x"], "--engine twice or more"),
        (["--engine", "a=http://x", "--engine", "a=http://y"], "with different names"),
        (["--engine", "a=http://x", "--engine", "b=http://y", "--extra", "c={}"], "--extra c: no engine"),
        (["--engine", "a=http://x", "--engine", "b=http://y", "--extra", "a=1"], "--extra a: must be NAME"),
        (["--engine", "a=http://x", "--engine", "b=http://y", "--input-len", "0"], "must be at least 1"),
        (["--engine", "a=http://x", "--engine", "b=http://y", "--rounds", "0"], "--rounds must be at least 1"),
        (["--engine", "a=http://x", "--engine", "b=http://y", "--turns", "3:2"], "--turns must be"),
        (["--engine", "a=http://x", "--engine", "b=http://y", "--vocab-size", "1"], "--vocab-size must be"),
    ],
)
def test_wrong_usage_is_named(given: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "compare", "--workload", "agentic", *given]) == 1
    assert complaint in capsys.readouterr().err


def test_the_command_line_knows_every_workload() -> None:
    from tokenspeed.cli.bench_compare import WORKLOADS

    assert set(WORKLOADS) == set(SHAPES)
    parsed = parser().parse_args(["bench", "compare", "--engine", "a=http://x", "--workload", "agentic"])
    assert parsed.rounds == PLAN.__class__().rounds
    assert json.dumps(SHAPES["agentic"].turns) == "[10, 15]"


@pytest.mark.parametrize(
    "pieces, expected",
    [(["un", "til", " now"], 3), ([" a", " b"], 2), (["a b"], 1), (["a", "b"], 2), ([" ", "\n"], None), ([], None)],
)
def test_when_a_first_word_is_whole(pieces: list[str], expected: float | None) -> None:
    answer = Answer()
    for now, piece in enumerate(pieces, start=1):
        answer.add(_Choice(text=piece), float(now))
    assert answer.first_word() == expected


def test_clocks_are_those_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'Some GPU, 580.1, 1980, 3201, 700.00'\necho 'Some GPU, 580.1, 345, 3201, 700.00'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(clock_module, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("cpu MHz\t\t: 2000.0\nx: 1\ncpu MHz\t\t: 3000.0\n")
    monkeypatch.setattr(clock_module, "GOVERNOR", tmp_path / "none")
    found = clock_module.clocks()
    assert found["cpu.mhz"] == 2500
    assert "cpu.governor" not in found
    assert (found["gpu0.clocks.sm"], found["gpu1.clocks.sm"]) == ("1980 MHz", "345 MHz")
    named = clock_module.with_gpus(surroundings("x")["machine"])
    assert (named.gpu, named.gpus) == ("Some GPU", 2)
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert set(clock_module.clocks()) == {"cpu.mhz"}
