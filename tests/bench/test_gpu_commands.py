"""The measurements of whole models, run on the CPU with a tiny one, and what they record."""

from __future__ import annotations

import itertools
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.triton import interpreter  # noqa: F401
from tests.seeds import SEED
from tests.tiny_llama import write_tiny
from tokenspeed.bench import record
from tokenspeed.bench.__main__ import command_of, main
from tokenspeed.bench.gpu import latency, mixed, startup, suite, targets
from tokenspeed.bench.gpu.ceilings import better
from tokenspeed.bench.gpu.publish import Publisher, line
from tokenspeed.bench.gpu.setup import Setup
from tokenspeed.bench.stats import median_interval
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.contracts.request import SequenceUpdate
from tokenspeed.observability.ceilings import Ceilings

CARD = Ceilings("card", 4600.0, 770.0, 1410.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    print(f"seed {SEED}")
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    return write_tiny(folder, SEED, max_position_embeddings=2048)


@pytest.fixture
def run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(latency, "ceilings_of", lambda device: CARD)
    monkeypatch.setattr("tokenspeed.bench.gpu.throughput.ceilings_of", lambda device: CARD)
    out = tmp_path / "cpu.json"

    def run(command: str, *given: str) -> dict[str, record.Record]:
        assert main([command, "--model", str(tiny), "--device", "cpu", "--out", str(out), *given]) == 0
        return {each.id: each for each in record.read(out)}

    return run


def test_latency(run: Any) -> None:
    found = run("latency", "--batch", "1", "3", "--context", "21", "--tokens", "5", "--sampled")
    stem = "cpu.tiny.bf16"
    assert sorted(found) == sorted(
        [f"{stem}.ttft21", *(f"{stem}.decode.b{b}.ctx21{end}" for b in (1, 3) for end in ("", ".sampled"))]
    )
    assert all(each.floor is not None and each.floor > 0 for each in found.values())
    plain, drawn = found[f"{stem}.decode.b3.ctx21"], found[f"{stem}.decode.b3.ctx21.sampled"]
    assert drawn.ratio is not None
    assert drawn.ratio.median == pytest.approx(drawn.value / plain.value)
    assert plain.floor is not None
    assert found[f"{stem}.decode.b1.ctx21"].floor < plain.floor
    given = "latency --model tiny --device cpu --batch 1 3 --context 21 --tokens 5 --sampled"
    assert {each.command for each in found.values()} == {f"python -m tokenspeed.bench {given}"}


def test_throughput(run: Any) -> None:
    found = run("throughput", "--requests", "5", "--input", "7", "--output", "4", "--at-once", "2")
    ((id, only),) = found.items()
    assert id == "cpu.tiny.bf16.throughput.n5.in7.out4"
    seconds, total = only.samples["seconds"][0], only.samples["total_tok_s"][0]
    assert (only.value * seconds, total * seconds) == (pytest.approx(20), pytest.approx(55))
    assert only.share == pytest.approx(only.value / only.floor)


def test_mixed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed, "STREAM_WARM_TOKENS", 2)
    found = run("mixed", "--streams", "2", "--prompt", "60", "--cap", "14", "--other-caps", "60")
    pace, share, rate = (found[f"cpu.tiny.bf16.mixed.{name}"] for name in ("itl_p99", "prefill", "prefill_rate"))
    # Each step feeds 12 tokens of the prompt beside two streams: 5 steps a run, beside one that is under way before.
    assert 3 * 2 * 4 <= pace.samples["count"][0] <= 3 * 2 * 7
    assert pace.value <= pace.samples["p50_p90_max_ms"][2]
    assert share.value == pytest.approx(
        100 * sorted(share.samples["alone_s"])[1] / sorted(share.samples["beside_s"])[1]
    )
    assert rate.peer in ("alone, 14 tokens per step", "alone, 60 tokens per step")
    assert rate.peer_value == max(rate.samples["alone_14"][0], rate.samples["alone_60"][0])


def test_intervals_are_those_that_end_while_the_prompt_is_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals, clock = mixed.Arrivals(), itertools.count(10)
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    for names in ("ab", "a", "ab", "b", "ab"):
        arrivals.take([SequenceUpdate(request_id=name, new_token_ids=[1]) for name in names])
    # a at 10, 11, 12, 14; b at 10, 12, 13, 14
    assert sorted(arrivals.intervals_ms(11.5, 13.0)) == [1000, 1000, 2000]
    assert arrivals.count("a") == 4
    assert arrivals.count("c") == 0


