"""`tokenspeed generate` on the demo model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tokenspeed.kernels import cpu
from tokenspeed.observability.ceilings import Ceilings

PROMPT = "The three primary colors are"
SHORT = ("generate", "--temperature", "0", "--max-tokens", "6", "--max-model-len", "64")
Start = Callable[..., "subprocess.Popen[bytes]"]


def test_stream_and_json_give_the_same_text(cli: Cli) -> None:
    streamed = cli(*SHORT, PROMPT)
    whole = cli(*SHORT, "--json", PROMPT)
    assert (streamed.status, whole.status) == (0, 0)
    found = json.loads(whole.out)
    assert streamed.out == found["text"] + "\n"
    assert found["text"].startswith(" red, blue")
    assert found["prompt"] == PROMPT
    assert len(found["token_ids"]) == 6
    assert (found["finish_reason"], found["stop_reason"]) == ("length", None)
    assert found["logprobs"] is found["prompt_logprobs"] is None
    assert whole.err == ""


def test_the_closing_line(cli: Cli, ceilings: Ceilings) -> None:
    ran = cli(*SHORT, PROMPT)
    (line,) = ran.err.split("\n\n")[-1].strip().splitlines()
    parts = line.split(" | ")
    assert [part.split()[0] for part in parts[:2]] == ["prefill", "decode"]
    assert parts[1].endswith(" tok/s")
    assert parts[2].endswith(" GB per token")
    assert " GB/s, " in parts[3]
    assert parts[3].endswith(f"% of {ceilings.read_gbs:.1f}")
    assert parts[4].startswith("first token ")


@pytest.mark.parametrize("dtype, backend, gigabytes", [("auto", "cpu", 0.2468), ("float32", "ref", 1.0725)])
def test_timings(cli: Cli, ceilings: Ceilings, dtype: str, backend: str, gigabytes: float) -> None:
    """The C++ walk reads the file's own bytes, the reference its float32 matrices."""
    timings = json.loads(cli(*SHORT, "--json", "--dtype", dtype, "--lm-head", "full", PROMPT).out)["timings"]
    assert timings["backend"] == backend
    assert timings["ttft_ms"] > 0
    assert timings["tpot_ms"] > 0
    assert timings["fallback_ops"] == []
    assert (timings["prompt_tokens"], timings["completion_tokens"]) == (6, 6)
    assert timings["read_ceiling_gb_s"] == ceilings.read_gbs
    assert timings["bus_share"] == pytest.approx(timings["gb_s"] / ceilings.read_gbs)
    assert timings["gb_s"] == pytest.approx(timings["gb_per_token"] * timings["decode_tok_s"])
    assert timings["gb_per_token"] == pytest.approx(gigabytes, rel=0.01)
    assert timings["weight_share"] / timings["bus_share"] == pytest.approx(0.2468 / gigabytes, rel=0.01)


def test_a_screened_head_reads_less(cli: Cli) -> None:
    timings = json.loads(cli(*SHORT, "--json", PROMPT).out)["timings"]
    assert 0.166 < timings["gb_per_token"] < 0.19


def test_a_slow_path_shows(
    cli: Cli, ceilings: Ceilings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tokenspeed.kernels.cpu._walk", None)
    monkeypatch.delattr(cpu, "_walk", raising=False)
    timings = json.loads(cli(*SHORT, "--json", PROMPT).out)["timings"]
    assert timings["backend"] == "ref"
    assert timings["fallback_ops"] == ["all: the C++ extension is not built"]
    (record,) = caplog.records
    assert "the C++ extension is not built" in record.getMessage()


def test_prompt_from_file_and_stdin(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    runs = [
        cli(*SHORT, "--json", "--file", str(tmp_path / "prompt.txt")),
        cli(*SHORT, "--json", "-f", "-", stdin=PROMPT.encode() + b"\r\n"),
        cli(*SHORT, "--json", stdin=PROMPT.encode()),
        cli(*SHORT, "--json", stdin=PROMPT.encode() + b"\n\n"),
    ]
    assert [json.loads(ran.out)["prompt"] for ran in runs] == [PROMPT, PROMPT, PROMPT, PROMPT + "\n"]
    assert len({json.loads(ran.out)["text"] for ran in runs[:3]}) == 1


def test_logprobs_in_json(cli: Cli) -> None:
    found = json.loads(cli(*SHORT, "--json", "--logprobs", "2", "--prompt-logprobs", "0", PROMPT).out)
    assert [[entry["rank"] for entry in entries] for entries in found["logprobs"]] == [[1, 2]] * 6
    assert [entries[0]["token_id"] for entries in found["logprobs"]] == found["token_ids"]
    assert "".join(entries[0]["token"] for entries in found["logprobs"]) == found["text"]
    assert found["prompt_logprobs"][0] is None
    assert [entries[0]["token_id"] for entries in found["prompt_logprobs"][1:]] == found["prompt_token_ids"][1:]


def test_seed_and_stop_ids(cli: Cli) -> None:
    hot = ("generate", "--json", "--max-tokens", "8", "--max-model-len", "64", "--temperature", "1.5", PROMPT)
    first, second, other = (json.loads(cli(*hot, "--seed", seed).out)["token_ids"] for seed in ("7", "7", "8"))
    assert first == second != other
    stopped = json.loads(cli(*hot, "--seed", "7", "--stop-token-ids", "1", str(first[2])).out)
    assert stopped["token_ids"] == first[: first.index(first[2]) + 1]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", first[2])


def test_dummy_weights_of_a_directory(cli: Cli, demo_path: Path) -> None:
    ran = cli(*SHORT, "--load-format", "dummy", "--json", "--model", str(demo_path), PROMPT)
    assert ran.status == 0
    assert len(json.loads(ran.out)["token_ids"]) == 6


@pytest.mark.parametrize("extra", [("--json",), pytest.param((), marks=pytest.mark.slow)])
def test_a_reader_that_leaves(child: Start, extra: tuple[str, ...]) -> None:
    process = child(*SHORT, *extra, PROMPT)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait() == 1
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def test_ctrl_c(child: Start) -> None:
    process = child("generate", "--temperature", "0", "--ignore-eos", "--max-tokens", "4000", PROMPT)
    assert process.stdout is not None
    assert process.stdout.read(1) == b" "
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_a_child_writes_text_and_one_line(child: Start) -> None:
    out, err = child(*SHORT, PROMPT).communicate(timeout=60)
    assert out.decode().startswith(" red, blue")
    assert [line for line in err.decode().splitlines() if line][-1].startswith("prefill ")
