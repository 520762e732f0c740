"""How long the device idles between decode steps, stamped by the device."""

from __future__ import annotations

import statistics

from tokenspeed.bench.gpu.publish import Publisher
from tokenspeed.bench.gpu.setup import Setup, greedy, random_prompts
from tokenspeed.bench.gpu.stamps import clock_ns, gaps_us, stamped
from tokenspeed.engine.llm import LLM

STEPS = 1000
PROMPT = 64
WARMING_TOKENS = 5
LENGTH = PROMPT + STEPS + 16
"""Tokens of a sequence that an engine must take."""


def publish_idle(llm: LLM, setup: Setup, publisher: Publisher, steps: int = STEPS) -> None:
    """Median and 99th percentile of the time between two steps of one sequence, in us; the engine has to be idle."""
    gaps, clock = measure(llm, steps)
    samples = {"p50_p90_p99_max_us": [percentile(gaps, part) for part in (50, 90, 99, 100)], "clock_ns": [clock]}
    publisher.add(setup.id("idle", "b1"), statistics.median(gaps), "us", samples=samples)
    publisher.add(setup.id("idle", "b1", "p99"), percentile(gaps, 99), "us")


def measure(llm: LLM, steps: int = STEPS) -> tuple[list[float], float]:
    """Gaps in us, and the clock's resolution in ns. Steps are captured with stamps, and without them again after."""
    with stamped(llm) as ring:
        _run(llm, WARMING_TOKENS)
        ring.clear()
        _run(llm, steps + 4)
        starts, ends = ring.read()
    return gaps_us(starts, ends, steps), float(clock_ns(starts, ends))


def percentile(values: list[float], part: float) -> float:
    """The smallest value that at least `part` per cent are not above."""
    ordered = sorted(values)
    rank = -(-len(ordered) * part // 100)
    return ordered[max(0, int(rank) - 1)]


def _run(llm: LLM, tokens: int) -> None:
    llm.generate(prompt_token_ids=random_prompts(llm, 1, PROMPT), sampling_params=greedy(tokens), use_tqdm=False)
