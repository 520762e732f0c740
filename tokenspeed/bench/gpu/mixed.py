"""A long prompt that arrives beside decoding streams: their pace, and its rate against the same prompt alone.

Time is the host's, when tokens come back from the step loop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from tokenspeed.bench.gpu.idle import percentile
from tokenspeed.bench.gpu.publish import Publisher
from tokenspeed.bench.gpu.setup import Setup, drain, free_memory, request
from tokenspeed.bench.stats import median_interval
from tokenspeed.contracts.request import SequenceUpdate
from tokenspeed.engine.llm import LLM

STREAMS = 8
STREAM_PROMPT, STREAM_WARM_TOKENS = 128, 16
PROMPT = 8192
CAP = 512
"""Tokens fed per step, decoding sequences included."""
OTHER_CAPS = (2048, 8192)
REPEATS = 3
LONG = "long"


@dataclass(frozen=True)
class Load:
    """streams of stream_prompt tokens each decode; then a prompt comes. cap: tokens fed per step."""

    streams: int = STREAMS
    stream_prompt: int = STREAM_PROMPT
    prompt: int = PROMPT
    cap: int = CAP

    @property
    def stream_tokens(self) -> int:
        """More than a stream draws until the prompt is in."""
        return 4 * STREAM_WARM_TOKENS + 2 * -(-self.prompt // max(1, self.cap - self.streams))

    @property
    def length(self) -> int:
        """Most tokens of a sequence."""
        return max(self.prompt + 8, self.stream_prompt + self.stream_tokens)


@dataclass
class Arrivals:
    """When tokens of each request came, in seconds."""

    times: dict[str, list[float]] = field(default_factory=dict)

    def take(self, updates: list[SequenceUpdate]) -> None:
        """Note a step's tokens now."""
        now = time.perf_counter()
        for update in updates:
            self.times.setdefault(update.request_id, []).extend([now] * len(update.new_token_ids))

    def count(self, name: str) -> int:
        """Tokens so far."""
        return len(self.times.get(name, ()))

    def intervals_ms(self, start: float, end: float) -> list[float]:
        """Between tokens that follow each other, of all requests, where the later one came after `start` and by
        `end`."""
        found = []
        for times in self.times.values():
            found += [(b - a) * 1e3 for a, b in pairwise(times) if start < b <= end]
        return found


def alone_s(llm: LLM, prompt: int) -> float:
    """Seconds until the first token of a prompt with nothing beside it."""
    arrivals = Arrivals()
    started = time.perf_counter()
    llm.core.add(request(llm, LONG, prompt, 1))
    while not arrivals.count(LONG):
        arrivals.take(llm.core.step())
    drain(llm)
    return arrivals.times[LONG][0] - started


def beside_streams(llm: LLM, load: Load) -> tuple[float, list[float]]:
    """Seconds until the prompt's first token, and the streams' intervals in ms meanwhile."""
    names, arrivals = [f"stream{number}" for number in range(load.streams)], Arrivals()
    for name in names:
        llm.core.add(request(llm, name, load.stream_prompt, load.stream_tokens))
    while any(arrivals.count(name) < STREAM_WARM_TOKENS for name in names):
        arrivals.take(llm.core.step())
    started = time.perf_counter()
    llm.core.add(request(llm, LONG, load.prompt, 1))
    while not arrivals.count(LONG):
        arrivals.take(llm.core.step())
    (end,) = arrivals.times.pop(LONG)
    for name in names:
        llm.core.abort(name)
    drain(llm)
    return end - started, arrivals.intervals_ms(started, end)


def run_mixed(setup: Setup, publisher: Publisher, load: Load = Load(), caps: tuple[int, ...] = OTHER_CAPS) -> None:
    """Both at the load's cap; the prompt alone at other caps too, whose best is the peer of a record."""
    llm = setup.open(load.streams + 1, load.length, load.cap)
    for _ in range(2):  # eager, then captured
        alone_s(llm, load.prompt)
        beside_streams(llm, load)
    alone = [alone_s(llm, load.prompt) for _ in range(REPEATS)]
    runs = [beside_streams(llm, load) for _ in range(REPEATS)]
    llm.close()
    del llm
    free_memory(setup.device)
    intervals = [each for _, ms in runs for each in ms]
    seconds = [each for each, _ in runs]
    samples = {"p50_p90_max_ms": [percentile(intervals, part) for part in (50, 90, 100)], "count": [len(intervals)]}
    publisher.add(setup.id("mixed", "itl_p99"), percentile(intervals, 99), "ms", samples=samples)
    share = 100 * median(alone) / median(seconds)
    publisher.add(setup.id("mixed", "prefill"), share, "%", samples={"alone_s": alone, "beside_s": seconds})
    best = {load.cap: median(alone)} | {cap: _alone_at(setup, load, cap) for cap in caps}
    rates = {cap: load.prompt / each for cap, each in best.items()}
    rate, most = load.prompt / median(seconds), max(rates.values())
    publisher.add(
        setup.id("mixed", "prefill_rate"),
        rate,
        "tok/s",
        peer=f"alone, {max(rates, key=lambda cap: rates[cap])} tokens per step",
        peer_value=most,
        ratio=median_interval([rate / most]),
        samples={f"alone_{cap}": [rate] for cap, rate in rates.items()},
    )


def _alone_at(setup: Setup, load: Load, cap: int) -> float:
    llm = setup.open(1, load.length, cap)
    for _ in range(2):
        alone_s(llm, load.prompt)
    found = median(alone_s(llm, load.prompt) for _ in range(REPEATS))
    llm.close()
    del llm
    free_memory(setup.device)
    return found
