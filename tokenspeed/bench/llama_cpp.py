"""llama.cpp as a peer: built once from its source on PyPI, for this processor, and run through its own programs."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenspeed.bench.launch import Done, run_program
from tokenspeed.config.paths import user_cache
from tokenspeed.contracts.errors import ConfigError

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
"""Of PACKAGE, whose source distribution holds llama.cpp."""
NAME = f"llama.cpp of llama-cpp-python {VERSION}, built with GGML_NATIVE"
TARGETS = ("llama-bench", "llama-batched-bench", "llama-completion")
SERVER = "llama-server"
CONTEXT = 4096
PROMPT = "The history of computing began long before the modern computer, when people used"
"""Some 16 tokens; llama-completion takes text only."""
GREEDY = ("--samplers", "top_k", "--top-k", "1")
TEMPERATURE = ("--samplers", "temperature", "--temp", "0.8")
TOP = ("--samplers", "top_k;top_p;temperature", "--temp", "0.8", "--top-k", "40", "--top-p", "0.95")
"""In llama.cpp's own order, where top-k leaves the other two little to do."""


@dataclass(frozen=True)
class Completion:
    """What llama-completion says of a run. tok_s: with sampling. load_s: until its first evaluation was done."""

    tok_s: float
    load_s: float
    peak_mb: float


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp's programs on one model file. Methods raise ConfigError where a program fails."""

    programs: Path
    model: Path

    def decode(self, threads: int, tokens: int = 128, depth: int = 0) -> float:
        """Tokens per second of decoding `tokens` tokens after `depth` tokens of context."""
        return self._bench(threads, ["-p", "0", "-n", str(tokens), "-d", str(depth)])

    def prefill(self, threads: int, tokens: int = 512) -> float:
        """Tokens per second of a prompt of `tokens` tokens."""
        return self._bench(threads, ["-p", str(tokens), "-n", "0"])

    def batch(self, threads: int, sequences: int, tokens: int = 64) -> float:
        """Tokens per second, all together, of `sequences` sequences decoding `tokens` tokens each."""
        what = ["-npp", "16", "-ntg", str(tokens), "-npl", str(sequences), "--output-format", "jsonl"]
        done = self._run("llama-batched-bench", threads, ["-c", str(CONTEXT), *what])
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        return float(json.loads(lines[-1])["speed_tg"])

    def complete(self, threads: int, tokens: int, samplers: tuple[str, ...] = GREEDY) -> Completion:
        """Complete a short prompt by `tokens` tokens, in a context of 4096."""
        what = ["-c", str(CONTEXT), "-n", str(tokens), "-p", PROMPT, "-no-cnv", "--simple-io", "--ignore-eos"]
        done = self._run("llama-completion", threads, [*what, "--verbosity", "4", *samplers])
        return read_completion(done)

    def _bench(self, threads: int, what: list[str]) -> float:
        done = self._run("llama-bench", threads, ["-r", "1", "-o", "json", *what])
        return float(json.loads(done.stdout)[0]["avg_ts"])

    def _run(self, program: str, threads: int, what: list[str]) -> Done:
        return run_program([self.programs / program, "-m", self.model, "-t", str(threads), *what])


def read_completion(done: Done) -> Completion:
    """From llama-completion's closing report. Raises ConfigError where a line is missing.

    It times evaluating and sampling apart. n runs follow the prompt's, and n + 1 samples are drawn: a token costs one
    of each. What it does besides (pieces of text, printing) is not counted.
    """
    load_ms, _ = _timed(done, "load time")
    sampling_ms, _ = _timed(done, "sampling time")
    eval_ms, runs = _timed(done, "eval time")
    seconds_per_token = (eval_ms / max(runs, 1) + sampling_ms / (runs + 1)) / 1e3
    return Completion(1 / seconds_per_token, load_ms / 1e3, done.peak_mb)


def _timed(done: Done, name: str) -> tuple[float, int]:
    """Milliseconds and number of runs, 0 where none is given."""
    found = re.search(rf":\s+{name} =\s+([\d.]+) ms(?: /\s+(\d+) runs)?", done.stderr + done.stdout)
    if found is None:
        raise ConfigError(f"llama-completion reports no {name!r}")
    return float(found[1]), int(found[2] or 0)


def build(version: str = VERSION, targets: Sequence[str] = TARGETS) -> Path:
    """The folder of the built programs; fetched and built on first use, which takes some minutes.

    Raises ConfigError where pip, cmake or the compiler fail.
    """
    programs = user_cache() / "peers" / f"llama-cpp-{version}" / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    with (programs.parent / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [target for target in targets if not (programs / target).is_file()]
        if missing:
            _build(version, missing, programs)
    return programs


def _build(version: str, missing: Sequence[str], programs: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source = _fetch(version, Path(scratch))
        settings = ["GGML_NATIVE=ON", "BUILD_SHARED_LIBS=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF"]
        with_server = "ON" if SERVER in missing else "OFF"
        settings += [f"LLAMA_BUILD_SERVER={with_server}", "LLAMA_BUILD_UI=OFF", "LLAMA_USE_PREBUILT_UI=OFF"]
        settings += ["LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF", "CMAKE_BUILD_TYPE=Release"]
        build_folder = Path(scratch) / "build"
        run_program(["cmake", "-S", source, "-B", build_folder, *(f"-D{setting}" for setting in settings)])
        run_program(["cmake", "--build", build_folder, "--parallel", str(os.cpu_count() or 1), "--target", *missing])
        for target in missing:
            shutil.move(build_folder / "bin" / target, programs / target)


def _fetch(version: str, folder: Path) -> Path:
    # Its own source alone: with --no-binary :all: pip builds cmake from source first.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
    run_program([*pip, f"{PACKAGE}=={version}", "--dest", folder])
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(folder.glob("*/vendor/llama.cpp"))
