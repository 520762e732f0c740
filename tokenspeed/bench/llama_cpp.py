"""llama.cpp as a peer: built once from its source on PyPI, for this processor, and run through its own benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tokenspeed.config.paths import user_cache
from tokenspeed.contracts.errors import ConfigError

VERSION = "0.3.36"
"""Of llama-cpp-python, whose source distribution holds llama.cpp."""
TARGETS = ("llama-bench", "llama-batched-bench")


def build(version: str = VERSION) -> Path:
    """The folder of the built programs; fetched and built on first use, which takes some minutes.

    Raises ConfigError where pip, cmake or the compiler fail.
    """
    home = user_cache() / "peers" / f"llama-cpp-{version}"
    programs = home / "bin"
    if all((programs / target).is_file() for target in TARGETS):
        return programs
    with tempfile.TemporaryDirectory() as scratch:
        source = _fetch(version, Path(scratch))
        settings = ["GGML_NATIVE=ON", "BUILD_SHARED_LIBS=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF"]
        settings += ["LLAMA_BUILD_SERVER=OFF", "LLAMA_CURL=OFF", "CMAKE_BUILD_TYPE=Release"]
        build_folder = Path(scratch) / "build"
        _run(["cmake", "-S", str(source), "-B", str(build_folder), *(f"-D{setting}" for setting in settings)])
        _run(["cmake", "--build", str(build_folder), "--parallel", "--target", *TARGETS])
        programs.mkdir(parents=True, exist_ok=True)
        for target in TARGETS:
            (build_folder / "bin" / target).rename(programs / target)
    return programs


def decode_rate(programs: Path, model: Path, threads: int, tokens: int = 128, depth: int = 0) -> float:
    """Tokens per second of decoding `tokens` tokens after `depth` tokens of context."""
    return _bench(programs, model, threads, ["-p", "0", "-n", str(tokens), "-d", str(depth)])


def prefill_rate(programs: Path, model: Path, threads: int, tokens: int = 512) -> float:
    """Tokens per second of a prompt of `tokens` tokens."""
    return _bench(programs, model, threads, ["-p", str(tokens), "-n", "0"])


def batch_rate(programs: Path, model: Path, threads: int, sequences: int, tokens: int = 64) -> float:
    """Tokens per second, all together, of `sequences` sequences decoding `tokens` tokens each."""
    command = [str(programs / "llama-batched-bench"), "-m", str(model), "-t", str(threads), "-c", "4096"]
    command += ["-npp", "16", "-ntg", str(tokens), "-npl", str(sequences), "--output-format", "jsonl"]
    lines = [line for line in _run(command).splitlines() if line.startswith("{")]
    return float(json.loads(lines[-1])["speed_tg"])


def _bench(programs: Path, model: Path, threads: int, what: list[str]) -> float:
    command = [str(programs / "llama-bench"), "-m", str(model), "-t", str(threads), "-r", "1", "-o", "json", *what]
    return float(json.loads(_run(command))[0]["avg_ts"])


def _fetch(version: str, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    _run([*pip, f"llama-cpp-python=={version}", "--dest", str(folder)])
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(folder.glob("*/vendor/llama.cpp"))


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{command[0]} failed ({done.returncode}): {done.stderr.strip()[-500:]}")
    return done.stdout
