"""What serving costs besides the model: `python -m tokenspeed.bench.serving_overhead`, with an engine that computes
nothing and a client that only counts, all on this machine's cores.

Writes server.ttft_overhead.ms, server.cpu_per_token.*.us, server.tokens_per_s.c256 and server.itl_p99.c256.ms to
benchmarks/results/server.json. docs/benchmarks.md says what they are.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import msgspec
import uvloop

from tokenspeed.bench.event_client import Stream, read_all
from tokenspeed.bench.record import Record, Target, surroundings, write
from tokenspeed.bench.relay import relay_cpu_us
from tokenspeed.bench.stats import GATE_RUNS, RepeatedResult, calibration_loop, repeated, summarise
from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.async_engine import AsyncEngine

RESULTS = Path("benchmarks/results/server.json")
STREAMS = 256
FIRST_TOKENS = 20
"""Pairs of first tokens of one run."""
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Shape:
    """`streams` streams of `tokens` tokens each, one per `step_ms`."""

    streams: int
    step_ms: float
    tokens: int


ONE = Shape(1, 1.0, 4000)
"""As a GPU serves one user of a small model."""
ONE_SLOWLY = Shape(1, 4.0, 1000)
"""The same of an 8B model: between two tokens the processor sleeps and its caches go cold."""
MANY = Shape(STREAMS, 16.0, 1000)
"""16,000 tokens/s."""


@dataclass(frozen=True)
class Server:
    """The server's process, without its engine."""

    pid: int
    port: int

    def cpu_s(self) -> float:
        """Processor seconds of all its threads, with what the kernel does in its name."""
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


