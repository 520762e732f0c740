"""Offline throughput: many requests at once, tokens per second in all and per user."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

from tokenspeed.bench.gpu.ceilings import ceilings_of
from tokenspeed.bench.gpu.decode import timed_ms
from tokenspeed.bench.gpu.floors import decode_floor_ms, prefill_floor_ms
from tokenspeed.bench.gpu.publish import Publisher
from tokenspeed.bench.gpu.setup import Setup, greedy, random_prompts
from tokenspeed.engine.llm import LLM


@dataclass(frozen=True)
class Demand:
    """requests of `given` prompt tokens that draw `drawn` tokens each, at most `at_once` together."""

    requests: int
    given: int
    drawn: int
    at_once: int

    @property
    def parts(self) -> list[str]:
        """Of an id."""
        return ["throughput", f"n{self.requests}", f"in{self.given}", f"out{self.drawn}"]


@dataclass(frozen=True)
class Outcome:
    """seconds from the first request to the last token; each request's tokens per second after its first token."""

    seconds: float
    per_user: list[float]


def serve(llm: LLM, demand: Demand) -> Outcome:
    """All requests handed over at once."""
    prompts = random_prompts(llm, demand.requests, demand.given)
    started = time.perf_counter()
    outputs = llm.generate(prompt_token_ids=prompts, sampling_params=greedy(demand.drawn), use_tqdm=False)
    seconds = time.perf_counter() - started
    timings = [output.metrics.timings(demand.drawn) for output in outputs]
    return Outcome(seconds, [1e3 / each["tpot_ms"] for each in timings if each.get("tpot_ms")])


def run_throughput(setup: Setup, demand: Demand, publisher: Publisher) -> None:
    """Tokens drawn per second; samples: with prompts, and per user."""
    ceilings_of(setup.device)  # needs memory that the engine takes
    llm = setup.open(demand.at_once, demand.given + demand.drawn + 1)
    for tokens in (2, 3):
        timed_ms(llm, demand.at_once, demand.given, tokens, draws=False)
    serve(llm, demand)  # buckets of the ends are captured
    outcome = serve(llm, demand)
    drawn, given = demand.requests * demand.drawn, demand.requests * demand.given
    samples = {"total_tok_s": [(given + drawn) / outcome.seconds], "seconds": [outcome.seconds]}
    if outcome.per_user:
        samples["user_tok_s_median_min"] = [median(outcome.per_user), min(outcome.per_user)]
    floor_s = _floor_s(llm, setup, demand)
    floor = None if floor_s is None else drawn / floor_s
    rate = drawn / outcome.seconds
    share = None if floor is None else rate / floor
    publisher.add(setup.id(*demand.parts), rate, "tok/s", floor=floor, share=share, samples=samples)
    llm.close()


def _floor_s(llm: LLM, setup: Setup, demand: Demand) -> float | None:
    """Every prompt by itself, then decode steps of `at_once` sequences each."""
    ceilings = ceilings_of(setup.device)
    first = prefill_floor_ms(llm, demand.given, ceilings)
    step = decode_floor_ms(llm, demand.at_once, demand.given + demand.drawn // 2, ceilings)
    if first is None or step is None:
        return None
    return (first * demand.requests + step * (demand.drawn - 1) * demand.requests / demand.at_once) / 1e3
