"""What a user of a fresh process waits for and pays: load time, peak memory, the first token; and a busy neighbour."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

from tokenspeed.bench import llama_cpp
from tokenspeed.bench.cpu_rows import COMMAND, SETTINGS, decode_rate
from tokenspeed.bench.launch import Done, busy_core, run_program
from tokenspeed.bench.llama_cpp import LlamaCpp
from tokenspeed.bench.record import Record, Target, surroundings
from tokenspeed.bench.stats import paired, repeated, summarise
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.engine.llm import LLM

THREADS = 2
DECODED = 128
FIRST_TOKEN = ("-m", "tokenspeed.cli.main", "generate", "--temperature", "0", "--max-tokens", "1", "The capital of")
Measure = Callable[[LlamaCpp, int], Record]


def measure_load(peer: LlamaCpp, pairs: int) -> Record:
    """Seconds to load the demo model, from call to ready, against llama.cpp's; the file lies in the page cache."""
    children: list[dict[str, float]] = []

    def ours() -> float:
        children.append(json.loads(_child(1).stdout))
        return children[-1]["load_s"]

    result = paired(ours, lambda: peer.complete(THREADS, 2).load_s, pairs)
    children = children[-pairs:]
    others = {
        "with_imports_s": [child["imports_s"] + child["load_s"] for child in children],
        "first_token_s": [child["first_token_s"] for child in children],
    }
    return Record(
        id=f"cpu.load.t{THREADS}",
        value=median(result.a),
        unit="s",
        target=Target(of="ratio", at_most=1.5),
        peer=f"{llama_cpp.NAME}: llama-completion's own load time, until its first evaluation is done",
        peer_value=median(result.b),
        ratio=result.ratio(),
        samples=result.samples() | others,
        **surroundings(COMMAND),
    )


def measure_rss(peer: LlamaCpp, pairs: int) -> Record:
    """MB that the peak of loading and decoding in a fresh process lies above llama.cpp's."""
    result = paired(lambda: _child(DECODED).peak_mb, lambda: peer.complete(THREADS, DECODED).peak_mb, pairs)
    more = summarise([ours - theirs for ours, theirs in zip(result.a, result.b, strict=True)])
    return Record(
        id="cpu.rss",
        value=more.lower_quartile,
        unit="MB",
        runs=more,
        target=Target(at_most=350),
        peer=f"{llama_cpp.NAME}: llama-completion; the value is our peak less its peak, samples a and b are the peaks",
        samples=result.samples(),
        **surroundings(COMMAND),
    )


def measure_first_token(_: LlamaCpp, runs: int) -> Record:
    """Seconds from starting `tokenspeed generate` to its first text."""
    result = repeated(first_text_s, runs)
    summary = summarise(result.figures)
    return Record(
        id="cpu.first_token",
        value=summary.lower_quartile,
        unit="s",
        runs=summary,
        target=Target(at_most=4),
        samples=result.samples(),
        **surroundings(COMMAND),
    )


def measure_busy(_: LlamaCpp, pairs: int) -> Record:
    """Decoding on two threads with one core kept busy, over decoding on one thread with nothing beside it."""
    two, one = (LLM(threads=threads, **SETTINGS) for threads in (THREADS, 1))

    def disturbed() -> float:
        with busy_core():
            return decode_rate(two, 129)

    result = paired(disturbed, lambda: decode_rate(one, 129), pairs)
    two.close()
    one.close()
    return Record(
        id="cpu.busy",
        value=result.ratio().median,
        unit="x",
        target=Target(of="ratio", at_least=0.8),
        peer="this engine on one thread, nothing beside it; samples are tok/s",
        ratio=result.ratio(),
        samples=result.samples(),
        **surroundings(COMMAND),
    )


MEASURES: dict[str, Measure] = {
    f"cpu.load.t{THREADS}": measure_load,
    "cpu.rss": measure_rss,
    "cpu.first_token": measure_first_token,
    "cpu.busy": measure_busy,
}


def first_text_s() -> float:
    """From starting the process to the first byte of its text. Raises ConfigError where none comes."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *FIRST_TOKEN], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    text = process.stdout.read(1)
    seconds = time.perf_counter() - start
    _, complaint = process.communicate()
    if process.returncode or not text.strip(b"\n"):
        raise ConfigError(f"tokenspeed generate gave no text: {complaint.decode(errors='replace').strip()[-500:]}")
    return seconds


def _child(tokens: int) -> Done:
    return run_program([sys.executable, "-m", "tokenspeed.bench.cpu_child", str(THREADS), str(tokens)])