@dataclass(frozen=True)
class Load:
    """One run of a load: processor seconds of the server, and what its clients got."""

    cpu_s: float
    streams: Sequence[Stream]

    @property
    def tokens(self) -> int:
        return sum(stream.tokens for stream in self.streams)

    @property
    def figures(self) -> dict[str, float]:
        """Microseconds of processor and events per token, tokens per second, and the 99th percentile of the
        milliseconds between two events (0 where all came at once)."""
        began, ended = min(stream.first for stream in self.streams), max(stream.last for stream in self.streams)
        gaps = sorted(chain.from_iterable(stream.gaps for stream in self.streams))
        return {
            "cpu_us": self.cpu_s / self.tokens * 1e6,
            "tokens_per_s": self.tokens / (ended - began),
            "itl_p99_ms": gaps[len(gaps) * 99 // 100] * 1e3 if gaps else 0.0,
            "events_per_token": sum(stream.events for stream in self.streams) / self.tokens,
        }


@contextlib.contextmanager
def serving(step_ms: float) -> Iterator[Server]:
    """A server over an engine with such steps. Raises ConfigError where it does not start."""
    command = [sys.executable, "-m", "tokenspeed.server.null", str(step_ms)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        port = process.stdout.readline()
        if not port:
            raise ConfigError(f"{' '.join(command)} ended with status {process.wait()}")
        server = Server(process.pid, int(port))
        _wait_until_ready(server.port)
        yield server
    finally:
        process.terminate()
        process.wait()


def run_load(server: Server, shape: Shape) -> Load:
    """All streams at once, from their requests to their ends."""
    requests = [_request(shape.tokens) for _ in range(shape.streams)]
    before = server.cpu_s()
    found = read_all(server.port, requests)
    return Load(server.cpu_s() - before, found)


async def first_tokens(server: Server, engine: AsyncEngine) -> float:
    """Milliseconds that HTTP adds to the time to the first token: the median of pairs, one beside the other."""
    differences = []
    for _ in range(FIRST_TOKENS):
        began = time.perf_counter()
        async for _output in engine.submit(_prompt(), SamplingParams(max_tokens=1, ignore_eos=True)):
            own = time.perf_counter() - began
        began = time.perf_counter()
        (stream,) = read_all(server.port, [_request(1)])
        differences.append(stream.first - began - own)
    return statistics.median(differences) * 1e3


def measure_first_tokens(runs: int) -> RepeatedResult:
    """See `first_tokens`; connecting is a part of it."""

    async def run() -> RepeatedResult:
        result = RepeatedResult([], [])
        with serving(ONE.step_ms) as server:
            command = (sys.executable, "-m", "tokenspeed.bench.null_core", str(ONE.step_ms))
            engine = await AsyncEngine.start(EngineConfig(), core_command=command)
            await first_tokens(server, engine)
            for _ in range(runs):
                result.calibration.append(calibration_loop())
                result.figures.append(await first_tokens(server, engine))
            await engine.close()
        return result

    return uvloop.run(run())


def measure_load(shape: Shape, runs: int) -> dict[str, RepeatedResult]:
    """`Load.figures` of each run, by name."""
    found: dict[str, RepeatedResult] = {}
    with serving(shape.step_ms) as server:
        run_load(server, shape)
        for _ in range(runs):
            calibration = calibration_loop()
            for name, figure in run_load(server, shape).figures.items():
                result = found.setdefault(name, RepeatedResult([], []))
                result.figures.append(figure)
                result.calibration.append(calibration)
    return found


def records(runs: int) -> Iterator[Record]:
    """Measure everything, one after the other."""
    around = surroundings("python -m tokenspeed.bench.serving_overhead")

    def record(
        name: str, unit: str, target: Target | None, result: RepeatedResult, floor: RepeatedResult | None = None
    ) -> Record:
        summary, samples = summarise(result.figures), result.samples()
        least = None if floor is None else summarise(floor.figures).lower_quartile
        if floor is not None:
            samples["floor"] = floor.figures
        return Record(
            id=f"server.{name}",
            value=summary.lower_quartile,
            unit=unit,
            target=target,
            runs=summary,
            floor=least,
            share=None if least is None else least / summary.lower_quartile,
            samples=samples,
            **around,
        )

    yield record("ttft_overhead.ms", "ms", Target(at_most=4), measure_first_tokens(runs))
    for name, shape, target in (
        ("cpu_per_token.c1.us", ONE, Target(at_most=40)),
        ("cpu_per_token.c1_slow.us", ONE_SLOWLY, None),
    ):
        floor = repeated(partial(relay_cpu_us, shape.step_ms, shape.tokens), runs)
        yield record(name, "us", target, measure_load(shape, runs)["cpu_us"], floor)
    many = measure_load(MANY, runs)
    yield record("cpu_per_token.c256.us", "us", Target(at_most=22), many["cpu_us"])
    yield record("tokens_per_s.c256", "tok/s", Target(at_least=15_000), many["tokens_per_s"])
    yield record("itl_p99.c256.ms", "ms", Target(at_most=50), many["itl_p99_ms"])
    yield record("events_per_token.c256", "x", None, many["events_per_token"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write. arguments: by default the command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=GATE_RUNS, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of records to add to (default: %(default)s)")
    options = parser.parse_args(arguments)
    for entry in records(options.runs):
        assert entry.runs is not None
        spread = f"{entry.runs.minimum:.4g} to {entry.runs.maximum:.4g}, {entry.runs.count} runs"
        print(f"{entry.id:32} {entry.value:10.4g} {entry.unit} ({spread}) met: {entry.met()}", flush=True)
        write(options.out, [entry])


def _request(max_tokens: int) -> bytes:
    body = msgspec.json.encode(
        {
            "prompt": _prompt(),
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _prompt() -> list[int]:
    return random.choices(range(1_000, 30_000), k=PROMPT_TOKENS)


def _wait_until_ready(port: int) -> None:
    end = time.monotonic() + 60
    while not _is_ready(port):
        if time.monotonic() > end:
            raise ConfigError("the server was not ready within 60 s")
        time.sleep(0.05)


def _is_ready(port: int) -> bool:
    from urllib.error import HTTPError
    from urllib.request import urlopen

    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            return bool(answer.status == 200)
    except HTTPError:
        return False


if __name__ == "__main__":
    main()
