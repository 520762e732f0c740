from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from tokenspeed.bench import llama_cpp
from tokenspeed.bench.launch import Done
from tokenspeed.bench.llama_cpp import LlamaCpp, read_completion
from tokenspeed.contracts.errors import ConfigError

REPORT = """
common_perf_print:    sampling time = {sampling:10.2f} ms
common_perf_print:    samplers time =     999.99 ms /   146 tokens
common_perf_print:        load time = {load:10.2f} ms
common_perf_print: prompt eval time =     888.88 ms /    17 tokens ( 5.00 ms per token, 200.00 tokens per second)
common_perf_print:        eval time = {eval:10.2f} ms / {runs:5d} runs   ( 9.00 ms per token, 111.11 tokens per second)
common_perf_print:       total time =   99999.99 ms /   145 tokens
"""


@pytest.mark.parametrize("seed, prefix", [(1, ""), (2, "0.00.123.456 I "), (3, "")])
def test_a_token_costs_one_evaluation_and_one_sample(seed, prefix):
    rng = random.Random(seed)
    runs = rng.randint(1, 300)
    sampling, load, evaluation = (round(rng.uniform(1, 9000), 2) for _ in range(3))
    report = REPORT.format(sampling=sampling, load=load, eval=evaluation, runs=runs).replace(
        "common", prefix + "common"
    )
    found = read_completion(Done("text", report, 321.0))
    assert 1e3 / found.tok_s == pytest.approx(evaluation / runs + sampling / (runs + 1))
    assert (found.load_s, found.peak_mb) == (pytest.approx(load / 1e3), 321.0)


@pytest.mark.parametrize("name", ["sampling time", "load time", "        eval time"])
def test_a_report_that_lacks_a_line_is_refused(name):
    report = REPORT.format(sampling=1, load=1, eval=1, runs=1).replace(name, "other")
    with pytest.raises(ConfigError, match=name.strip()):
        read_completion(Done("", report, 1.0))


@pytest.fixture
def peer(tmp_path):
    """Programs that report their arguments and then what such a program would say."""
    answers = {
        "llama-bench": json.dumps([{"avg_ts": 12.5}]),
        "llama-batched-bench": 'main: note\n{"speed_tg": 1.0}\n{"speed_tg": 77.5}',
        "llama-completion": REPORT.format(sampling=13, load=500, eval=108, runs=12),
    }
    for name, answer in answers.items():
        code = (
            f"import sys\nprint(*sys.argv[1:], sep='|', file=open({str(tmp_path / 'seen')!r}, 'w'))\nprint({answer!r})"
        )
        (tmp_path / name).write_text(f"#!{sys.executable} -IS\n{code}\n")
        (tmp_path / name).chmod(0o755)
    return LlamaCpp(tmp_path, tmp_path / "model.gguf")


def seen(peer: LlamaCpp) -> list[str]:
    program, *arguments = (peer.programs / "seen").read_text().strip().split("|")
    assert [program, arguments[0]] == ["-m", str(peer.model)]
    return arguments[1:]


def test_each_figure_asks_for_its_threads_and_lengths(peer):
    assert peer.decode(3, 32, 2048) == 12.5
    assert seen(peer) == ["-t", "3", "-r", "1", "-o", "json", "-p", "0", "-n", "32", "-d", "2048"]
    assert peer.prefill(2, 511) == 12.5
    assert seen(peer)[-4:] == ["-p", "511", "-n", "0"]
    assert peer.batch(1, 7, 33) == 77.5
    assert " ".join(seen(peer)).startswith("-t 1 -c 4096 -npp 16 -ntg 33 -npl 7")
    assert 1e3 / peer.complete(2, 13, llama_cpp.TOP).tok_s == pytest.approx(10)
    what = " ".join(seen(peer))
    assert what.startswith("-t 2 -c 4096 -n 13 -p ")
    assert what.endswith("--samplers top_k;top_p;temperature --temp 0.8 --top-k 40 --top-p 0.95")
    assert " --ignore-eos " in what


def test_what_is_built_is_not_built_again_and_only_what_is_missing_is(monkeypatch, tmp_path):
    commands: list[list[str]] = []

    def run(command):
        commands.append([str(part) for part in command])
        if "--build" in commands[-1]:
            made = commands[-1][commands[-1].index("--target") + 1 :]
            built = Path(commands[-1][2]) / "bin"
            built.mkdir(parents=True)
            for name in made:
                (built / name).write_text("new")
        return Done("", "", 0.0)

    monkeypatch.setattr(llama_cpp, "user_cache", lambda: tmp_path)
    monkeypatch.setattr(llama_cpp, "run_program", run)
    monkeypatch.setattr(llama_cpp, "_fetch", lambda version, folder: folder / "source")
    programs = tmp_path / "peers" / "llama-cpp-9.9" / "bin"
    programs.mkdir(parents=True)
    (programs / "llama-bench").write_text("old")
    assert llama_cpp.build("9.9") == programs
    assert {path.name: path.read_text() for path in programs.iterdir()} == {
        "llama-bench": "old",
        "llama-batched-bench": "new",
        "llama-completion": "new",
    }
    assert {"-DGGML_NATIVE=ON", "-DLLAMA_BUILD_SERVER=OFF"} <= set(commands[0])
    done = len(commands)
    assert llama_cpp.build("9.9") == programs
    assert len(commands) == done
    assert llama_cpp.build("9.9", targets=["llama-bench", llama_cpp.SERVER]) == programs
    assert "-DLLAMA_BUILD_SERVER=ON" in commands[done]
    assert commands[done + 1][-1] == "llama-server"
    assert (programs / "llama-server").read_text() == "new"