@pytest.mark.slow
def test_startup(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[str] = []
    plain = startup.environment

    def environment(caches: Path) -> dict[str, str]:
        folders.append(str(caches))
        return plain(caches)

    monkeypatch.setattr(startup, "environment", environment)
    setup = Setup("gemma-3-270m", None, "cpu")
    with pytest.raises(ConfigError, match=r"(?s)to start gemma-3-270m\.int9 failed.*int9"):
        startup.start(Setup("gemma-3-270m", "int9", "cpu"), Path("/nowhere"))
    assert startup.environment(Path("/some"))["TRITON_CACHE_DIR"] == "/some/triton"
    assert setup.id("start", "warm") == "cpu.gemma-3-270m.bf16.start.warm"
    folders.clear()
    found = run("startup", "--warm", "1")
    warm, cold = (found[f"cpu.tiny.bf16.start.{kind}"] for kind in ("warm", "cold"))
    assert len(set(folders)) == 1, "a warm start finds what the cold one left"
    for each in (warm, cold):
        names = ["imports", "weights", "measuring", "engine", "first_token", "second_token"]
        assert set(each.samples) == set(names)
        phases = [0, *(each.samples[name][0] for name in names)]
        assert all(a < b for a, b in pairwise(phases))
        assert each.value == each.samples["first_token"][0]


@pytest.mark.parametrize(
    "id, bound",
    [
        ("h200.llama-3.1-8b.bf16.decode.b32", ("value", 5.2)),
        ("h200.llama-3.1-8b.fp8.decode.b128.sampled", ("ratio", 1.05)),
        ("h200.llama-3.2-1b.bf16.decode.b1.ctx8192", ("share", 0.75)),
        ("h200.llama-3.1-8b.int4.decode.b1", ("value", 1.45)),
        ("h200.llama-3.1-8b.fp8.decode.b1.ctx8192", ("share", 0.82)),
        ("h200.llama-3.1-8b.fp8.decode.b1.ctx128", ("share", 0.75)),
        ("h200.llama-3.1-8b.fp8.ttft1024", ("value", 14.0)),
        ("h200.qwen3-30b-a3b.fp8.decode.b8", ("value", 4.4)),
        ("h200.llama-3.1-8b.bf16.start.cold", ("value", 40.0)),
        ("h200.llama-3.1-8b.bf16.idle.b1.p99", ("value", 20.0)),
        ("h200.llama-3.1-8b.bf16.mixed.prefill", ("value", 80.0)),
    ],
)
def test_targets(id: str, bound: tuple[str, float]) -> None:
    found = targets.target_of(id)
    assert found is not None
    assert (found.of, found.at_most or found.at_least) == bound
    assert targets.target_of(id.replace("h200", "a100")) is None


def test_the_bounds_that_depend_on_another_figure() -> None:
    assert targets.host_target(4.0).at_most == pytest.approx(130)
    assert targets.reference_target(0.01).at_most == pytest.approx(0.012)
    assert targets.reference_target(1.0).at_most == 0.05


def test_a_published_figure_is_written_with_its_target(tmp_path: Path) -> None:
    out = tmp_path / "h200.json"
    publisher = Publisher("python -m tokenspeed.bench x", out)
    made = publisher.add("h200.llama-3.1-8b.bf16.decode.b1", 4.4, "ms", floor=3.3)
    assert record.read(out) == [made] == publisher.records
    assert made.share == pytest.approx(0.75)
    assert line(made) == "h200.llama-3.1-8b.bf16.decode.b1: 4.4 ms, floor 3.3 (75%), value <= 3.75: MISSED"
    ratio = median_interval([1.02])
    made = publisher.add(
        "h200.llama-3.1-8b.bf16.decode.b1.sampled", 4.5, "ms", peer="greedy", peer_value=4.4, ratio=ratio
    )
    assert line(made).endswith("1.020 of greedy 4.4, ratio <= 1.05: met")
    assert len(record.read(out)) == 2


def test_commands_hold_no_folder_of_this_machine() -> None:
    given = ["latency", "--model", "/some/where/tiny", "--out", "/tmp/a.json", "--out=/tmp/b", "--batch", "1", "8"]
    assert command_of(given) == "python -m tokenspeed.bench latency --model tiny --batch 1 8"


def test_floors_are_made_of_the_better_of_measured_and_known() -> None:
    assert better(Ceilings("card", 4700.0, 700.0), CARD) == Ceilings("card", 4700.0, 770.0, 1410.0)


def test_a_group_that_fails_does_not_stop_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def good(publisher: Publisher) -> None:
        publisher.add("h200.llama-3.2-1b.bf16.decode.b1", 0.75, "ms")

    def bad(publisher: Publisher) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(suite, "GROUPS", {"bad": bad, "good": good})
    monkeypatch.setattr(suite, "_reference", lambda publisher, demo: None)
    monkeypatch.setattr(suite, "free_memory", lambda device: None)
    assert suite.run_suite(tmp_path / "h200.json", ["bad", "good"]) == ["bad"]
    assert [each["id"] for each in json.loads((tmp_path / "h200.json").read_text())] == [
        "h200.llama-3.2-1b.bf16.decode.b1"
    ]
    assert "1 met, 0 missed" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"no such group: 9b \(known: bad, good, reference, 30b-a3b, "):
        suite.run_suite(tmp_path / "h200.json", ["9b"])
    assert suite.run_suite(tmp_path / "h200.json") == ["bad"], "groups of large models are run by name"


@pytest.mark.parametrize("given", [["latency", "--tokens", "1"], ["mixed", "--cap", "0"], ["kernels", "none"]])
def test_wrong_flags_are_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(given)
    assert "error" in capsys.readouterr().err
