from __future__ import annotations

import itertools
import json
import random
from contextlib import contextmanager

import pytest

from tokenspeed.bench import cpu_process
from tokenspeed.bench.launch import Done
from tokenspeed.bench.llama_cpp import Completion
from tokenspeed.bench.stats import GATE_RUNS
from tokenspeed.contracts.errors import ConfigError


class FakePeer:
    def __init__(self, load_s: float = 1.0, peak_mb: float = 300.0) -> None:
        self.completion = Completion(50.0, load_s, peak_mb)
        self.asked: list[tuple[int, int]] = []

    def complete(self, threads, tokens):
        self.asked.append((threads, tokens))
        return self.completion


def fake_children(monkeypatch, **figures: list[float]) -> list[list[str]]:
    commands: list[list[str]] = []
    calls = itertools.count()

    def run(command):
        commands.append(list(command))
        call = next(calls)
        now = {name: values[call % len(values)] for name, values in figures.items()}
        peak = now.pop("peak_mb", 1.0)
        return Done(json.dumps(now), "", peak)

    monkeypatch.setattr(cpu_process, "run_program", run)
    return commands


@pytest.mark.parametrize("seed, load_s, met", [(1, 1.4, True), (2, 1.6, False)])
def test_load_is_the_constructors_time_over_llama_cpps_with_imports_beside_it(monkeypatch, seed, load_s, met):
    rng = random.Random(seed)
    imports = [rng.uniform(1, 3) for _ in range(6)]  # the first is the warm-up's
    commands = fake_children(monkeypatch, load_s=[load_s], imports_s=imports, first_token_s=[0.05])
    peer = FakePeer(load_s=1.0)
    record = cpu_process.measure_load(peer, 5)
    assert (record.id, record.value, record.peer_value, record.met()) == ("cpu.load.t2", load_s, 1.0, met)
    assert record.samples["with_imports_s"] == [load_s + each for each in imports[1:]]
    assert record.samples["first_token_s"] == [0.05] * 5
    assert commands[0][1:] == ["-m", "tokenspeed.bench.cpu_child", "2", "1"]
    assert set(peer.asked) == {(2, 2)}


@pytest.mark.parametrize("ours, met", [(650.0, True), (650.5, False), (200.0, True)])
def test_rss_is_how_far_our_peak_lies_above_theirs(monkeypatch, ours, met):
    commands = fake_children(monkeypatch, peak_mb=[ours])
    peer = FakePeer(peak_mb=300.0)
    record = cpu_process.measure_rss(peer, GATE_RUNS)
    assert (record.value, record.unit, record.met()) == (ours - 300, "MB", met)
    assert (record.samples["a"], record.samples["b"]) == ([ours] * GATE_RUNS, [300.0] * GATE_RUNS)
    assert commands[0][-2:] == ["2", "128"]
    assert set(peer.asked) == {(2, 128)}


@pytest.mark.parametrize("runs, met", [(GATE_RUNS, True), (GATE_RUNS - 1, None)])
def test_the_first_token_counts_by_the_lower_quartile_of_enough_runs(monkeypatch, runs, met):
    seconds = iter([99.0] + [3.9] * (runs // 2) + [9.0] * runs)
    monkeypatch.setattr(cpu_process, "first_text_s", lambda: next(seconds))
    record = cpu_process.measure_first_token(FakePeer(), runs)
    assert (record.value, record.met()) == (3.9, met)
    assert record.samples["figures"] == [3.9] * (runs // 2) + [9.0] * (runs - runs // 2)
    assert len(record.samples["calibration_s"]) == runs


@pytest.mark.parametrize("rate, met", [(56.0, True), (55.9, False)])
def test_busy_compares_two_disturbed_threads_with_one_in_quiet(monkeypatch, rate, met):
    made, busy = [], []

    class FakeLLM:
        def __init__(self, **settings):
            self.threads, self.open = settings["threads"], True
            made.append(self)

        def close(self):
            self.open = False

    @contextmanager
    def busy_core():
        busy.append(1)
        yield 0
        busy.pop()

    def decode_rate(llm, tokens):
        assert bool(busy) == (llm.threads == 2)
        return rate if busy else 70.0

    monkeypatch.setattr(cpu_process, "LLM", FakeLLM)
    monkeypatch.setattr(cpu_process, "busy_core", busy_core)
    monkeypatch.setattr(cpu_process, "decode_rate", decode_rate)
    record = cpu_process.measure_busy(FakePeer(), 3)
    assert (record.unit, record.value, record.met()) == ("x", pytest.approx(rate / 70), met)
    assert not any(llm.open for llm in made)


@pytest.mark.parametrize(
    "program, message",
    [("import sys; sys.exit('out of luck')", "out of luck"), ("print()", "no text"), ("", "no text")],
)
def test_a_start_without_text_is_refused(monkeypatch, program, message):
    monkeypatch.setattr(cpu_process, "FIRST_TOKEN", ("-c", program))
    with pytest.raises(ConfigError, match=message):
        cpu_process.first_text_s()


def test_the_clock_stops_at_the_first_text(monkeypatch):
    program = "import time; print('a', end='', flush=True); time.sleep(1.5)"
    monkeypatch.setattr(cpu_process, "FIRST_TOKEN", ("-c", program))
    monkeypatch.setattr(cpu_process.time, "perf_counter", clock := Clock())
    assert cpu_process.first_text_s() == 1
    assert clock.calls == 2


class Clock:
    """Counts one second per call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return float(self.calls)


@pytest.mark.slow
def test_a_fresh_process_loads_and_decodes_and_says_so():
    done = cpu_process._child(5)
    found = json.loads(done.stdout)
    assert set(found) == {"imports_s", "load_s", "first_token_s"}
    assert all(seconds > 0 for seconds in found.values())
    assert 250 < done.peak_mb < 4000


@pytest.mark.slow
def test_generate_gives_its_first_text():
    assert cpu_process.first_text_s() > 0
